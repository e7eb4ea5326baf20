"""Small integers out of the words that checkpoints pack them in, and groups as the kernels want them."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP_SIZES = (256, 128, 64, 32, 16)
_WORD = 0xFFFFFFFF


def unpack_words(words_WN: Tensor, bits: int, count: int) -> Tensor:
    """Codes packed along the first dimension: int32 [W, N] -> uint8 [count, N].

    Code i lies in bits [i * bits, (i + 1) * bits) of the little-endian stream that the words of a column are.
    """
    assert words_WN.dtype == torch.int32, words_WN.dtype
    if bits == 3:
        return _unpack_three(words_WN)[:count]
    per_byte = 8 // bits
    bytes_W4N = words_WN.contiguous().view(-1).view(torch.uint8).view(*words_WN.shape, 4).transpose(1, 2)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[None, None, :, None]
    codes = (bytes_W4N[:, :, None, :] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words_WN.shape[0] * 4 * per_byte, words_WN.shape[1])[:count]


def _unpack_three(words_WN: Tensor) -> Tensor:
    """32 codes of three bits in three words; two of them cross from one word to the next."""
    triples = (words_WN.long() & _WORD).view(-1, 3, words_WN.shape[1])
    codes = []
    for index in range(32):
        word, shift = divmod(3 * index, 32)
        code = triples[:, word] >> shift
        if shift > 29:
            code = code | (triples[:, word + 1] << (32 - shift))
        codes.append((code & 7).to(torch.uint8))
    return torch.stack(codes, 1).flatten(0, 1)


def pack_words(codes_KN: Tensor, bits: int) -> Tensor:
    """The inverse of unpack_words: uint8 [K, N], K a multiple of 32, to int32 [K * bits / 32, N]."""
    runs = codes_KN.view(-1, 32, codes_KN.shape[1])
    words = torch.zeros(runs.shape[0], bits, runs.shape[2], dtype=torch.int64)
    for index in range(32):
        word, shift = divmod(bits * index, 32)
        code = runs[:, index].long()
        words[:, word] |= code << shift & _WORD
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    signed = torch.where(words > _WORD >> 1, words - _WORD - 1, words)
    return signed.to(torch.int32).flatten(0, 1)


def kernel_group(group_size: int) -> int:
    """The largest group size of the kernels that divides a checkpoint's (0: a whole row)."""
    return next(size for size in _GROUP_SIZES if group_size % size == 0)


def spread_groups(values_RG: Tensor, group_size: int, num_columns: int) -> Tensor:
    """A value for each group (of `group_size` inputs; 0: one for all) -> one for each group of the kernels' size."""
    target = kernel_group(group_size)
    wanted = -(-num_columns // target)
    if not group_size:
        return values_RG.expand(-1, wanted).contiguous()
    return values_RG.repeat_interleave(group_size // target, dim=1)[:, :wanted].contiguous()
