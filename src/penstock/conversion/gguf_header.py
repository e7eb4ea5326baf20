"""The header of a GGUF that is to be written: keys, values, and every tensor's place."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from penstock.loader.gguf_file import DEFAULT_ALIGNMENT, MAGIC, TYPE_IDS, block_of

_VERSION: Final = 3
_STRING, _ARRAY = 8, 9
# The file's number of a type, and how it is packed.
_UINT32, _INT32, _FLOAT32, _BOOL = (4, "I"), (5, "i"), (6, "f"), (7, "?")


class TensorPlan:
    """A tensor that will be written. shape: slowest dimension first."""

    def __init__(self, name: str, tensor_type: str, shape: tuple[int, ...]) -> None:
        items, size = block_of(tensor_type)
        assert shape, name
        assert shape[-1] % items == 0, (name, shape, tensor_type)
        self.name = name
        self.tensor_type = tensor_type
        self.shape = shape
        self.nbytes = math.prod(shape) // items * size


def gguf_header(values: Mapping[str, Any], plans: Sequence[TensorPlan]) -> bytes:
    """Everything before the first tensor, padded. values: text, flags, whole numbers, floats, or lists of one kind."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(plans), len(values))]
    parts += [_text(key) + _value(value) for key, value in values.items()]
    offset = 0
    for plan in plans:
        dimensions = plan.shape[::-1]
        parts.append(_text(plan.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", TYPE_IDS[plan.tensor_type], offset))
        offset += plan.nbytes + padding(plan.nbytes)
    header = b"".join(parts)
    return header + bytes(padding(len(header)))


def padding(nbytes: int) -> int:
    """Bytes to the next place where a tensor may begin."""
    return -nbytes % DEFAULT_ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(value: object) -> tuple[int, str]:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _UINT32 if value >= 0 else _INT32
    assert isinstance(value, float), value
    return _FLOAT32


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if not isinstance(value, list):
        kind, code = _kind(value)
        return struct.pack(f"<I{code}", kind, value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    kind, code = _INT32 if value and isinstance(value[0], int) else _FLOAT32
    return struct.pack(f"<IIQ{len(value)}{code}", _ARRAY, kind, len(value), *value)
