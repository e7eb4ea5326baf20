"""A checkpoint: a directory with config.json and safetensors files, or a GGUF file.

Owns: the mappings of its files.
Never: unpickles; follows a name out of its directory.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from penstock.base.errors import CheckpointError
from penstock.config.model import ModelConfig, eos_token_ids
from penstock.config.pooler import EMBED_TASKS, module_list, sentence_modules
from penstock.loader.gguf_checkpoint import GGUFCheckpoint
from penstock.loader.mapped_tensor import TensorView
from penstock.loader.package import is_package, read_manifest
from penstock.loader.safetensors_file import SafetensorsFile

_MAX_JSON_BYTES: Final = 64 * 1024 * 1024
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX: Final = "model.safetensors.index.json"


def read_model_config(path: Path) -> ModelConfig:
    """The ModelConfig of the checkpoint `path`: a directory, or a GGUF file. Raises CheckpointError.

    generation_config.json adds end-of-sequence ids: instruction-tuned models list their turn end only there.
    modules.json says that the checkpoint makes vectors, and how.
    """
    if path.is_file():
        with contextlib.closing(GGUFCheckpoint(path)) as checkpoint:
            return checkpoint.model_config()
    config = _read_json(path / "config.json")
    model = _with_sentence_modules(ModelConfig.from_hf(config), path)
    if is_package(path):
        model = msgspec.structs.replace(model, dtype=read_manifest(path).dtype)
    generation_path = path / "generation_config.json"
    if not generation_path.is_file():
        return model
    ids = dict.fromkeys((*model.eos_token_ids, *eos_token_ids(_read_json(generation_path))))
    return msgspec.structs.replace(model, eos_token_ids=tuple(ids))


def _with_sentence_modules(model: ModelConfig, path: Path) -> ModelConfig:
    """The model as sentence-transformers' files describe it, where there are any; a classifier stays one."""
    file = path / "modules.json"
    if not file.is_file() or model.pooler.labels:
        return model
    listed = _read_json(file, list)
    folder = next((folder for kind, folder in module_list(listed) if kind == "Pooling"), "")
    pooling = _read_json(path / folder / "config.json") if folder else {}
    limits_path = path / "sentence_bert_config.json"
    modules = sentence_modules(listed, pooling, _read_json(limits_path) if limits_path.is_file() else {})
    pooler = msgspec.structs.replace(model.pooler, pooling=modules.pooling, normalize=modules.normalize)
    return msgspec.structs.replace(model, tasks=EMBED_TASKS, pooler=pooler, max_sequence=modules.max_sequence)


class Checkpoint(Protocol):
    """The tensors of a checkpoint by their Hugging Face names, in whatever files and types they are stored."""

    def names(self) -> set[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def tensor_type(self, name: str) -> str: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def size_bytes(self, name: str) -> int: ...
    def row_bytes(self, name: str) -> int: ...
    def read(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> TensorView: ...
    def release(self, name: str, begin: int = 0, end: int | None = None) -> None: ...
    def close(self) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a directory of safetensors, or a GGUF file. Raises CheckpointError."""
    return GGUFCheckpoint(path) if path.is_file() else SafetensorsCheckpoint(path)


class SafetensorsCheckpoint:
    """The tensors of a checkpoint directory by name, over all of its files. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = [SafetensorsFile(file) for file in weight_files(path)]
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in self._files:
            for name in file.names():
                if name in self._file_of:
                    other = self._file_of[name].path.name
                    raise CheckpointError(f"Tensor {name!r} is in both {other} and {file.path.name}.")
                self._file_of[name] = file

    def names(self) -> set[str]:
        return set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor_type(self, name: str) -> str:
        """The type of a tensor that is there: "BF16", "I32", ..."""
        return self._file_of[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def size_bytes(self, name: str) -> int:
        return self._file_of[name].size_bytes(name)

    def row_bytes(self, name: str) -> int:
        return self._file_of[name].row_bytes(name)

    def read(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> TensorView:
        """Rows [begin, end) of the tensor `name`, which must have `shape`, as a view of the mapped file."""
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(f"The checkpoint in {self.path} lacks the tensor {name!r}.")
        if file.shape(name) != shape:
            raise CheckpointError(
                f"Tensor {name!r} has the shape {list(file.shape(name))}; config.json implies {list(shape)}.",
                remedy="config.json and weights are not of the same model.",
            )
        return file.read(name, begin, end)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Gives the pages of rows [begin, end) back to the system once they have been copied."""
        self._file_of[name].release(name, begin, end)

    def close(self) -> None:
        for file in self._files:
            # A view that is still held (by the traceback of a failed load) keeps its mapping until it goes too.
            with contextlib.suppress(BufferError):
                file.close()


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory: those its index names, or the only one."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory.")
    index_path = path / _INDEX
    if index_path.is_file():
        return _indexed_files(path, index_path)
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if (path / "model.safetensors") in files:
        return [path / "model.safetensors"]
    if len(files) > 1:
        raise CheckpointError(f"{path} has {len(files)} safetensors files and no {_INDEX}.")
    if files:
        return files
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{path} has no safetensors file, only pickles ({', '.join(pickles[:3])}), which can run code on loading.",
            remedy="Convert it first: load it with transformers on a machine you can lose and call "
            "save_pretrained(), which writes safetensors.",
        )
    raise CheckpointError(
        f"{path} has no safetensors file.", remedy="Is it complete? Checkpoints of pickles (.bin, .pt) are not read."
    )


def _indexed_files(path: Path, index_path: Path) -> list[Path]:
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{_INDEX} has no weight_map.")
    names: dict[str, None] = {}
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(f"{_INDEX} names {str(name)[:80]!r}, which is not a file of the checkpoint.")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{_INDEX} names {name[:80]!r}; only safetensors files are read.")
        names[name] = None
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing[:3])}, which its index names.", remedy="Download the checkpoint again."
        )
    return [path / name for name in names]


def _read_json(path: Path, kind: type = dict) -> Any:
    """A JSON object (or list, by `kind`) from a file of bounded size."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {_MAX_JSON_BYTES} bytes.")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}.") from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path.name} is not a JSON {'object' if kind is dict else 'list'} ({error}).") from error
