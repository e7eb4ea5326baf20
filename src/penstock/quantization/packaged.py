# ruff: noqa: ARG002  the signatures are those of the protocols
"""Weights of a compiled package: bytes in the kernels' own layout, read straight to where they stay.

`RecordingFormat` and `RecordingSource` stand between a model's constructor and a checkpoint and write down what passes;
`PackagedFormat` and `PackagedSource` give it back.
Owns: which entries were read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.kernels.layouts import Layouts
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import QuantizedLinear, WeightLayout
from penstock.loader.package import PackageReader, PackageWriter, PackedEntry
from penstock.quantization.linear_format import EmbeddingWeight, LinearFormat, LinearWeight
from penstock.quantization.measuring import AbsentWeight
from penstock.quantization.packed_weight import Packed, PackedWeight, SplitWeight
from penstock.quantization.tensor_source import TensorSource

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_LINEAR, _QUANTIZED, _TENSOR = "linear", "quantized", "tensor"
_ORDER: Final = ".order"
_MOST_NAMES: Final = 4


class RecordingFormat:
    """Loads linears as `linear_format` does, and keeps nothing of them: a package is written in a layer's memory."""

    def __init__(self, linear_format: LinearFormat, writer: PackageWriter) -> None:
        self._format = linear_format
        self._writer = writer

    def load_linear(
        self, source: TensorSource, names: Sequence[str], num_rows: Sequence[int], num_columns: int, ops: Ops
    ) -> AbsentWeight:
        weight = self._format.load_linear(source, names, num_rows, num_columns, ops)
        parts = weight.parts if isinstance(weight, SplitWeight) else [weight]
        for index, part in enumerate(parts):
            assert isinstance(part, PackedWeight)
            self._add(_part_name(names, index), part)
        return AbsentWeight(sum(num_rows), num_columns)

    def load_embedding(
        self, source: TensorSource, name: str, num_rows: int, num_columns: int, ops: Ops
    ) -> AbsentWeight:
        return self.load_linear(source, [name], [num_rows], num_columns, ops)

    def linear_nbytes(self, names: Sequence[str], num_rows: Sequence[int], num_columns: int, layouts: Layouts) -> int:
        return self._format.linear_nbytes(names, num_rows, num_columns, layouts)

    def _add(self, name: str, weight: PackedWeight) -> None:
        packed, layout = weight.packed, {}
        if isinstance(packed, QuantizedLinear):
            layout = dataclasses.asdict(packed.layout)
        entry = PackedEntry(
            kind=_QUANTIZED if layout else _LINEAR, dtype=_NAMES[packed.dtype], nbytes=packed.nbytes,
            shape=(packed.n, packed.k), layout=layout,
        )  # fmt: skip
        self._writer.add(name, entry, _bytes_of(packed.data.cpu()))
        if weight.input_order is not None:
            record_tensor(self._writer, name + _ORDER, weight.input_order)


class RecordingSource:
    """Writes down every small tensor that is read; all else is the source's."""

    def __init__(self, source: TensorSource, writer: PackageWriter) -> None:
        self._source = source
        self._writer = writer

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = self._source.tensor(name, shape, dtype)
        record_tensor(self._writer, name, found)
        return found

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._source.shape(name)

    def stored(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> Tensor:
        return self._source.stored(name, shape, begin, end)

    def rows(self, name: str, shape: tuple[int, int], begin: int, end: int) -> Tensor:
        return self._source.rows(name, shape, begin, end)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        self._source.release(name, begin, end)

    def finish(self) -> None:
        self._source.finish()


def record_tensor(writer: PackageWriter, name: str, tensor: Tensor) -> None:
    """Writes a small tensor down."""
    entry = PackedEntry(kind=_TENSOR, dtype=_NAMES[tensor.dtype], nbytes=tensor.nbytes, shape=tuple(tensor.shape))
    writer.add(name, entry, _bytes_of(tensor.cpu()))


class Staging(Protocol):
    def fill(self, target: Tensor, read: Callable[[int, memoryview], None]) -> None:
        """target: flat uint8 on the device. read(offset, memory): fills memory with the bytes from there on."""


class PackagedFormat:
    """The linears of a package. Raises CheckpointError where it holds something else than the model asks for."""

    def __init__(
        self,
        reader: PackageReader,
        on_read: Callable[[int], None] = lambda _nbytes: None,
        staging: Staging | None = None,
    ) -> None:
        """staging: to a device; None: the host's own memory is filled by the file."""
        self._reader = reader
        self._on_read = on_read
        self._staging = staging

    def load_linear(
        self, source: TensorSource, names: Sequence[str], num_rows: Sequence[int], num_columns: int, ops: Ops
    ) -> LinearWeight:
        parts = [self._part(name, num_columns, ops) for name in self._part_names(names)]
        if sum(part.num_rows for part in parts) != sum(num_rows):
            raise _mismatch(names[0], f"[{sum(num_rows)}, {num_columns}]")
        return parts[0] if len(parts) == 1 else SplitWeight(parts)

    def load_embedding(
        self, source: TensorSource, name: str, num_rows: int, num_columns: int, ops: Ops
    ) -> EmbeddingWeight:
        weight = self.load_linear(source, [name], [num_rows], num_columns, ops)
        if not isinstance(weight, PackedWeight):
            raise _mismatch(name, f"[{num_rows}, {num_columns}]")
        return weight

    def linear_nbytes(
        self,
        names: Sequence[str],
        num_rows: Sequence[int],
        num_columns: int,
        layouts: Layouts,
    ) -> int:
        return sum(self._reader.entry(name).nbytes for name in self._part_names(names))

    def _part_names(self, names: Sequence[str]) -> list[str]:
        found = [_part_name(names, 0)]
        while (following := _part_name(names, len(found))) in self._reader.manifest.entries:
            found.append(following)
        return found

    def _part(self, name: str, num_columns: int, ops: Ops) -> PackedWeight:
        entry = self._reader.entry(name)
        if len(entry.shape) != 2 or entry.shape[1] != num_columns:
            raise _mismatch(name, f"{num_columns} columns")
        packed = _empty(name, entry, ops.layouts)
        if packed.data.nbytes != entry.nbytes:
            raise _mismatch(name, f"{packed.data.nbytes} bytes")
        self._fill(name, packed.data)
        order = None
        if name + _ORDER in self._reader.manifest.entries:
            order = torch.empty(num_columns, dtype=torch.int64, device=ops.layouts.device)
            self._fill(name + _ORDER, order)
        return PackedWeight(packed, order)

    def _fill(self, name: str, tensor: Tensor) -> None:
        """The bytes of an entry, to where they stay."""
        if self._staging is None:
            self._reader.read_into(name, _bytes_of(tensor))
        else:
            flat = tensor.view(-1).view(torch.uint8)
            self._staging.fill(flat, lambda first, memory: self._reader.read_into(name, memory, first))
        self._on_read(tensor.nbytes)


class PackagedSource:
    """The small tensors of a package."""

    def __init__(self, reader: PackageReader) -> None:
        self._reader = reader

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        entry = self._reader.entry(name)
        nbytes = math.prod(shape) * dtype.itemsize
        if (entry.shape, entry.dtype, entry.nbytes) != (shape, _NAMES[dtype], nbytes):
            raise _mismatch(name, f"{list(shape)} of {_NAMES[dtype]}")
        tensor = torch.empty(shape, dtype=dtype)
        self._reader.read_into(name, _bytes_of(tensor))
        return tensor

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._reader.entry(name).shape if name in self._reader.manifest.entries else None

    def stored(self, *_: object) -> Tensor:
        raise AssertionError("a package holds no stored formats")

    def rows(self, *_: object) -> Tensor:
        raise AssertionError("a package's linears are packed")

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        return

    def finish(self) -> None:
        return


def _empty(name: str, entry: PackedEntry, layouts: Layouts) -> Packed:
    n, k = entry.shape
    dtype = _DTYPES.get(entry.dtype)
    if dtype not in (torch.bfloat16, torch.float32) or n < 1 or k < 1:
        raise _mismatch(name, "a weight of bfloat16 or float32")
    if entry.kind == _LINEAR:
        return layouts.empty_linear(n, k, dtype)
    fields: dict[str, Any] = dict(entry.layout)
    try:
        layout = WeightLayout(**fields)
    except (TypeError, AssertionError):
        raise _mismatch(name, "a layout of this version") from None
    return layouts.empty_quantized(n, k, layout, dtype)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: NDArray[np.uint8] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return flat.data


def _part_name(names: Sequence[str], index: int) -> str:
    """Of a stack of experts, whose names fill pages, the first and how many follow."""
    joined = "+".join(names) if len(names) <= _MOST_NAMES else f"{names[0]}+{len(names) - 1}"
    return f"{joined}#{index}"


def _mismatch(name: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"The package's {name[:80]!r} is not {wanted}, which config.json implies.",
        remedy="Compile the model again.",
    )
