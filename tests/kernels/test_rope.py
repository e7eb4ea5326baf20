"""Rotary embedding with per-head norm and cache write against torch, per instruction set and element type."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels import ops as op_table
from penstock.kernels.kv_layout import key_cache_shape, keys_by_slot, value_cache_shape

REFERENCE = op_table.load("reference", 1)
DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(1, 1, 16), (4, 2, 64), (6, 3, 80), (3, 1, 18), (8, 8, 128), (2, 1, 256)]


class Case:
    """Arguments of rope_and_cache for random tokens in random slots, some of which are not written."""

    def __init__(self, heads: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> None:
        num_heads, num_kv_heads, dim = heads
        generator = torch.Generator().manual_seed(tokens + dim)
        self.qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * dim, generator=generator).to(dtype)
        angles = torch.rand(tokens, dim // 2, generator=generator) * 6.3
        self.cos, self.sin = angles.cos(), angles.sin()
        num_blocks = tokens // 16 + 2
        self.keys = torch.zeros(key_cache_shape(num_blocks, num_kv_heads, dim, dtype), dtype=dtype)
        self.values = torch.zeros(value_cache_shape(num_blocks, num_kv_heads, dim, dtype), dtype=dtype)
        self.slots = torch.randperm(num_blocks * 16, generator=generator)[:tokens]
        self.slots[::5] = -1
        weights = (1 + 0.2 * torch.randn(2, dim, generator=generator)).to(dtype)
        self.qk_norm = (weights[0], weights[1], 1e-6)

    def run(self, ops: op_table.Ops, has_norm: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(qkv, keys, values) as the op leaves them; the case itself stays as it is."""
        qkv, keys, values = self.qkv.clone(), self.keys.clone(), self.values.clone()
        qk_norm = self.qk_norm if has_norm else None
        ops.rope_and_cache(qkv, self.cos, self.sin, keys, values, self.slots, qk_norm)
        return qkv, keys, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("tokens", [1, 37, 300])
@pytest.mark.parametrize("heads", HEADS)
def test_equals_the_reference(
    native: op_table.Ops, heads: tuple[int, int, int], tokens: int, has_norm: bool, dtype: torch.dtype
) -> None:
    case = Case(heads, tokens, dtype)
    for got, wanted in zip(case.run(native, has_norm), case.run(REFERENCE, has_norm), strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
        elif has_norm:  # the last bit of a norm's scale can move a rounding
            torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-6)
            assert (got != wanted).float().mean() < 0.01
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(native: op_table.Ops, dtype: torch.dtype) -> None:
    case = Case((8, 2, 64), 200, dtype)
    expected = case.run(native, True)
    single = Case((8, 2, 64), 200, dtype)
    for token in range(200):
        part = slice(token, token + 1)
        qkv = single.qkv[part].clone()
        native.rope_and_cache(
            qkv, case.cos[part], case.sin[part], single.keys, single.values, case.slots[part], case.qk_norm
        )
        assert torch.equal(qkv, expected[0][part])
    assert torch.equal(single.keys, expected[1])
    assert torch.equal(single.values, expected[2])


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_caches_of_8_bits(
    native: op_table.Ops, heads: tuple[int, int, int], dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """The same codes and scales, but where float32 sums of the rotation differ in their last bit."""
    case = Case(heads, 40, dtype)
    num_blocks, num_kv_heads = case.keys.shape[:2]
    arguments = (num_blocks, num_kv_heads, heads[2], cache_dtype)
    case.keys = torch.zeros(key_cache_shape(*arguments), dtype=torch.int8).view(cache_dtype)
    case.values = torch.zeros(value_cache_shape(*arguments), dtype=torch.int8).view(cache_dtype)
    case.qkv[3, -1] = torch.inf
    case.qkv[4, heads[0] * heads[2] :] = 0
    (_, keys, values), (_, wanted_keys, wanted_values) = case.run(native, False), case.run(REFERENCE, False)
    assert torch.equal(values.view(torch.int8), wanted_values.view(torch.int8))
    different = keys.view(torch.int8) != wanted_keys.view(torch.int8)
    assert different.float().mean() < 0.01
    torch.testing.assert_close(keys_by_slot(keys), keys_by_slot(wanted_keys), rtol=0.13, atol=0.02)
