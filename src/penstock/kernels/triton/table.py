"""The op table of a GPU: Triton kernels, and torch's own op where that is the right implementation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from penstock.kernels.reference.table import ReferenceOps
from penstock.kernels.triton import activation, attention, full_attention, moe, norm, packing, penalties, rope, sampling
from penstock.kernels.triton import linear as linear_family
from penstock.kernels.triton.rounded_ops import TritonRoundedOps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from penstock.kernels.layouts import Layouts


class TritonOps(ReferenceOps):
    """The references, but for what is overridden here."""

    __slots__ = ()
    row_invariant: ClassVar[bool] = False

    def __init__(self, num_threads: int, layouts: Layouts) -> None:
        super().__init__(num_threads, layouts)
        self.kind = self.isa = "triton"
        self.experts = moe.TritonExperts(self, row_invariant=self.row_invariant)
        self.rounded = TritonRoundedOps(row_invariant=self.row_invariant)

    pack_into = staticmethod(packing.pack_into)
    pack_parts = staticmethod(packing.pack_parts)
    pack_gguf = staticmethod(packing.pack_gguf)
    quantize_into = staticmethod(packing.quantize_into)
    dequantize = staticmethod(linear_family.dequantize)
    linear = staticmethod(linear_family.linear)
    embedding = staticmethod(linear_family.embedding)
    rms_norm = staticmethod(norm.rms_norm)
    layer_norm = staticmethod(norm.layer_norm)
    gelu = staticmethod(activation.gelu)
    silu_and_mul = staticmethod(activation.silu_and_mul)
    rope_and_cache = staticmethod(rope.rope_and_cache)
    copy_blocks = staticmethod(rope.copy_blocks)
    full_attention = staticmethod(full_attention.full_attention)
    sample = staticmethod(sampling.sample)
    top_logprobs = staticmethod(sampling.top_logprobs)
    apply_penalties = staticmethod(penalties.apply_penalties)

    def paged_attention(
        self,
        q_THD: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables_RW: Tensor,
        context_lens_R: Tensor,
        query_starts: Tensor,
        scale: float,
        sliding_window: int = 0,
    ) -> Tensor:
        """The tables' shapes say what the host knows of the step."""
        caches, tables = (key_cache, value_cache), (block_tables_RW, context_lens_R, query_starts)
        bounds = attention.bounds_of(q_THD, key_cache, block_tables_RW, row_invariant=self.row_invariant)
        return attention.paged_attention(q_THD, caches, tables, scale, sliding_window, bounds=bounds)

    def mask_logits(self, logits_RV: Tensor, rows: Sequence[int], masks_KW: NDArray[np.int32]) -> None:
        row_ids = torch.from_numpy(np.array(rows, dtype=np.int64))
        sampling.mask_logits(logits_RV, self._sent(row_ids), self._sent(torch.from_numpy(masks_KW)))

    def _sent(self, host: Tensor) -> Tensor:
        """On the device, without waiting for it: only copies from pinned memory do not."""
        if self.layouts.device.type == "cpu":
            return host
        return host.pin_memory().to(self.layouts.device, non_blocking=True)


class RowInvariantOps(TritonOps):
    """Batch-invariant mode: a row's bits depend on its own request alone, not on the rows beside it, on their number,
    or on how its request was cut into steps.

    Every other op is so anyway: a program has a row (norms, activations, draws) or an element to itself, and its launch
    follows from the row's length.
    """

    __slots__ = ()

    row_invariant = True
    linear = staticmethod(partial(linear_family.linear, row_invariant=True))
