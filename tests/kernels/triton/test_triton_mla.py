"""Latent attention against torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.triton import mla


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_heads", [1, 16, 20])
def test_equals_attention_in_the_latent_space(num_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_heads)
    lengths = [1, 16, 300]
    blocks = [-(-length // 16) for length in lengths]
    cache = torch.full((sum(blocks) + 1, 16, 576), torch.nan, dtype=dtype)
    ids = torch.randperm(sum(blocks), generator=generator).int().split(blocks)
    tables = torch.full((3, max(blocks)), 2**30, dtype=torch.int32)
    contexts = [torch.randn(length, 576, generator=generator).to(dtype) for length in lengths]
    for row, context in enumerate(contexts):
        tables[row, : len(ids[row])] = ids[row]
        position = torch.arange(len(context))
        slots = ids[row].long()[position // 16] * 16 + position % 16
        if row < 2:
            mla.mla_cache(context, cache, slots)
        else:
            cache.view(-1, 576)[slots] = context
    unwritten = cache.clone()
    mla.mla_cache(contexts[0], cache, torch.tensor([-1]))
    assert torch.equal(cache.isnan(), unwritten.isnan())

    q = torch.randn(3, num_heads, 576, generator=generator).to(dtype)
    starts = torch.arange(4, dtype=torch.int32)
    got = mla.mla_decode(q, cache, (tables, torch.tensor(lengths, dtype=torch.int32), starts), 0.07, 512)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for row, context in enumerate(contexts):
        weights = (q[row].float() @ context.float().T * 0.07).softmax(-1)
        torch.testing.assert_close(got[row].float(), weights @ context[:, :512].float(), rtol=bound, atol=bound)
