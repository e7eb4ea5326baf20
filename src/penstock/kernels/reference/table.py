"""The op table filled with the torch references."""

from __future__ import annotations

from penstock.kernels.layouts import HostLayouts, Layouts
from penstock.kernels.ops import Ops
from penstock.kernels.reference import activation as activation_family
from penstock.kernels.reference import attention as attention_family
from penstock.kernels.reference import gguf_blocks as gguf_family
from penstock.kernels.reference import linear as linear_family
from penstock.kernels.reference import norm as norm_family
from penstock.kernels.reference import quantized as quantized_family
from penstock.kernels.reference import sampling as sampling_family
from penstock.kernels.reference.scale_search import ReferenceScaleSearch


class ReferenceOps(Ops):
    """Every op in plain torch."""

    __slots__ = ()

    def __init__(self, num_threads: int, layouts: Layouts | None = None) -> None:
        super().__init__("reference", "torch", num_threads, layouts or HostLayouts())
        self.scale_search = ReferenceScaleSearch()

    pack_into = staticmethod(linear_family.pack_into)
    linear = staticmethod(linear_family.linear)
    embedding = staticmethod(linear_family.embedding)
    pack_parts = staticmethod(quantized_family.pack_parts)
    pack_gguf = staticmethod(gguf_family.pack_gguf)
    quantize_into = staticmethod(quantized_family.quantize_into)
    dequantize = staticmethod(quantized_family.dequantize)
    rms_norm = staticmethod(norm_family.rms_norm)
    layer_norm = staticmethod(norm_family.layer_norm)
    gelu = staticmethod(activation_family.gelu)
    silu_and_mul = staticmethod(activation_family.silu_and_mul)
    rope_and_cache = staticmethod(attention_family.rope_and_cache)
    paged_attention = staticmethod(attention_family.paged_attention)
    full_attention = staticmethod(attention_family.full_attention)
    copy_blocks = staticmethod(attention_family.copy_blocks)
    sample = staticmethod(sampling_family.sample)
    mask_logits = staticmethod(sampling_family.mask_logits)
    top_logprobs = staticmethod(sampling_family.top_logprobs)
