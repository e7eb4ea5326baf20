"""The op table filled with the native kernels."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from penstock.kernels.layouts import HostLayouts
from penstock.kernels.native import activation, attention, linear, norm, quantized, sampling
from penstock.kernels.native.experts import NativeExperts
from penstock.kernels.native.recording import Recordings
from penstock.kernels.native.scale_search import NativeScaleSearch
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import QuantizedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from penstock._native import Kernels
    from penstock.kernels.packed import PackedLinear


class NativeOps(Ops):
    """Every op is one call into `kernels`, the compiled kernels of one instruction set."""

    __slots__ = ("kernels",)

    def __init__(self, kernels: Kernels, num_threads: int) -> None:
        super().__init__("native", kernels.isa, num_threads, HostLayouts())
        self.kernels = kernels
        self.experts = NativeExperts(self, kernels, num_threads)
        self.scale_search = NativeScaleSearch(kernels, num_threads)
        # Of the class, not of this table: a recording holds the layers, and would keep them in a cycle with it.
        self.recordings = Recordings(kernels, partial(NativeOps._over, kernels.isa, num_threads))

    @classmethod
    def _over(cls, isa: str, num_threads: int, kernels: Kernels) -> NativeOps:
        """The same table over kernels that only remember."""
        ops = cls.__new__(cls)
        Ops.__init__(ops, "native", isa, num_threads, HostLayouts())
        ops.kernels = kernels
        ops.experts = NativeExperts(ops, kernels, num_threads)
        return ops

    def pack_into(self, packed: PackedLinear, first_row: int, source: Tensor) -> None:
        linear.pack_into(self.kernels, self.num_threads, packed, first_row, source)

    def linear(
        self,
        x_TK: Tensor,
        weight: PackedLinear | QuantizedLinear,
        bias_N: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if isinstance(weight, QuantizedLinear):
            return quantized.linear(self.kernels, self.num_threads, x_TK, weight, bias_N, out_dtype)
        return linear.linear(self.kernels, self.num_threads, x_TK, weight, bias_N, out_dtype)

    def gated_linear(
        self, x_TK: Tensor, weight: PackedLinear | QuantizedLinear, bias_N: Tensor | None = None
    ) -> Tensor:
        if isinstance(weight, QuantizedLinear):
            return quantized.linear(self.kernels, self.num_threads, x_TK, weight, bias_N, is_gated=True)
        return super().gated_linear(x_TK, weight, bias_N)

    def embedding(self, ids_T: Tensor, weight: PackedLinear | QuantizedLinear) -> Tensor:
        if isinstance(weight, QuantizedLinear):
            return quantized.embedding(self.kernels, self.num_threads, ids_T, weight)
        return linear.embedding(self.kernels, self.num_threads, ids_T, weight)

    def pack_parts(
        self,
        packed: QuantizedLinear,
        first_row: int,
        codes_RK: Tensor,
        scales_RG: Tensor,
        minimums_RG: Tensor | None = None,
    ) -> None:
        quantized.pack_parts(self.kernels, self.num_threads, packed, first_row, (codes_RK, scales_RG, minimums_RG))

    def pack_gguf(self, packed: QuantizedLinear, first_row: int, blocks_RN: Tensor, ggml_type: int) -> None:
        quantized.pack_gguf(self.kernels, self.num_threads, packed, first_row, blocks_RN, ggml_type)

    def quantize_into(self, packed: QuantizedLinear, first_row: int, source: Tensor) -> None:
        quantized.quantize_into(self.kernels, self.num_threads, packed, first_row, source)

    def dequantize(self, packed: QuantizedLinear, first_row: int = 0, rows: int | None = None) -> Tensor:
        return quantized.dequantize(self.kernels, self.num_threads, packed, first_row, rows)

    def rms_norm(self, x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(self.kernels, self.num_threads, x_TK, residual_TK, weight_K, eps)

    def layer_norm(
        self, x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, bias_K: Tensor, eps: float
    ) -> Tensor:
        return norm.layer_norm(self.kernels, self.num_threads, x_TK, residual_TK, (weight_K, bias_K), eps)

    def gelu(self, x_TI: Tensor) -> Tensor:
        return activation.gelu(self.kernels, self.num_threads, x_TI)

    def silu_and_mul(self, gate_up_TJ: Tensor) -> Tensor:
        return activation.silu_and_mul(self.kernels, self.num_threads, gate_up_TJ)

    def rope_and_cache(
        self,
        qkv_TS: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping_T: Tensor,
        qk_norm: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        rotary, caches = (cos_TE, sin_TE), (key_cache, value_cache)
        attention.rope_and_cache(self.kernels, self.num_threads, qkv_TS, rotary, caches, slot_mapping_T, qk_norm)

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
        caches, tables = (key_cache, value_cache), (block_tables_RW, context_lens_R, query_starts)
        return attention.paged_attention(self.kernels, self.num_threads, q_THD, caches, tables, scale, sliding_window)

    def full_attention(self, qkv_TS: Tensor, query_starts: Tensor, num_heads: int, scale: float) -> Tensor:
        return attention.full_attention(self.kernels, self.num_threads, qkv_TS, query_starts, num_heads, scale)

    def copy_blocks(self, caches: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
        attention.copy_blocks(self.kernels, caches, sources, destinations)

    def sample(
        self,
        logits_RV: Tensor,
        temperature_R: Tensor,
        top_k_R: Tensor,
        top_p_R: Tensor,
        min_p_R: Tensor,
        uniform_R: Tensor,
    ) -> Tensor:
        settings = (temperature_R, top_k_R, top_p_R, min_p_R, uniform_R)
        return sampling.sample(self.kernels, self.num_threads, logits_RV, settings)

    def mask_logits(self, logits_RV: Tensor, rows: Sequence[int], masks_KW: NDArray[np.int32]) -> None:
        sampling.mask_logits(self.kernels, self.num_threads, logits_RV, rows, masks_KW)

    def top_logprobs(self, logits_RV: Tensor, ids_R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return sampling.top_logprobs(self.kernels, self.num_threads, logits_RV, ids_R, k)
