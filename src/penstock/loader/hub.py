"""From what a user calls a model to a local directory: a path as it is, a hub id through huggingface_hub's cache.

Owns: nothing (the cache is huggingface_hub's).
Never: goes to the network when the cache is complete; downloads anything but data files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from penstock.base.errors import CheckpointError
from penstock.loader.checkpoint import weight_files

ALLOW_PATTERNS: Final = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges.txt"]
# Copies of the same weights in other layouts that some repositories carry beside the ones we read.
IGNORE_PATTERNS: Final = ["consolidated*", "*/*.safetensors", "onnx/*", "original/*", "*.bin", "*.pt", "*.pth", "*.py"]
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def is_local(model: str) -> bool:
    """Whether `model` names an existing directory rather than something to look for on the hub."""
    return bool(model) and Path(model).expanduser().is_dir()


def resolve(model: str, revision: str | None = None) -> Path:
    """The local directory of `model`: a path, or a hub id (downloaded, resuming, with a progress bar).

    A complete snapshot in the cache is used without any network call; HF_HUB_OFFLINE forbids the network altogether.
    revision: a branch, tag or commit of the hub repository. Raises CheckpointError.
    """
    path = Path(model).expanduser()
    if is_local(model):
        return path.resolve()
    if path.is_file():
        raise CheckpointError(f"{model} is a file.", remedy="Name the directory that holds config.json.")
    if model.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"There is no directory {model}.", remedy="Name a directory, or a hub id like org/name.")
    cached = _cached_snapshot(model, revision)
    return cached if cached is not None else _download(model, revision)


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
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{model} is not (completely) in the local hub cache, and HF_HUB_OFFLINE forbids downloading.",
            remedy="Unset HF_HUB_OFFLINE once to download it, or name a local directory.",
        )
    try:
        path = snapshot_download(
            model, revision=revision, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS
        )
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
    return Path(path)
