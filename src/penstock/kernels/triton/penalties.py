"""Repetition, frequency and presence penalties of a step in one launch, as sampling/penalties.py defines them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from penstock.kernels.triton.specialization import Specialization, specialization

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK: Final = 256


@triton.jit(do_not_specialize=["num_entries"])
def _penalties_kernel(
    logits_ptr, rows_ptr, ids_ptr, counts_ptr, penalties_ptr, num_entries, vocab, BLOCK: tl.constexpr
):
    """Bytes: an entry is 28 read and a logit read and written, scattered."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = entries < num_entries
    row = tl.load(rows_ptr + entries, mask=there, other=0)
    at = row * vocab + tl.load(ids_ptr + entries, mask=there, other=0)
    count = tl.load(counts_ptr + entries, mask=there, other=0.0)
    repetition = tl.load(penalties_ptr + row * 3, mask=there, other=1.0)
    frequency = tl.load(penalties_ptr + row * 3 + 1, mask=there, other=0.0)
    presence = tl.load(penalties_ptr + row * 3 + 2, mask=there, other=0.0)
    logit = tl.load(logits_ptr + at, mask=there, other=0.0)
    logit = tl.where(logit > 0.0, tl.div_rn(logit, repetition), logit * repetition)
    logit -= frequency * count
    logit -= tl.where(count > 0.0, presence, 0.0)
    tl.store(logits_ptr + at, logit, mask=there)


def apply_penalties(
    logits_RV: Tensor, rows_N: Tensor, token_ids_N: Tensor, counts_N: Tensor, penalties_R3: Tensor
) -> None:
    """See Ops.apply_penalties."""
    rows, vocab = logits_RV.shape
    num_entries = rows_N.shape[0]
    assert logits_RV.dtype is torch.float32 and logits_RV.is_contiguous(), (logits_RV.dtype, logits_RV.stride())
    assert rows_N.dtype is token_ids_N.dtype is torch.int64 and token_ids_N.shape == rows_N.shape
    assert counts_N.dtype is torch.float32 and counts_N.shape == rows_N.shape, (counts_N.dtype, counts_N.shape)
    assert penalties_R3.dtype is torch.float32 and penalties_R3.shape == (rows, 3) and penalties_R3.is_contiguous()
    if num_entries:
        _penalties_kernel[(triton.cdiv(num_entries, _BLOCK),)](
            logits_RV, rows_N, token_ids_N, counts_N, penalties_R3, num_entries, vocab, BLOCK=_BLOCK, num_warps=4
        )


def specializations() -> Iterator[Specialization]:
    """The one there is."""
    types = dict.fromkeys(("logits_ptr", "counts_ptr", "penalties_ptr"), "*fp32")
    types |= {"rows_ptr": "*i64", "ids_ptr": "*i64", "num_entries": "i32", "vocab": "i32"}
    yield specialization("penalties", _penalties_kernel, types, {"BLOCK": _BLOCK}, (4, 1), in_test=True)
