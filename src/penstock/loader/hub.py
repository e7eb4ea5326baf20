"""From what a user calls a model to a local directory or GGUF file: a path as it is, a hub id through
huggingface_hub's cache. `org/name:Q4_K_M` is the GGUF of that quantization in a repository of several.

Owns: nothing (the cache is huggingface_hub's).
Never: goes to the network when the cache is complete; downloads anything but data files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from penstock.base.errors import CheckpointError
from penstock.loader.checkpoint import weight_files
from penstock.loader.gguf_file import MAGIC, split_paths

ALLOW_PATTERNS: Final = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges.txt"]
# Copies of the same weights in other layouts that some repositories carry beside the ones we read.
IGNORE_PATTERNS: Final = ["consolidated*", "*/*.safetensors", "onnx/*", "original/*", "*.bin", "*.pt", "*.pth", "*.py"]
_SPLIT_SUFFIX: Final = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)
_HUB_ID: Final = re.compile(r"([A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?)(?::([\w.-]{1,60}))?", re.ASCII)


def is_local(model: str) -> bool:
    """Whether `model` names something that is here rather than something to look for on the hub."""
    return bool(model) and Path(model).expanduser().exists()


def resolve(model: str, revision: str | None = None) -> Path:
    """The local directory or GGUF file of `model`: a path, or a hub id (downloaded, resuming, with a progress bar).

    A complete snapshot in the cache is used without any network call; HF_HUB_OFFLINE forbids the network altogether.
    revision: a branch, tag or commit of the hub repository. Raises CheckpointError.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path.resolve()
    if path.is_file():
        return _local_file(path)
    match = _HUB_ID.fullmatch(model)
    if model.startswith(("/", ".", "~")) or model.endswith(".gguf") or match is None:
        raise CheckpointError(
            f"There is no file or directory {model}.",
            remedy="Name a directory, a GGUF file, or a hub id like org/name.",
        )
    repository, quantization = match.groups()
    if quantization is not None:
        return _gguf_of_hub(repository, quantization, revision)
    cached = _cached_snapshot(model, revision)
    return cached if cached is not None else _download(model, revision)


def _local_file(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(
                f"{path} is a file, and no GGUF.", remedy="Name a GGUF, or the directory that holds config.json."
            )
    return split_paths(path.absolute())[0]


def gguf_names(names: Iterable[str], quantization: str) -> list[str]:
    """Of a repository's files, those of the GGUF of this quantization: one, or all parts of a split one.

    Raises CheckpointError when there is none, or more than one.
    """
    models = [name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    wanted = re.compile(rf"(?:^|[-._/]){re.escape(quantization)}(?=[-./])", re.IGNORECASE)
    found = sorted(name for name in models if wanted.search(name))
    whole = {_SPLIT_SUFFIX.sub("", name) for name in found}
    if len(whole) == 1:
        return found
    what = "several GGUFs" if whole else "no GGUF"
    shown = ", ".join(sorted({_SPLIT_SUFFIX.sub("", name) for name in (found or models)})[:12]) or "none at all"
    raise CheckpointError(f"The repository has {what} of {quantization}: {shown}.", remedy="Name one quantization.")


def _gguf_of_hub(repository: str, quantization: str, revision: str | None) -> Path:
    """The (first part of the) GGUF, from the cache if it is there with all its parts."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(
            snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=["*.gguf"])
        )
        names = gguf_names((str(file.relative_to(cached)) for file in cached.rglob("*.gguf")), quantization)
        return split_paths(cached / names[0])[0]
    except (LocalEntryNotFoundError, ValueError, CheckpointError):
        with _download_errors(repository, revision):
            names = gguf_names(HfApi().list_repo_files(repository, revision=revision), quantization)
            path = Path(snapshot_download(repository, revision=revision, allow_patterns=names))
    return split_paths(path / names[0])[0]


def _cached_snapshot(model: str, revision: str | None) -> Path | None:
    """The snapshot in the local cache if all of it is there: huggingface_hub also returns interrupted ones."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(
            snapshot_download(
                model,
                revision=revision,
                local_files_only=True,
                allow_patterns=ALLOW_PATTERNS,
                ignore_patterns=IGNORE_PATTERNS,
            )
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    return path if _is_complete(path) else None


def _is_complete(path: Path) -> bool:
    if not (path / "config.json").is_file():
        return False
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return False
    try:
        return bool(weight_files(path))
    except CheckpointError:
        return False


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _download_errors(model, revision):
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS)
        )


@contextmanager
def _download_errors(model: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as CheckpointErrors with a remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{model} is not (completely) in the local hub cache, and HF_HUB_OFFLINE forbids downloading.",
            remedy="Unset HF_HUB_OFFLINE once to download it, or name a local directory.",
        )
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated.", remedy="Accept its terms on the hub and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no directory and no hub model {model}.", remedy="Private models need `hf auth login`."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{model} could not be downloaded ({type(error).__name__}).",
            remedy="Check the connection; running again resumes. With HF_HUB_OFFLINE=1 only the cache is used.",
        ) from error
