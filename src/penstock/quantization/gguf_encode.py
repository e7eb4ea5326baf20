"""Float rows to GGUF blocks: Q8_0 and Q4_0 by ggml's rule bit for bit, Q4_K and Q6_K by a search of the same kind.

The K types choose scale and minimum of a group by weighted least squares over several starting scales, as
ggml-quants.c does (make_qkx2_quants, make_qx_quants): large values weigh more. Scales are then rounded themselves, and
codes are taken anew for the rounded ones.

Shapes: R rows, N blocks, G groups of a block, E values of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.loader.gguf_file import block_of

_Q4_K_STEPS: Final = 21
_Q6_K_STEPS: Final = 19
_TINY: Final = 1e-15
_FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode(tensor_type: str, rows_RK: Tensor) -> Tensor:
    """Float rows -> uint8 [R, row bytes] of a type of ENCODABLE. K is a multiple of the type's block."""
    if tensor_type in _FLOATS:
        return rows_RK.to(_FLOATS[tensor_type]).contiguous().view(torch.uint8)
    items, _ = block_of(tensor_type)
    blocks = _ENCODERS[tensor_type](rows_RK.float().reshape(-1, items))
    return blocks.reshape(rows_RK.shape[0], -1)


def head_name(model: ModelConfig) -> str:
    """The linear that gives the logits; its rounding hurts most."""
    return "model.embed_tokens" if model.tie_word_embeddings else "lm_head"


def k_mixture(name: str, model: ModelConfig) -> str:
    """The type of a linear (named without suffix) in llama.cpp's Q4_K_M: the head and some of v and down are finer."""
    if name == head_name(model):
        return "Q6_K"
    if name.endswith(("v_proj", "down_proj")):
        layer, eighth = int(name.split(".")[2]), model.num_layers // 8
        if layer < eighth or layer >= 7 * model.num_layers // 8 or (layer - eighth) % 3 == 2:
            return "Q6_K"
    return "Q4_K"


def _halves(values_NV: Tensor) -> Tensor:
    """Numbers as the bytes of float16."""
    return values_NV.half().contiguous().view(torch.uint8)


def _round_away(values: Tensor) -> Tensor:
    """To the nearest whole number, halves away from zero, as C's roundf."""
    return (values.abs() + 0.5).floor().copysign(values)


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values == 0, 0.0, 1 / values)


def _q8_0(blocks: Tensor) -> Tensor:
    scales = blocks.abs().amax(1, keepdim=True) / 127
    codes = _round_away(blocks * _inverse(scales)).to(torch.int8)
    return torch.cat([_halves(scales), codes.view(torch.uint8)], 1)


def _q4_0(blocks: Tensor) -> Tensor:
    """The value of the largest magnitude becomes -8: codes have one more level on that side."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scales = largest / -8
    codes = (blocks.double() * _inverse(scales).double()).float().add_(8.5).trunc_().clamp_(0, 15).to(torch.uint8)
    return torch.cat([_halves(scales), codes[:, :16] | (codes[:, 16:] << 4)], 1)


def _scale_and_minimum(x_NGE: Tensor) -> tuple[Tensor, Tensor]:
    """x = scale * code - minimum with codes 0 to 15 and minimum >= 0: both [N, G, 1]."""
    weight = x_NGE.abs() + x_NGE.square().mean(2, keepdim=True).sqrt()
    low, high = x_NGE.amin(2, keepdim=True).clamp(max=0), x_NGE.amax(2, keepdim=True)
    sum_w, sum_x = weight.sum(2, keepdim=True), (weight * x_NGE).sum(2, keepdim=True)
    best_scale, best_low = (high - low).clamp(min=_TINY) / 15, low
    codes = ((x_NGE - low) / best_scale).round_().clamp_(0, 15)
    best_error = (weight * (best_scale * codes + low - x_NGE).square_()).sum(2, keepdim=True)
    for step in range(_Q4_K_STEPS):
        span = (high - best_low).clamp(min=_TINY)
        codes = ((x_NGE - best_low) * ((14 + 0.1 * step) / span)).round_().clamp_(0, 15)
        weighted = weight * codes
        sum_l, sum_l2 = weighted.sum(2, keepdim=True), (weighted * codes).sum(2, keepdim=True)
        sum_xl = (weighted * x_NGE).sum(2, keepdim=True)
        determinant = sum_w * sum_l2 - sum_l.square()
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        scale = torch.where(above, sum_xl / sum_l2.clamp(min=_TINY), scale)
        new_low = new_low.clamp(max=0)
        error = (weight * codes.mul_(scale).add_(new_low).sub_(x_NGE).square_()).sum(2, keepdim=True)
        better = (determinant > 0) & (error < best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, new_low, best_low)
        best_error = torch.where(better, error, best_error)
    return best_scale, -best_low


def _q4_k(blocks: Tensor) -> Tensor:
    x_NGE = blocks.view(-1, 8, 32)
    scales, minimums = (part.squeeze(2) for part in _scale_and_minimum(x_NGE))
    d, scale_codes = _six_bits(scales)
    d_min, minimum_codes = _six_bits(minimums)
    rounded = (d.half().float() * scale_codes)[:, :, None]
    offset = (d_min.half().float() * minimum_codes)[:, :, None]
    codes = ((x_NGE + offset) * _inverse(rounded)).round_().clamp_(0, 15).to(torch.uint8)
    low, high = scale_codes.to(torch.uint8), minimum_codes.to(torch.uint8)
    packed = torch.cat(
        [
            (low[:, :4] & 63) | ((low[:, 4:] >> 4) << 6),
            (high[:, :4] & 63) | ((high[:, 4:] >> 4) << 6),
            (low[:, 4:] & 15) | ((high[:, 4:] & 15) << 4),
        ],
        1,
    )
    nibbles = codes.view(-1, 4, 2, 32)
    return torch.cat([_halves(d), _halves(d_min), packed, (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).flatten(1)], 1)


def _six_bits(values_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers >= 0 as a scale [N, 1] times codes 0 to 63 [N, G]."""
    d = values_NG.amax(1, keepdim=True) / 63
    return d, (values_NG * _inverse(d)).round().clamp(0, 63)


def _symmetric_scale(x_NGE: Tensor) -> Tensor:
    """x = scale * code with codes -32 to 31: [N, G, 1]."""
    weight = x_NGE.square()
    largest = x_NGE.gather(2, x_NGE.abs().argmax(2, keepdim=True))
    usable = torch.where(largest.abs() < _TINY, 1.0, largest)
    best_scale = torch.zeros_like(largest)
    best = torch.full_like(largest, -1.0)
    for step in range(_Q6_K_STEPS):
        codes = (x_NGE * (-(32 + 0.1 * (step - 9)) / usable)).round_().clamp_(-32, 31)
        weighted = weight * codes
        sum_xl, sum_l2 = (weighted * x_NGE).sum(2, keepdim=True), (weighted * codes).sum(2, keepdim=True)
        gained = sum_xl.square() / sum_l2.clamp(min=_TINY)
        better = (sum_l2 > 0) & (gained > best)
        best_scale = torch.where(better, sum_xl / sum_l2.clamp(min=_TINY), best_scale)
        best = torch.where(better, gained, best)
    return torch.where(largest.abs() < _TINY, 0.0, best_scale)


def _q6_k(blocks: Tensor) -> Tensor:
    x_NGE = blocks.view(-1, 16, 16)
    scales = _symmetric_scale(x_NGE).squeeze(2)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = largest / -128
    scale_codes = (scales * _inverse(d)).round().clamp(-128, 127)
    rounded = (d.half().float() * scale_codes)[:, :, None]
    codes = ((x_NGE * _inverse(rounded)).round_().clamp_(-32, 31) + 32).to(torch.uint8).view(-1, 2, 128)
    nibbles = (codes & 15).view(-1, 2, 2, 64)
    low = nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)
    pairs = (codes >> 4).view(-1, 2, 4, 32)
    high = pairs[:, :, 0] | (pairs[:, :, 1] << 2) | (pairs[:, :, 2] << 4) | (pairs[:, :, 3] << 6)
    signed = scale_codes.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), signed, _halves(d)], 1)


_ENCODERS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_K": _q4_k, "Q6_K": _q6_k}
ENCODABLE: Final = (*_FLOATS, *_ENCODERS)
