"""Float checkpoints quantised while they load: a piece of rows at a time, so the float weights are never all there.

    int8      a scale an output, activations rounded to 8 bits
    int4      4 bits with a scale for 32 inputs (GGUF's Q4_0), activations rounded to 8 bits; the head as int8
    q4_k_m    GGUF's mixture of Q4_K and Q6_K: better than int4 and slower to load, for its scales are searched
    fp8       E4M3 with a scale an output, activations stay as they are; the head as int8

The embedding stays as it is unless the output head is tied to it, when it is the largest linear of all. A few outputs
of a head are large and decide much: four bits, or FP8's three of mantissa, are too few for them.
"""

from __future__ import annotations

from typing import Final

import torch

from penstock.config.model import ModelConfig
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import GGUF_LAYOUTS, INT4, INT8_CHANNEL, QuantizedLinear, WeightLayout, fp8
from penstock.loader.gguf_file import TYPE_IDS, block_of
from penstock.quantization.gguf_encode import encode, head_name, is_router, k_mixture
from penstock.quantization.stored_format import MAPPED_PIECE_ELEMENTS, PIECE_ELEMENTS, StoredFormat, row_pieces
from penstock.quantization.tensor_source import TensorSource

EMBEDDING: Final = "model.embed_tokens"
_FP8: Final = fp8()
_LAYOUTS: Final = {"int8": INT8_CHANNEL, "int4": INT4, "fp8": _FP8}
_LARGEST_E4M3: Final = 448.0


class OnlineFormat(StoredFormat):
    """kind: "int8", "int4", "q4_k_m" or "fp8"."""

    def __init__(self, dtype: torch.dtype, kind: str, model: ModelConfig) -> None:
        super().__init__(dtype)
        self._kind = kind
        self._model = model

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:
        if is_router(name) or (name == EMBEDDING and not self._model.tie_word_embeddings):
            return None
        if self._kind in ("int4", "fp8") and name == head_name(self._model):
            return INT8_CHANNEL
        if self._kind != "q4_k_m":
            return _LAYOUTS[self._kind]
        # Rows that are no whole K blocks are kept in 8 bits.
        kind = k_mixture(name, self._model)
        return INT8_CHANNEL if num_columns % block_of(kind)[0] else GGUF_LAYOUTS[TYPE_IDS[kind]]

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        tensor = f"{name}.weight"
        by_kernel = packed.layout in (INT8_CHANNEL, INT4)
        for begin, end in row_pieces(*shape, MAPPED_PIECE_ELEMENTS if by_kernel else PIECE_ELEMENTS):
            rows_RK = source.rows(tensor, shape, begin, end)
            if packed.layout == _FP8:
                scales_R1 = (rows_RK.float().abs().amax(1, keepdim=True) / _LARGEST_E4M3).clamp(min=1e-12)
                codes_RK = (rows_RK.float() / scales_R1).to(torch.float8_e4m3fn).view(torch.uint8)
                groups = -(-shape[1] // packed.layout.group_size)
                ops.pack_parts(packed, first_row + begin, codes_RK, scales_R1.expand(-1, groups).contiguous())
            elif by_kernel:
                ops.quantize_into(packed, first_row + begin, rows_RK)
            else:
                kind = k_mixture(name, self._model)
                ops.pack_gguf(packed, first_row + begin, encode(kind, rows_RK, ops.scale_search), TYPE_IDS[kind])
            source.release(tensor, begin, end)
