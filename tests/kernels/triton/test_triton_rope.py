"""Rotary embedding with the cache write, and block copies, against torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels import kv_layout as cpu_layout
from penstock.kernels.reference import attention as torch_attention
from penstock.kernels.triton import kv_layout, rope

NUM_BLOCKS = 3


def caches(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = kv_layout.cache_shape(NUM_BLOCKS, num_kv_heads, head_dim, dtype)
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 64), ((9, 3), 80), ((1, 1), 18), ((16, 1), 128)])
@pytest.mark.parametrize("normed", [False, True])
def test_equals_the_reference(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, heads: tuple[int, int], head_dim: int, normed: bool
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    (num_heads, num_kv_heads), tokens = heads, 5
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.rand(tokens, head_dim // 2, generator=generator) * 6
    slots = torch.tensor([3, 16 * 2 + 15, -1, 16, 0])
    weights = torch.rand(2, head_dim, generator=generator).to(dtype)
    qk_norm = (weights[0], weights[1], 1e-6) if normed else None
    kept = cache_dtype or dtype

    expected = qkv.clone()
    cpu = cpu_layout.key_cache_shape(NUM_BLOCKS, num_kv_heads, head_dim, kept)
    wanted_keys = torch.zeros(cpu, dtype=kept)
    wanted_values = torch.zeros(cpu_layout.value_cache_shape(NUM_BLOCKS, num_kv_heads, head_dim, kept), dtype=kept)
    rotary = (angles.cos(), angles.sin())
    torch_attention.rope_and_cache(expected, *rotary, wanted_keys, wanted_values, slots, qk_norm)
    keys, values = caches(num_kv_heads, head_dim, kept)
    rope.rope_and_cache(qkv, *rotary, keys, values, slots, qk_norm)

    bound = 1e-5 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(qkv, expected, rtol=bound, atol=bound)
    if cache_dtype is not None:
        bound = 0.03 if cache_dtype == torch.int8 else 0.3  # a step of the code, at a tie
    for got, wanted in (
        (keys, cpu_layout.keys_by_slot(wanted_keys)),
        (values, cpu_layout.values_by_slot(wanted_values)),
    ):
        plain = kv_layout.by_slot(got, head_dim).float()
        torch.testing.assert_close(plain, wanted.float(), rtol=bound, atol=bound)
        assert ((plain - wanted.float()).abs() > 2e-2).float().mean() < 0.02


def test_what_is_not_finite_is_kept_as_a_scale_that_is_nan() -> None:
    qkv = torch.ones(2, 3 * 16)
    qkv[0, 20], qkv[1, 40] = torch.nan, torch.inf
    keys, values = caches(1, 16, torch.int8)
    ones, zeros = torch.ones(2, 8), torch.zeros(2, 8)
    rope.rope_and_cache(qkv, ones, zeros, keys, values, torch.tensor([0, 1]))
    assert kv_layout.codes_and_scales(keys, 16)[1].flatten()[:3].isnan().tolist() == [True, False, False]
    assert kv_layout.codes_and_scales(values, 16)[1].flatten()[:3].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_copy_blocks(dtype: torch.dtype) -> None:
    sizes = [kv_layout.cache_shape(6, 2, 48, dtype), (6, 16, 24)]
    tensors = [torch.randint(-99, 99, size).to(dtype) for size in sizes]
    copies = [tensor.clone() for tensor in tensors]
    sources, destinations = torch.tensor([1, 1, 4]), torch.tensor([0, 3, 5])
    torch_attention.copy_blocks(copies, sources, destinations)
    rope.copy_blocks(tensors, sources, destinations)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
    rope.copy_blocks(tensors, sources[:0], destinations[:0])
