"""GGUF files, mapped. The header is checked before a byte of it is believed.

The format (github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts; key/value pairs; a table of
tensors (name, dimensions with the fastest first, type, offset); the tensors, aligned. Little endian.

Owns: the mapping of its file.
Never: copies tensor data; decodes an array of the header before somebody asks for it.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.base.errors import CheckpointError
from penstock.loader.mapped_tensor import TensorView, page_span

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32

# Above every published file; they bound the work that a hostile header can cause.
MAX_PAIRS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 17
MAX_ARRAY_ITEMS: Final = 1 << 23
MAX_STRING_BYTES: Final = 16 << 20
_MAX_KEY_BYTES: Final = 1 << 16
_MAX_NAME_BYTES: Final = 512
_MAX_DIMENSIONS: Final = 4
_MAX_ALIGNMENT: Final = 1 << 20
_MAX_SPLITS: Final = 1000
_READ_AHEAD_BYTES: Final = 16 << 20

# Type id -> name, elements of a block, bytes of a block.
TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17),
}  # fmt: skip
TYPE_IDS: Final = {name: type_id for type_id, (name, _, _) in TENSOR_TYPES.items()}
_BLOCKS: Final = {name: (items, size) for name, items, size in TENSOR_TYPES.values()}

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SPLIT_NAME: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class _Array(NamedTuple):
    """An array in the header that nobody has asked for yet."""

    kind: int
    length: int
    begin: int


class TensorEntry(msgspec.Struct, frozen=True):
    """shape: slowest dimension first, as everywhere but in the file. begin: bytes from the start of the file."""

    type: str
    shape: tuple[int, ...]
    begin: int
    row_bytes: int


def block_of(tensor_type: str) -> tuple[int, int]:
    """(elements, bytes) of one block of a type."""
    return _BLOCKS[tensor_type]


class GGUFFile:
    """A mapped GGUF file. Raises CheckpointError for anything but a well-formed one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if path.stat().st_size < 24:
                    raise _corrupt(path, "it is too short for a header")
                # A private writable mapping: torch warns about read-only buffers. Nobody writes to it.
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
        cursor = _Cursor(path, self._mapping)
        try:
            self._pairs, tensor_infos, self._pairs_end = _read_header(cursor)
            self.tensors = _place_tensors(cursor, tensor_infos, self.integer("general.alignment", DEFAULT_ALIGNMENT))
        except BaseException:
            self._mapping.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._pairs

    def keys(self) -> list[str]:
        return list(self._pairs)

    def value(self, key: str) -> Any:
        """The value of a key as a Python object, None without one. Arrays of numbers are numpy arrays."""
        value = self._pairs.get(key)
        if not isinstance(value, _Array):
            return value
        cursor = _Cursor(self.path, self._mapping, value.begin)
        if value.kind == _STRING:
            return [cursor.string(MAX_STRING_BYTES) for _ in range(value.length)]
        dtype = np.dtype("<" + _SCALARS[value.kind])
        return np.frombuffer(self._mapping[value.begin : value.begin + value.length * dtype.itemsize], dtype)

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises CheckpointError when it is another type, or missing without a default."""
        value = self._pairs.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text", value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number. Raises CheckpointError when it is another type, or missing without a default."""
        value = self._pairs.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number. Raises CheckpointError when it is another type, or missing without a default."""
        value = self._pairs.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises CheckpointError when it is another type."""
        value = self._pairs.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings, empty without one. Raises CheckpointError when it is another type."""
        value = self._pairs.get(key)
        if value is None:
            return []
        if not isinstance(value, _Array) or value.kind != _STRING:
            raise self._wrong(key, "an array of strings", value)
        found: list[str] = self.value(key)
        return found

    def numbers(self, key: str) -> npt.NDArray[Any] | None:
        """An array of numbers, None without one. Raises CheckpointError when it is another type."""
        value = self._pairs.get(key)
        if value is None:
            return None
        if not isinstance(value, _Array) or value.kind == _STRING:
            raise self._wrong(key, "an array of numbers", value)
        found: npt.NDArray[Any] = self.value(key)
        return found

    def without_tensors(self) -> bytes:
        """A file of the same keys and values that has no tensor."""
        version, num_pairs = self._mapping[4:8], self._mapping[16:24]
        return MAGIC + version + bytes(8) + num_pairs + self._mapping[24 : self._pairs_end]

    def part_stack(self, name: str) -> list[str]:
        """Makes the matrices of a stack [E, N, K] tensors of their own, beside it -> their names, in order."""
        entry = self.tensors[name]
        if len(entry.shape) != 3:
            raise _corrupt(self.path, f"tensor {name!r} has {len(entry.shape)} dimensions, not 3")
        row_bytes = entry.row_bytes // max(entry.shape[1], 1)
        names = [f"{name}#{index}" for index in range(entry.shape[0])]
        for index, own in enumerate(names):
            begin = entry.begin + index * entry.row_bytes
            self.tensors[own] = TensorEntry(entry.type, entry.shape[1:], begin, row_bytes)
        return names

    def as_row(self, name: str) -> None:
        """Makes a vector a matrix of one row."""
        entry = self.tensors[name]
        if len(entry.shape) == 1:
            row_bytes = entry.shape[0] * entry.row_bytes
            self.tensors[name] = TensorEntry(entry.type, (1, *entry.shape), entry.begin, row_bytes)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> TensorView:
        """Rows [begin, end) of a tensor as a view of the mapping; the system reads ahead. Valid until close()."""
        entry = self.tensors[name]
        first, last = self._span(entry, begin, end)
        shape = entry.shape if end is None else (end - begin, *entry.shape[1:])
        start, length = page_span(first, last, outward=True)
        if length:
            ahead = min(length + _READ_AHEAD_BYTES, len(self._mapping) - start)
            self._mapping.madvise(mmap.MADV_WILLNEED, start, ahead)
        return TensorView(entry.type, shape, memoryview(self._mapping)[first:last])

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Gives the resident pages of rows [begin, end) back to the system. A later read maps them again."""
        start, length = page_span(*self._span(self.tensors[name], begin, end), outward=False)
        if length:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Ends the mapping. Every view must be gone by then."""
        self._mapping.close()

    def _span(self, entry: TensorEntry, begin: int, end: int | None) -> tuple[int, int]:
        rows = entry.shape[0] if entry.shape else 1
        end = rows if end is None else end
        assert 0 <= begin <= end <= rows, (begin, end, entry.shape)
        return entry.begin + begin * entry.row_bytes, entry.begin + end * entry.row_bytes

    def _wrong(self, key: str, wanted: str, value: object) -> CheckpointError:
        if value is None:
            return _corrupt(self.path, f"it lacks {key}")
        return _corrupt(self.path, f"{key} is {str(value)[:40]!r}, not {wanted}")


def split_paths(path: Path) -> list[Path]:
    """All files of a GGUF that may be split into NAME-00001-of-0000N.gguf; `path` is any of them."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    if not 1 <= count <= _MAX_SPLITS or not 1 <= int(match[2]) <= count:
        raise CheckpointError(f"{path.name} is no name of a split GGUF: at most {_MAX_SPLITS} parts are read.")
    paths = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {', '.join(missing[:3])}: the model is split into {count} files.",
            remedy="Put all parts into one directory.",
        )
    return paths


class _Cursor:
    """Reads values of a mapping one after the other; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = position

    def skip(self, count: int, what: str) -> int:
        """Moves on by `count` bytes; where they begin."""
        begin = self.position
        if count > self.size - begin:
            raise _corrupt(self.path, f"it ends inside {what}: it is truncated")
        self.position = begin + count
        return begin

    def scalar(self, code: str, what: str) -> Any:
        begin = self.skip(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, begin)[0]

    def string(self, limit: int, what: str = "a string") -> str:
        length = self.scalar("Q", what)
        if length > limit:
            raise _corrupt(self.path, f"{what} claims {length} bytes")
        begin = self.skip(length, what)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise _corrupt(self.path, f"{what} is no UTF-8") from error

    def skip_strings(self, count: int, what: str) -> None:
        """Steps over `count` strings. A vocabulary has hundreds of thousands, so this loop is spelled out."""
        data, size, position, unpack = self.data, self.size, self.position, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position + 8 > size:
                raise _corrupt(self.path, f"it ends inside {what}: it is truncated")
            (length,) = unpack(data, position)
            position += 8 + length
            if length > MAX_STRING_BYTES or position > size:
                raise _corrupt(self.path, f"a string in {what} claims {length} bytes")
        self.position = position


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """The pairs; of each tensor its dimensions (fastest first), type id and offset; where the pairs end."""
    path = cursor.path
    if cursor.data[:4] != MAGIC:
        raise _corrupt(path, "it does not begin with GGUF")
    cursor.position = 4
    version = cursor.scalar("I", "the version")
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        why = "it is big-endian" if big_endian else f"version {version} is not 2 or 3"
        raise CheckpointError(
            f"{path.name} cannot be read: {why}.", remedy="Convert it with llama.cpp's current tools."
        )
    num_tensors, num_pairs = cursor.scalar("Q", "the counts"), cursor.scalar("Q", "the counts")
    if num_pairs > MAX_PAIRS or num_tensors > MAX_TENSORS:
        raise _corrupt(path, f"it claims {num_pairs} pairs and {num_tensors} tensors")
    pairs: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string(_MAX_KEY_BYTES, "a key")
        if key in pairs:
            raise _corrupt(path, f"the key {key[:80]!r} is there twice")
        pairs[key] = _read_value(cursor, key)
    pairs_end = cursor.position
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string(_MAX_NAME_BYTES, "a tensor's name")
        if name in infos:
            raise _corrupt(path, f"the tensor {name!r} is there twice")
        num_dimensions = cursor.scalar("I", "a tensor")
        if num_dimensions > _MAX_DIMENSIONS:
            raise _corrupt(path, f"tensor {name!r} claims {num_dimensions} dimensions")
        dimensions = tuple(cursor.scalar("Q", "a tensor") for _ in range(num_dimensions))
        infos[name] = (dimensions, cursor.scalar("I", "a tensor"), cursor.scalar("Q", "a tensor"))
    return pairs, infos, pairs_end


def _read_value(cursor: _Cursor, key: str) -> Any:
    what = f"the value of {key[:80]!r}"
    kind = cursor.scalar("I", what)
    if kind == _STRING:
        return cursor.string(MAX_STRING_BYTES, what)
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind], what)
    if kind != _ARRAY:
        raise _corrupt(cursor.path, f"{what} has the unknown type {kind}")
    item_kind, count = cursor.scalar("I", what), cursor.scalar("Q", what)
    if count > MAX_ARRAY_ITEMS:
        raise _corrupt(cursor.path, f"{what} claims {count} items")
    begin = cursor.position
    if item_kind == _STRING:
        cursor.skip_strings(count, what)
    elif item_kind in _SCALARS:
        cursor.skip(count * struct.calcsize("<" + _SCALARS[item_kind]), what)
    else:
        raise _corrupt(cursor.path, f"{what} is an array of the unknown type {item_kind}")
    return _Array(item_kind, count, begin)


def _place_tensors(
    cursor: _Cursor, infos: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: int
) -> dict[str, TensorEntry]:
    path = cursor.path
    if not 1 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
        raise _corrupt(path, f"general.alignment is {alignment}")
    start = -(-cursor.position // alignment) * alignment
    entries: dict[str, TensorEntry] = {}
    for name, (dimensions, type_id, offset) in infos.items():
        if type_id not in TENSOR_TYPES:
            raise _corrupt(path, f"tensor {name!r} has the unknown type {type_id}")
        type_name, items, size = TENSOR_TYPES[type_id]
        columns = dimensions[0] if dimensions else 1
        if columns % items:
            raise _corrupt(
                path, f"tensor {name!r} has rows of {columns}, not a multiple of {items} as {type_name} needs"
            )
        if offset % alignment:
            raise _corrupt(path, f"tensor {name!r} begins at {offset}, not a multiple of {alignment}")
        if items > 1 and len(dimensions) < 2:
            raise _corrupt(path, f"tensor {name!r} is a vector of {type_name}")
        num_bytes = math.prod(dimensions) // items * size
        if start + offset + num_bytes > cursor.size:
            raise _corrupt(
                path,
                f"tensor {name!r} ends at byte {start + offset + num_bytes}, the file has {cursor.size}: truncated",
            )
        row_bytes = columns // items * size if len(dimensions) > 1 else size
        if len(dimensions) > 2:
            row_bytes *= math.prod(dimensions[1:-1])
        entries[name] = TensorEntry(type_name, dimensions[::-1], start + offset, row_bytes)
    _check_overlaps(path, entries)
    return entries


def _check_overlaps(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin < end:
            raise _corrupt(path, f"tensor {name!r} overlaps another")
        end = entry.begin + (entry.shape[0] if entry.shape else 1) * entry.row_bytes


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is not a usable GGUF file: {why}.", remedy="Download or convert it again.")
