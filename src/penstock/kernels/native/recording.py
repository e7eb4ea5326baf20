"""The kernel calls of a decoder's layers, remembered once and made again by `_native.Program` without Python between.

Of a small step's calls, which take some microseconds each, Python takes two to five: a tenth of the time of a stream
that is alone. A larger step's results stay in the program's memory, where torch gives theirs back to the system after
each step: their page faults were 2 to 5 % of a prompt of 512 tokens.

A recording is made by running the layers with kernels that only remember, for two tokens that are never computed. It
holds for any number of tokens and requests, since all that depends on these are the inputs, and results have a row a
token. What is more than kernel calls cannot be remembered, is noticed, and is run as it is.

Owns: recordings, and the memory of results within them.
Never: computes anything that the kernels of `Kernels` do not.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock._native import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from penstock._native import Kernels
    from penstock.kernels.ops import Layers, Ops

_log = logging.getLogger(__name__)

# Larger steps go through feed-forward blocks in pieces of so many tokens (layers/mlp.py): a piece is the most that is
# held, here as there.
MAX_TOKENS: Final = 512
_RECORDED_TOKENS: Final = 2
# What the layers may ask of torch: memory, and views of it.
_ALLOWED: Final = {"empty", "empty_like", "new_empty", "view", "slice", "split_with_sizes", "select", "detach", "alias"}


class _NotRememberedError(Exception):
    """Something other than a kernel call happened."""


class _MemoryOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets torch give memory and views only, and keeps what it gave, so that no address occurs twice."""

    def __init__(self, program: Program) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._program = program
        self.given: list[object] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Of torch: True imports its whole compiler to keep it out of here, 2 s and 110 MB in a server's first step."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "cat" and args[1:] == (1,):
            return self._concatenate(args[0])
        if name not in _ALLOWED:
            raise _NotRememberedError(str(func))
        result = func(*args, **(kwargs or {}))
        self.given.append(result)
        return result

    def _concatenate(self, parts: list[Tensor]) -> Tensor:
        whole = parts[0].new_empty((parts[0].shape[0], sum(part.shape[1] for part in parts)))
        self.given.append(whole)
        to, row_bytes = whole.data_ptr(), whole[0].nbytes
        for part in parts:
            assert part.is_contiguous() and part.dtype is whole.dtype, (part.stride(), part.dtype)
            self._program.copy_columns(part.data_ptr(), to, part.shape[0], part[0].nbytes, row_bytes)
            to += part[0].nbytes
        return whole


class Recordings:
    """Of one op table. make_ops: that table over other kernels."""

    def __init__(self, kernels: Kernels, make_ops: Callable[[Kernels], Ops]) -> None:
        self.is_on = False
        self._kernels = kernels
        self._make_ops = make_ops
        self._layers: Layers | None = None
        self._places: list[int] = []
        self._program: Program | None = None

    @property
    def is_made(self) -> bool:
        """Whether the last layers could be remembered."""
        return self._program is not None

    def run(
        self, layers: Layers, residual_TD: Tensor, step: tuple[Tensor, ...], caches: Sequence[Tensor]
    ) -> Tensor | None:
        """See kernels/ops.py: LayerRecordings."""
        tokens = residual_TD.shape[0]
        if not self.is_on or tokens > MAX_TOKENS:
            return None
        places = [cache.data_ptr() for cache in caches]
        if self._layers is not layers or self._places != places:
            self._layers, self._places = layers, places
            self._program = self._record(layers, residual_TD, step, caches)
        if self._program is None:
            return None
        inputs = (residual_TD, *step)
        assert all(part.is_contiguous() for part in inputs)
        tables_RW = step[3]
        x_TD = torch.empty_like(residual_TD)
        addresses = [part.data_ptr() for part in inputs]
        self._program.run(addresses, x_TD.data_ptr(), tokens, tables_RW.shape[0], tables_RW.shape[1])
        return x_TD

    def _record(
        self, layers: Layers, residual_TD: Tensor, step: tuple[Tensor, ...], caches: Sequence[Tensor]
    ) -> Program | None:
        # As for two tokens of one request.
        rows = [_RECORDED_TOKENS] * 4 + [1, 1, 2]
        inputs = [
            part.new_empty((count, *part.shape[1:])) for count, part in zip(rows, (residual_TD, *step), strict=True)
        ]
        program = Program(self._kernels, _RECORDED_TOKENS, [(part.data_ptr(), part.nbytes) for part in inputs])
        try:
            with _MemoryOnly(program):
                ops = self._make_ops(cast("Kernels", program))
                program.finish(layers(ops, inputs[0], tuple(inputs[1:]), caches).data_ptr())
        except (_NotRememberedError, AttributeError, ValueError) as error:
            _log.info("the layers' calls are made one by one: %s", error)
            return None
        return program
