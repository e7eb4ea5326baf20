"""Float rows to GGUF blocks: Q8_0 and Q4_0 by ggml's rule bit for bit, the K types by a search of the same kind.

The K types choose scale and minimum of a group by a search (ScaleSearch) in which large values weigh more, and so do
inputs that are large in calibration data (an importance matrix). Scales are then rounded themselves, and codes are
taken anew for the rounded ones.

Shapes: R rows, N blocks, G groups of a block, E values of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.kernels.ops import ScaleSearch
from penstock.loader.gguf_file import block_of

_FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A mixture's type of most matrices, and of those whose rounding hurts more; the head is always Q6_K.
MIXTURES: Final = {
    "q2_k": ("Q2_K", "Q4_K"), "q3_k_m": ("Q3_K", "Q5_K"), "q4_k_m": ("Q4_K", "Q6_K"), "q5_k_m": ("Q5_K", "Q6_K"),
    "q6_k": ("Q6_K", "Q6_K"),
}  # fmt: skip


def encode(tensor_type: str, rows_RK: Tensor, search: ScaleSearch, importance_K: Tensor | None = None) -> Tensor:
    """Float rows -> uint8 [R, row bytes] of a type of ENCODABLE. K is a multiple of the type's block.

    search: of an op table. importance_K: the mean square of each input, float32; left out, all are alike.
    """
    if tensor_type in _FLOATS:
        return float_bytes(tensor_type, rows_RK)
    items, _ = block_of(tensor_type)
    blocks = rows_RK.float().reshape(-1, items)
    weights = None
    if importance_K is not None:
        weights = importance_K.view(1, -1).expand(rows_RK.shape).reshape(-1, items)
    return _ENCODERS[tensor_type](search, blocks, weights).reshape(rows_RK.shape[0], -1)


def float_bytes(tensor_type: str, values_RK: Tensor) -> Tensor:
    """As encode: of F32, F16 or BF16."""
    return values_RK.to(_FLOATS[tensor_type]).contiguous().view(torch.uint8)


def head_name(model: ModelConfig) -> str:
    """The linear that gives the logits; its rounding hurts most."""
    return "model.embed_tokens" if model.tie_word_embeddings else "lm_head"


def is_router(name: str) -> bool:
    """Whether a linear decides which experts a token meets: it is small, and never rounded."""
    return name.endswith((".gate", ".shared_expert_gate"))


def k_mixture(name: str, model: ModelConfig, mixture: str = "q4_k_m") -> str:
    """The type of a linear (named without suffix): the head and some of v and down are finer, as llama.cpp has it."""
    coarse, fine = MIXTURES[mixture]
    if name == head_name(model):
        return "Q6_K"
    if name.endswith(("v_proj", "down_proj", ".w2")):  # w2: Mixtral's down
        layer, eighth = int(name.split(".")[2]), model.num_layers // 8
        if layer < eighth or layer >= 7 * model.num_layers // 8 or (layer - eighth) % 3 == 2:
            return fine
    return coarse


def _halves(values_NV: Tensor) -> Tensor:
    """Numbers as the bytes of float16."""
    return values_NV.half().contiguous().view(torch.uint8)


def _round_away(values: Tensor) -> Tensor:
    """To the nearest whole number, halves away from zero, as C's roundf."""
    return (values.abs() + 0.5).floor().copysign(values)


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values == 0, 0.0, 1 / values)


def _q8_0(
    _search: ScaleSearch, blocks: Tensor, _weights: Tensor | None
) -> Tensor:  # 8 bits lose nothing worth weighing
    scales = blocks.abs().amax(1, keepdim=True) / 127
    codes = _round_away(blocks * _inverse(scales)).to(torch.int8)
    return torch.cat([_halves(scales), codes.view(torch.uint8)], 1)


def _q4_0(search: ScaleSearch, blocks: Tensor, weights: Tensor | None) -> Tensor:
    """The value of the largest magnitude becomes -8: codes have one more level on that side."""
    if weights is None:
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scales = largest / -8
        codes = (blocks.double() * _inverse(scales).double()).float().add_(8.5).trunc_().clamp_(0, 15)
    else:
        groups = blocks[:, None]
        scales = search.symmetric(groups, _emphasis(groups, weights[:, None]), 8).half().float()
        codes = (blocks * _inverse(scales)).round_().clamp_(-8, 7).add_(8)
    codes = codes.to(torch.uint8)
    return torch.cat([_halves(scales), codes[:, :16] | (codes[:, 16:] << 4)], 1)


def _emphasis(x_NGE: Tensor, weights: Tensor | None) -> Tensor:
    """How much the error of each value counts: more for large ones, and for inputs that are large."""
    if weights is None:
        return x_NGE.abs() + x_NGE.square().mean(2, keepdim=True).sqrt()
    mean = x_NGE.square().mean((1, 2), keepdim=True)
    return weights.view(x_NGE.shape) * (mean + x_NGE.square()).sqrt()


def _affine(search: ScaleSearch, x_NGE: Tensor, top: int, top_scale: int, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Types with minimums -> codes [N, 256] uint8, both float16 scales as bytes, both codes [N, G] uint8."""
    scales, minimums = search.affine(x_NGE, _emphasis(x_NGE, weights), top)
    d, scale_codes = _whole_multiples(scales, top_scale)
    d_min, minimum_codes = _whole_multiples(minimums, top_scale)
    rounded = (d.half().float() * scale_codes)[:, :, None]
    offset = (d_min.half().float() * minimum_codes)[:, :, None]
    codes = ((x_NGE + offset) * _inverse(rounded)).round_().clamp_(0, top).to(torch.uint8).flatten(1)
    return codes, torch.cat([_halves(d), _halves(d_min)], 1), scale_codes.to(torch.uint8), minimum_codes.to(torch.uint8)


def _whole_multiples(values_NG: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Numbers >= 0 as a scale [N, 1] times codes 0 to `top` [N, G]."""
    d = values_NG.amax(1, keepdim=True) / top
    return d, (values_NG * _inverse(d)).round().clamp(0, top)


def _six_bit_scales(low: Tensor, high: Tensor) -> Tensor:
    """Eight scales and minimums of six bits each -> 12 bytes."""
    return torch.cat(
        [
            (low[:, :4] & 63) | ((low[:, 4:] >> 4) << 6),
            (high[:, :4] & 63) | ((high[:, 4:] >> 4) << 6),
            (low[:, 4:] & 15) | ((high[:, 4:] & 15) << 4),
        ],
        1,
    )


def _fields(codes_NK: Tensor, bits: int, run: int) -> Tensor:
    """Codes of `bits` bits: of each (8 / bits) runs of values the first fill the lowest bits of a run of bytes."""
    count = 8 // bits
    runs = codes_NK.view(codes_NK.shape[0], -1, count, run)
    packed = runs[:, :, 0].clone()
    for index in range(1, count):
        packed |= runs[:, :, index] << (bits * index)
    return packed.flatten(1)


def _q2_k(search: ScaleSearch, blocks: Tensor, weights: Tensor | None) -> Tensor:
    codes, halves, scales, minimums = _affine(search, blocks.view(-1, 16, 16), 3, 15, weights)
    return torch.cat([scales | (minimums << 4), _fields(codes, 2, 32), halves], 1)


def _q4_k(search: ScaleSearch, blocks: Tensor, weights: Tensor | None) -> Tensor:
    codes, halves, scales, minimums = _affine(search, blocks.view(-1, 8, 32), 15, 63, weights)
    return torch.cat([halves, _six_bit_scales(scales, minimums), _fields(codes, 4, 32)], 1)


def _q5_k(search: ScaleSearch, blocks: Tensor, weights: Tensor | None) -> Tensor:
    codes, halves, scales, minimums = _affine(search, blocks.view(-1, 8, 32), 31, 63, weights)
    high = _fields(codes >> 4, 1, 32)
    return torch.cat([halves, _six_bit_scales(scales, minimums), high, _fields(codes & 15, 4, 32)], 1)


def _symmetric(
    search: ScaleSearch, blocks: Tensor, half: int, top_scale: int, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Types of 16 groups without minimums -> codes [N, 256] >= 0, the float16 scale as bytes, signed codes [N, 16]."""
    x_NGE = blocks.view(-1, 16, 16)
    weight = x_NGE.square() if weights is None else _emphasis(x_NGE, weights)
    scales = search.symmetric(x_NGE, weight, half)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = largest / -top_scale
    scale_codes = (scales * _inverse(d)).round().clamp(-top_scale, top_scale - 1)
    rounded = (d.half().float() * scale_codes)[:, :, None]
    codes = ((x_NGE * _inverse(rounded)).round_().clamp_(-half, half - 1) + half).to(torch.uint8)
    return codes.flatten(1), _halves(d), scale_codes.to(torch.int8)


def _q3_k(search: ScaleSearch, blocks: Tensor, weights: Tensor | None) -> Tensor:
    codes, d, signed = _symmetric(search, blocks, 4, 32, weights)
    scales = (signed + 32).to(torch.uint8)
    packed = torch.cat([_fields(scales & 15, 4, 8), _fields(scales >> 4, 2, 4)], 1)
    return torch.cat([_fields(codes >> 2, 1, 32), _fields(codes & 3, 2, 32), packed, d], 1)


def _q6_k(search: ScaleSearch, blocks: Tensor, weights: Tensor | None) -> Tensor:
    codes, d, signed = _symmetric(search, blocks, 32, 128, weights)
    low, high = _fields(codes & 15, 4, 64), _fields(codes >> 4, 2, 32)
    return torch.cat([low, high, signed.view(torch.uint8), d], 1)


_ENCODERS: Final[dict[str, Callable[[ScaleSearch, Tensor, Tensor | None], Tensor]]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
ENCODABLE: Final = (*_FLOATS, *_ENCODERS)
