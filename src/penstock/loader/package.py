"""A compiled package: a model directory whose weights were packed once, for one layout of the kernels.

    config.json, tokenizer.json, ...   as in the checkpoint it was made from
    penstock.json                      what was packed, and for which layouts (PackageManifest)
    packed.safetensors                 the bytes: uint8 tensors, each from a page's boundary on
    text.gguf                          a GGUF's keys and values instead of a tokenizer's files, if it was made from one
    graphs.json                        shapes of steps to capture at the start; engines add what they captured

Owns: the file while it is written.
Never: knows what a layout looks like; trusts a number of the manifest that the file does not bear out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from penstock.base.errors import CheckpointError
from penstock.loader.safetensors_file import SafetensorsFile

_log = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
MANIFEST: Final = "penstock.json"
WEIGHTS: Final = "packed.safetensors"
GRAPHS: Final = "graphs.json"
GGUF_TEXT: Final = "text.gguf"
_MAX_GRAPHS_BYTES: Final = 64 << 10
# Reserved: the header is written last, over spaces.
_HEADER_STEP_BYTES: Final = 1 << 20
_TENSORS_A_STEP: Final = 2048
_PAGE_BYTES: Final = 4096
_PIECE_BYTES: Final = 8 << 20
_NUM_READERS: Final = 4
_MAX_MANIFEST_BYTES: Final = 64 << 20


class PackedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the file. kind: "linear" [n, k] of floats, "quantized" [n, k] of `layout`, "tensor" of `shape`.

    dtype: of the values, or of the activations that a quantised weight is multiplied with. layout: the fields of
    kernels.quantized.WeightLayout.
    """

    kind: str
    dtype: str
    nbytes: int
    shape: tuple[int, ...]
    layout: dict[str, int | str] = {}


class PackageManifest(msgspec.Struct, frozen=True, kw_only=True):
    """layouts: the version of the kernels' layouts (Layouts.version). isa: of the machine that packed, to be told.

    entries: by name; a fused linear's parts are "names joined by +", "#" and a number.
    """

    format_version: int
    layouts: str
    isa: str
    dtype: str
    quantization: str | None
    activations: str | None = None
    entries: dict[str, PackedEntry] = {}


def is_package(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> PackageManifest:
    """Raises CheckpointError."""
    file = path / MANIFEST
    try:
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{file} is too large to be a manifest.")
        manifest = msgspec.json.decode(file.read_bytes(), type=PackageManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", remedy="Compile the model again.") from None
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path.name} is a package of format {manifest.format_version}; this version reads {FORMAT_VERSION}.",
            remedy="Compile the model again.",
        )
    return manifest


def read_graph_shapes(path: Path) -> list[tuple[int, int, int]]:
    """Tokens, requests and table columns of steps, as an engine left them. Empty where there is no such file."""
    file = path / GRAPHS
    try:
        if file.stat().st_size > _MAX_GRAPHS_BYTES:
            raise ValueError(f"more than {_MAX_GRAPHS_BYTES} bytes")
        return msgspec.json.decode(file.read_bytes(), type=list[tuple[int, int, int]])
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        _log.warning("%s is not used: %s", file, error)
        return []


def write_graph_shapes(path: Path, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Replaces the file at once. A package that cannot be written to stays as it is."""
    part = path / f"{GRAPHS}.{os.getpid()}.part"
    try:
        part.write_bytes(b"[\n" + b",\n".join(map(msgspec.json.encode, shapes)) + b"\n]\n")
        part.replace(path / GRAPHS)
    except OSError as error:
        _log.debug("captured shapes are not kept: %s", error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


class PackageReader:
    """The packed tensors of a package. Raises CheckpointError for a file that is not what its manifest says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        file = SafetensorsFile(path / WEIGHTS)  # checks the header against the file's size
        try:
            spans = {name: file.span(name) for name in file.names()}
        finally:
            file.close()
        for name, entry in self.manifest.entries.items():
            begin, end = spans.get(name, (0, -1))
            if not 0 < entry.nbytes <= end - begin:
                raise CheckpointError(f"{WEIGHTS} does not hold {name[:80]!r}.", remedy="Compile the model again.")
        self._begins = {name: begin for name, (begin, _) in spans.items()}
        self._descriptor = os.open(path / WEIGHTS, os.O_RDONLY)
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="read-weights")

    def entry(self, name: str) -> PackedEntry:
        found = self.manifest.entries.get(name)
        if found is None:
            raise CheckpointError(
                f"The package {self.path.name} has no {name!r}.", remedy="config.json and weights are not of one model."
            )
        return found

    def read_into(self, name: str, target: memoryview, first: int = 0) -> None:
        """Fills `target` with the entry's bytes from `first` on. Straight from the file into its place, in parallel."""
        memory = target.cast("B")
        assert first + len(memory) <= self.entry(name).nbytes, (name, first, len(memory))
        begin = self._begins[name] + first

        def read(offset: int) -> None:
            piece, done = memory[offset : offset + _PIECE_BYTES], 0
            while done < len(piece):
                count = os.preadv(self._descriptor, [piece[done:]], begin + offset + done)
                if count == 0:
                    raise CheckpointError(f"{WEIGHTS} ended early.", remedy="Compile the model again.")
                done += count

        list(self._readers.map(read, range(0, len(memory), _PIECE_BYTES)))

    def close(self) -> None:
        self._readers.shutdown()
        os.close(self._descriptor)


class PackageWriter:
    """Writes packed.safetensors as the tensors come, and the manifest when all are there (`finish`).

    num_tensors: the most that will come.
    """

    def __init__(self, path: Path, num_tensors: int) -> None:
        self._header_bytes = (num_tensors // _TENSORS_A_STEP + 1) * _HEADER_STEP_BYTES - 8
        self._path = path
        self._file = (path / (WEIGHTS + ".part")).open("wb")
        self._file.seek(8 + self._header_bytes)
        self._header: dict[str, dict[str, object]] = {}
        self._end = 0
        self.entries: dict[str, PackedEntry] = {}

    def add(self, name: str, entry: PackedEntry, data: memoryview) -> None:
        assert name not in self.entries, name
        memory = data.cast("B")
        assert len(memory) == entry.nbytes, (name, len(memory), entry)
        padded = -(-entry.nbytes // _PAGE_BYTES) * _PAGE_BYTES
        self._file.write(memory)
        self._file.write(bytes(padded - entry.nbytes))
        offsets = [self._end, self._end + padded]
        self._header[name] = {"dtype": "U8", "shape": [padded], "data_offsets": offsets}
        self._end += padded
        self.entries[name] = entry

    def finish(self, manifest: PackageManifest) -> None:
        """The manifest's entries are those that were added. Only now is the package one."""
        header = msgspec.json.encode(self._header)
        assert len(header) <= self._header_bytes, len(header)
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self._file.close()
        (self._path / (WEIGHTS + ".part")).replace(self._path / WEIGHTS)
        text = msgspec.json.encode(msgspec.structs.replace(manifest, entries=self.entries))
        (self._path / MANIFEST).write_bytes(msgspec.json.format(text, indent=1))

    def abandon(self) -> None:
        """Removes what was written."""
        self._file.close()
        (self._path / (WEIGHTS + ".part")).unlink(missing_ok=True)
