"""One safetensors file, mapped. The header is checked before a byte of it is believed.

Owns: the mapping of its file.
Never: copies tensor data; keeps pages that were released resident.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any, Final, TypeGuard

import msgspec

from penstock.base.errors import CheckpointError
from penstock.loader.mapped_tensor import TensorView, page_span

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_MAX_DIMENSIONS: Final = 8
_READ_AHEAD_BYTES: Final = 16 << 20  # the disk works on what comes next while this is packed
_ITEM_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class SafetensorsFile:
    """A mapped safetensors file. Raises CheckpointError for anything but a well-formed one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size < 8:
                    raise _corrupt(path, f"{size} bytes are too few for a header")
                # A private writable mapping: torch warns about read-only buffers. Nobody writes to it.
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
        self._entries = _parse_header(path, self._mapping, size)

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def dtype(self, name: str) -> str:
        return self._entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def size_bytes(self, name: str) -> int:
        entry = self._entries[name]
        return entry.end - entry.begin

    def row_bytes(self, name: str) -> int:
        """Bytes of one row (the first dimension's items) of a tensor."""
        entry = self._entries[name]
        return (entry.end - entry.begin) // max(entry.shape[0] if entry.shape else 1, 1)

    def span(self, name: str) -> tuple[int, int]:
        """First byte in the file and the one behind the last."""
        entry = self._entries[name]
        return entry.begin, entry.end

    def read(self, name: str, begin: int = 0, end: int | None = None) -> TensorView:
        """Rows [begin, end) of the tensor as a view of the mapping; the system reads ahead. Valid until close()."""
        entry = self._entries[name]
        first, last = self._span(name, begin, end)
        shape = entry.shape if end is None else (end - begin, *entry.shape[1:])
        start, length = page_span(first, last, outward=True)
        if length:
            ahead = min(length + _READ_AHEAD_BYTES, len(self._mapping) - start)
            self._mapping.madvise(mmap.MADV_WILLNEED, start, ahead)
        return TensorView(entry.dtype, shape, memoryview(self._mapping)[first:last])

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Gives the resident pages of rows [begin, end) back to the system. A later read maps them again."""
        first, last = self._span(name, begin, end)
        start, length = page_span(first, last, outward=False)
        if length:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, length)

    def _span(self, name: str, begin: int, end: int | None) -> tuple[int, int]:
        entry = self._entries[name]
        if end is None:
            return entry.begin, entry.end
        assert 0 <= begin <= end <= entry.shape[0], (begin, end, entry.shape)
        row_bytes = self.row_bytes(name)
        return entry.begin + begin * row_bytes, entry.begin + end * row_bytes

    def close(self) -> None:
        """Ends the mapping. Every view must be gone by then."""
        self._mapping.close()


def _parse_header(path: Path, mapping: mmap.mmap, size: int) -> dict[str, _Entry]:
    header_bytes = int.from_bytes(mapping[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise _corrupt(path, f"its header claims {header_bytes} bytes, the file has {size}")
    try:
        header = msgspec.json.decode(mapping[8 : 8 + header_bytes], type=dict[str, dict[str, Any]])
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise _corrupt(path, f"its header is not the JSON of a safetensors file ({error})") from error
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    entries = {name: _parse_entry(path, name, raw, data_start, size) for name, raw in header.items()}
    previous_end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < previous_end:
            raise _corrupt(path, f"tensor {name!r} overlaps another")
        previous_end = entry.end
    return entries


def _parse_entry(path: Path, name: str, raw: dict[str, Any], data_start: int, size: int) -> _Entry:
    dtype, shape, offsets = raw.get("dtype"), raw.get("shape"), raw.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _corrupt(path, f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _corrupt(path, f"tensor {name!r} has a malformed shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _corrupt(path, f"tensor {name!r} has malformed data_offsets")
    begin, end = offsets
    if data_start + end > size:
        raise _corrupt(path, f"tensor {name!r} ends at byte {data_start + end}, the file has {size}: it is truncated")
    if math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise _corrupt(path, f"tensor {name!r} claims shape {list(shape)} of {dtype} in {end - begin} bytes")
    return _Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48 for value in values
    )


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is not a usable safetensors file: {why}.", remedy="Download it again.")
