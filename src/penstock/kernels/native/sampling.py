"""Choosing tokens, and their log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from penstock._native import Kernels

_SETTING_DTYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)


def sample(kernels: Kernels, num_threads: int, logits_RV: Tensor, settings: tuple[Tensor, ...]) -> Tensor:
    """See Ops.sample. settings: temperature, top_k, top_p, min_p, uniform, each [R]."""
    rows, vocab = logits_RV.shape
    assert logits_RV.dtype is torch.float32 and logits_RV.is_contiguous(), (logits_RV.dtype, logits_RV.stride())
    for setting, dtype in zip(settings, _SETTING_DTYPES, strict=True):
        assert setting.dtype is dtype and setting.shape == (rows,), (setting.dtype, dtype, setting.shape)
    temperature, top_k, top_p, min_p, uniform = settings
    ids = torch.empty(rows, dtype=torch.int64)
    kernels.sample(
        logits_RV.data_ptr(), temperature.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(),
        uniform.data_ptr(), ids.data_ptr(), rows, vocab, num_threads,
    )  # fmt: skip
    return ids


def mask_logits(
    kernels: Kernels, num_threads: int, logits_RV: Tensor, rows: Sequence[int], masks_KW: NDArray[np.int32]
) -> None:
    """See Ops.mask_logits."""
    num_rows, vocab = logits_RV.shape
    assert logits_RV.dtype is torch.float32 and logits_RV.is_contiguous(), (logits_RV.dtype, logits_RV.stride())
    assert masks_KW.dtype == np.int32 and masks_KW.flags.c_contiguous, (masks_KW.dtype, masks_KW.strides)
    assert masks_KW.shape == (len(rows), -(-vocab // 32)), (masks_KW.shape, len(rows), vocab)
    assert all(0 <= row < num_rows for row in rows), (rows, num_rows)
    row_ids = np.array(rows, dtype=np.int64)
    kernels.mask_logits(logits_RV.data_ptr(), row_ids.ctypes.data, masks_KW.ctypes.data, len(rows), vocab, num_threads)


def top_logprobs(
    kernels: Kernels, num_threads: int, logits_RV: Tensor, ids_R: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See Ops.top_logprobs."""
    rows, vocab = _check(logits_RV, ids_R)
    assert 0 <= k <= vocab, (k, vocab)
    logprobs = torch.empty(rows)
    ranks = torch.empty(rows, dtype=torch.int32)
    top_ids = torch.empty((rows, k), dtype=torch.int64)
    top = torch.empty((rows, k))
    kernels.logprobs(
        logits_RV.data_ptr(), ids_R.data_ptr(), logprobs.data_ptr(), ranks.data_ptr(), top_ids.data_ptr(),
        top.data_ptr(), rows, vocab, k, num_threads,
    )  # fmt: skip
    return logprobs, ranks, top_ids, top


def _check(logits_RV: Tensor, ids_R: Tensor) -> tuple[int, int]:
    rows, vocab = logits_RV.shape
    assert logits_RV.dtype is torch.float32 and logits_RV.is_contiguous(), (logits_RV.dtype, logits_RV.stride())
    assert ids_R.dtype is torch.int64 and ids_R.shape == (rows,), (ids_R.dtype, ids_R.shape)
    return rows, vocab
