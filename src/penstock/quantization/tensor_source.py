"""Where weights come from: a mapped checkpoint, or random numbers of the same shapes.

Owns: which tensors of the checkpoint were read.
Never: keeps a tensor.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Final, Protocol

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.loader import Checkpoint
from penstock.quantization import gguf_types

_FLOAT_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED_DTYPES: Final = {
    **_FLOAT_DTYPES, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
}  # fmt: skip


class TensorSource(Protocol):
    """Tensors by name. Each has the shape asked for, or a CheckpointError says what is wrong."""

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A copy in `dtype`, for small tensors (norms, biases)."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape in elements of a tensor; None when there is none of this name."""
        ...

    def stored(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> Tensor:
        """Rows as they are stored, valid until `release`. Of GGUF's block types: uint8 [rows, bytes of a row]."""
        ...

    def rows(self, name: str, shape: tuple[int, int], begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a matrix as floats, in the dtype they are stored in where that is one.

        Only valid until `release` of these rows.
        """
        ...

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """The rows have been copied: their pages can go."""
        ...

    def finish(self) -> None:
        """Everything has been read. Raises CheckpointError when tensors are left that nothing asked for."""
        ...


class CheckpointSource:
    """Reads from mapped files.

    ignored: says of a tensor that nothing read whether that is as it should be.
    on_progress: gets the fraction of the checkpoint's bytes that were read.
    """

    def __init__(
        self, checkpoint: Checkpoint, ignored: Callable[[str], bool], on_progress: Callable[[float], None]
    ) -> None:
        self._checkpoint = checkpoint
        self._unread = {name for name in checkpoint.names() if not ignored(name)}
        self._total_bytes = max(sum(checkpoint.size_bytes(name) for name in self._unread), 1)
        self._read_bytes = 0
        self._on_progress = on_progress

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = self._floats(name, shape).to(dtype, copy=True)
        self.release(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._checkpoint.shape(name) if name in self._checkpoint else None

    def stored(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> Tensor:
        return self._view(name, shape, begin, end)[1]

    def rows(self, name: str, shape: tuple[int, int], begin: int, end: int) -> Tensor:
        return self._floats(name, shape, begin, end)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        shape = self._checkpoint.shape(name)
        self._checkpoint.release(name, begin, end)
        self._advance((end if end is not None else shape[0] if shape else 1) - begin, name)

    def finish(self) -> None:
        if self._unread:
            shown = ", ".join(sorted(self._unread)[:4])
            raise CheckpointError(
                f"The checkpoint has {len(self._unread)} tensors that its architecture does not use: {shown}.",
                remedy="config.json and weights are not of the same model.",
            )

    def _floats(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> Tensor:
        stored_type, stored = self._view(name, shape, begin, end)
        if stored_type in _FLOAT_DTYPES:
            return stored
        if not gguf_types.is_known(stored_type):
            raise CheckpointError(
                f"Tensor {name!r} is stored as {stored_type}, and nothing in config.json says what that means.",
                remedy="Is the checkpoint's quantization_config missing?",
            )
        return gguf_types.dequantize(stored_type, stored)

    def _view(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> tuple[str, Tensor]:
        """The type's name and the rows as stored."""
        view = self._checkpoint.read(name, shape, begin, end)
        self._unread.discard(name)
        dtype = _STORED_DTYPES.get(view.dtype)
        if not math.prod(view.shape):
            raise CheckpointError(f"Tensor {name!r} is empty.")
        if dtype is None:
            return view.dtype, torch.frombuffer(view.data, dtype=torch.uint8).view(view.shape[0], -1)
        return view.dtype, torch.frombuffer(view.data, dtype=dtype).view(view.shape)

    def _advance(self, count: int, name: str) -> None:
        self._read_bytes += count * self._checkpoint.row_bytes(name)
        self._on_progress(min(self._read_bytes / self._total_bytes, 1.0))


class DummySource:
    """Random weights: normal, of a size that keeps activations near one. The same seed gives the same weights.

    A bank of random numbers is drawn once and read from a place that the tensor's name decides: drawing each weight
    of its own would take minutes for a large model.
    """

    _BANK_SIZE: Final = 4_000_037  # a prime: rows of a matrix do not repeat
    _OVERLAP: Final = 2 << 20  # the bank begins again at its end, so that most reads are one slice

    def __init__(self, seed: int, dtype: torch.dtype, on_progress: Callable[[float], None], total_bytes: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        bank = torch.randn(self._BANK_SIZE, generator=generator)
        self._bank = torch.cat([bank, bank[: self._OVERLAP]])
        self._scaled: dict[float, Tensor] = {}
        self._dtype = dtype
        self._on_progress = on_progress
        self._total_bytes = max(total_bytes, 1)
        self._made_bytes = 0

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name.lower().endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        return self._draw(name, 0, math.prod(shape), 0.02).to(dtype, copy=True).view(shape)

    def shape(self, name: str) -> tuple[int, ...] | None:  # noqa: ARG002  the protocol's signature
        return None

    def stored(self, *_: object) -> Tensor:
        raise AssertionError("random weights are not stored")

    def rows(self, name: str, shape: tuple[int, int], begin: int, end: int) -> Tensor:
        columns = shape[1]
        scale = 1.0 if "embed" in name else columns**-0.5
        return self._draw(name, begin * columns, (end - begin) * columns, scale).view(end - begin, columns)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:  # noqa: ARG002
        return

    def finish(self) -> None:
        self._scaled.clear()
        self._on_progress(1.0)

    def _draw(self, name: str, begin: int, count: int, scale: float) -> Tensor:
        """`count` numbers from place `begin` of the tensor on, times `scale`; mostly a view of the bank."""
        if scale not in self._scaled:
            self._scaled[scale] = (self._bank * scale).to(self._dtype)
        bank = self._scaled[scale]
        start = (zlib.crc32(name.encode()) + begin) % self._BANK_SIZE
        self._made_bytes += count * self._dtype.itemsize
        self._on_progress(min(self._made_bytes / self._total_bytes, 1.0))
        if start + count <= len(bank):
            return bank[start : start + count]
        pieces = [bank[start : self._BANK_SIZE]]
        while (missing := count - sum(map(len, pieces))) > 0:
            pieces.append(bank[: min(missing, self._BANK_SIZE)])
        return torch.cat(pieces)
