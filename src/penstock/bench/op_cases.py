"""The cases of the roofline: each op at the shapes of two models, what it must at least read, write and multiply."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.expert_stack import ExpertStack
from penstock.kernels.kv_layout import BLOCK_SLOTS, key_cache_shape, value_cache_shape
from penstock.kernels.ops import Ops, pack_linear
from penstock.kernels.quantized import (
    GGUF_LAYOUTS,
    INT8_CHANNEL,
    Q4_0,
    Q4_K,
    Q6_K,
    Q8_0,
    QuantizedLinear,
    empty_quantized,
    fp8,
    w4a16,
)
from penstock.kernels.reference.experts import expert_by_expert

BF16, F32 = torch.bfloat16, torch.float32
# Weights are used in turn from copies of this many bytes, so that none is in the cache when used again.
ROTATION_BYTES = 256 << 20


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder's layer and head."""

    name: str
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


LLAMA_1B = Model("llama3.2-1b", 2048, 8192, 32, 8, 64, 128256)
TINY = Model("tiny", 128, 352, 4, 2, 32, 2048)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    native, in_torch: run it once. nbytes: what must be read and written at least; is_from_memory: no cache has it.
    flops: multiplications and additions of a matrix product, of `dtype`; 0 where moving is all there is to it.
    """

    op: str
    shape: str
    native: Callable[[], object]
    in_torch: Callable[[], object]
    nbytes: int
    dtype: torch.dtype = BF16
    flops: int = 0
    is_from_memory: bool = False


def in_turn(call: Callable[[Any], object], weights: Sequence[object]) -> Callable[[], object]:
    """`call` with the next of `weights` each time, and the first again after the last."""
    turns = itertools.cycle(weights)
    return lambda: call(next(turns))


def linear_cases(ops: Ops, name: str, n: int, k: int, rows: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    """One weight at several numbers of rows; torch's linear over the same, plain."""
    nbytes = n * k * dtype.itemsize
    copies = max(1, min(64, ROTATION_BYTES // nbytes)) if nbytes > 1 << 20 else 1
    plain = [torch.randn(n, k).to(dtype) for _ in range(copies)]
    packed = [pack_linear(ops, [weight], dtype) for weight in plain]
    for m in rows:
        x = torch.randn(m, k).to(dtype)
        yield Case(
            "linear",
            f"{name} {m} x {k} -> {n} {'bf16' if dtype is BF16 else 'f32'}",
            in_turn(partial(ops.linear, x), packed),
            in_turn(partial(F.linear, x), plain),
            nbytes + (m * k + m * n) * dtype.itemsize,
            dtype,
            2 * m * n * k,
            is_from_memory=copies > 1,
        )


def linears(ops: Ops) -> Iterator[Case]:
    for name, n, k, rows in (
        ("qkv", LLAMA_1B.qkv, LLAMA_1B.hidden, (1, 8, 32, 64, 512)),
        ("o", LLAMA_1B.hidden, LLAMA_1B.hidden, (1, 64, 512)),
        ("gate_up", 2 * LLAMA_1B.inner, LLAMA_1B.hidden, (1, 8, 16, 32, 64, 512)),
        ("down", LLAMA_1B.hidden, LLAMA_1B.inner, (1, 8, 16, 32, 64, 512)),
        ("head", LLAMA_1B.vocabulary, LLAMA_1B.hidden, (1, 8, 64)),
    ):
        yield from linear_cases(ops, name, n, k, rows, BF16)
    yield from linear_cases(ops, "gate_up", 2 * LLAMA_1B.inner, LLAMA_1B.hidden, (1, 8, 64, 512), F32)
    yield from linear_cases(ops, "tiny gate_up", 2 * TINY.inner, TINY.hidden, (1, 32), BF16)
    yield from linear_cases(ops, "tiny head", TINY.vocabulary, TINY.hidden, (1, 32), BF16)


QUANTIZED = {
    "int8": INT8_CHANNEL,
    "Q8_0": GGUF_LAYOUTS[Q8_0],
    "Q4_0": GGUF_LAYOUTS[Q4_0],
    "Q4_K": GGUF_LAYOUTS[Q4_K],
    "Q6_K": GGUF_LAYOUTS[Q6_K],
    "w4a16": w4a16(128),
    "fp8": fp8(),
}


def quantized_linears(ops: Ops) -> Iterator[Case]:
    """Weights of random bits (but finite scales) in each kind of kernel; torch multiplies int8 of the same shape."""
    for kind, layout in QUANTIZED.items():
        for name, n, k, rows in (
            ("gate_up", 2 * LLAMA_1B.inner, LLAMA_1B.hidden, (1, 4, 8, 16, 32, 64, 512)),
            ("down", LLAMA_1B.hidden, LLAMA_1B.inner, (1, 8, 64, 512)),
        ):
            copies = max(1, ROTATION_BYTES // (n * k * layout.bits // 8))
            weights = [empty_quantized(n, k, layout, BF16) for _ in range(copies)]
            for weight in weights:
                weight.data.random_(0, 60)
            plain = [torch.randint(-127, 128, (n, k), dtype=torch.int8).T for _ in range(4)]
            for m in rows:
                x, x_int8 = torch.randn(m, k).to(BF16), torch.randint(-127, 128, (max(m, 2), k), dtype=torch.int8)
                yield Case(
                    "linear",
                    f"{name} {m} x {k} -> {n} {kind}",
                    in_turn(partial(ops.linear, x), weights),
                    in_turn(partial(torch._int_mm, x_int8), plain),
                    weights[0].nbytes + (m * k + m * n) * 2,
                    torch.int8 if layout.activations == "int8" else BF16,
                    2 * m * n * k,
                    is_from_memory=True,
                )


def gated_linears(ops: Ops) -> Iterator[Case]:
    """Beside the same in two passes, which is what torch has, too."""
    n, k = 2 * LLAMA_1B.inner, LLAMA_1B.hidden

    def in_two(x: Tensor, weight: QuantizedLinear) -> Tensor:
        return ops.silu_and_mul(ops.linear(x, weight))

    for kind in ("int8", "Q8_0", "Q4_0", "Q4_K"):
        weights = [empty_quantized(n, k, QUANTIZED[kind], BF16) for _ in range(4)]
        for weight in weights:
            weight.data.random_(0, 60)
        for m in (8, 64, 512):
            x = torch.randn(m, k).to(BF16)
            yield Case(
                "gated_linear",
                f"{m} x {k} -> {n} {kind}",
                in_turn(partial(ops.gated_linear, x), weights),
                in_turn(partial(in_two, x), weights),
                weights[0].nbytes + (m * k + m * n // 2) * 2,
                torch.int8,
                2 * m * n * k,
                is_from_memory=True,
            )


def mixtures(ops: Ops) -> Iterator[Case]:
    """A layer of Qwen3-30B-A3B with 32 of its 128 experts; torch goes from one expert to the next, in bf16."""
    hidden, inner, count, top_k = 2048, 768, 32, 8
    plain = [torch.randn(2 * inner, hidden).to(BF16) * 0.02, torch.randn(hidden, inner).to(BF16) * 0.02]

    def in_torch(_expert: int, rows_RD: Tensor) -> Tensor:
        gate, up = F.linear(rows_RD, plain[0]).chunk(2, 1)
        return F.linear(F.silu(gate) * up, plain[1])

    for kind, layout in {"bf16": None, **{kind: QUANTIZED[kind] for kind in ("Q8_0", "Q4_0", "Q4_K")}}.items():
        stacks = []
        for n, k in ((2 * inner, hidden), (hidden, inner)):
            weights = [
                ops.layouts.empty_linear(n, k, BF16)
                if layout is None
                else ops.layouts.empty_quantized(n, k, layout, BF16)
                for _ in range(count)
            ]
            for weight in weights:
                weight.data.fill_(0.02) if layout is None else weight.data.random_(0, 60)
            stacks.append(ExpertStack.of(weights))
        gate_up, down = stacks
        assert gate_up is not None
        assert down is not None
        for tokens in (1, 8, 64, 512):
            x, logits = torch.randn(tokens, hidden).to(BF16), torch.randn(tokens, count)
            chosen = ops.experts.choose(logits, top_k, is_renormalized=True)
            met = len(set(chosen[0].flatten().tolist()))
            yield Case(
                "experts",
                f"{tokens} x {top_k} of {count} x {inner} {kind}",
                partial(ops.experts.mlp_of_each, x, chosen, gate_up, down),
                partial(expert_by_expert, x, chosen[0], count, in_torch),
                met * (gate_up.weights[0].nbytes + down.weights[0].nbytes),
                torch.int8 if layout is not None else BF16,
                2 * tokens * top_k * 3 * hidden * inner,
                is_from_memory=True,
            )


def embeddings(ops: Ops, reference: Ops) -> Iterator[Case]:
    table = torch.randn(LLAMA_1B.vocabulary, LLAMA_1B.hidden).to(BF16)
    packed = pack_linear(ops, [table], BF16)
    for tokens in (1, 64, 512):
        ids = torch.randint(0, LLAMA_1B.vocabulary, (tokens,))
        yield Case(
            "embedding",
            f"{tokens} of {LLAMA_1B.vocabulary} x {LLAMA_1B.hidden}",
            partial(ops.embedding, ids, packed),
            partial(F.embedding, ids, table),
            2 * tokens * LLAMA_1B.hidden * 2,
        )
    yield Case(
        "pack_into",
        f"{LLAMA_1B.vocabulary} x {LLAMA_1B.hidden}",
        lambda: ops.pack_into(packed, 0, table),
        lambda: reference.pack_into(packed, 0, table[:8192]),
        2 * table.nbytes,
        is_from_memory=True,
    )


def elementwise(ops: Ops, reference: Ops) -> Iterator[Case]:
    for model, rows in ((TINY, 1), (TINY, 32), (LLAMA_1B, 1), (LLAMA_1B, 64), (LLAMA_1B, 512)):
        x, residual = torch.randn(2, rows, model.hidden).to(BF16).unbind()
        weight = torch.randn(model.hidden).to(BF16)
        gate_up = torch.randn(rows, 2 * model.inner).to(BF16)
        shape = f"{rows} x {model.hidden}"
        yield Case(
            "add_rms_norm",
            shape,
            partial(ops.rms_norm, x, residual, weight, 1e-5),
            partial(reference.rms_norm, x, residual, weight, 1e-5),
            4 * x.nbytes,
        )
        yield Case(
            "silu_and_mul",
            f"{rows} x {2 * model.inner}",
            partial(ops.silu_and_mul, gate_up),
            partial(reference.silu_and_mul, gate_up),
            gate_up.nbytes * 3 // 2,
        )


def ropes(ops: Ops, reference: Ops) -> Iterator[Case]:
    model = LLAMA_1B
    for tokens in (1, 64, 512):
        qkv = torch.randn(tokens, model.qkv).to(BF16)
        cos, sin = torch.rand(2, tokens, model.head_dim // 2).unbind()
        num_blocks = tokens // BLOCK_SLOTS + 1
        arguments = (num_blocks, model.num_kv_heads, model.head_dim, BF16)
        keys = torch.zeros(key_cache_shape(*arguments), dtype=BF16)
        values = torch.zeros(value_cache_shape(*arguments), dtype=BF16)
        call = (qkv, cos, sin, keys, values, torch.arange(tokens))
        yield Case(
            "rope_and_cache",
            f"{tokens} x {model.qkv}",
            partial(ops.rope_and_cache, *call),
            partial(reference.rope_and_cache, *call),
            2 * qkv.nbytes + cos.nbytes + sin.nbytes,
        )


@dataclass(frozen=True)
class Attention:
    """A paged call over equally long requests, and the dense tensors that torch takes for the same."""

    paged: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int]
    dense: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def build(model: Model, requests: int, new_tokens: int, context: int) -> Attention:
        num_blocks = requests * context // BLOCK_SLOTS
        arguments = (num_blocks, model.num_kv_heads, model.head_dim, BF16)
        keys = torch.randn(key_cache_shape(*arguments)).to(BF16)
        values = torch.randn(value_cache_shape(*arguments)).to(BF16)
        q = torch.randn(requests * new_tokens, model.num_heads, model.head_dim).to(BF16)
        tables = torch.randperm(num_blocks, dtype=torch.int32).view(requests, -1)
        lens = torch.full((requests,), context, dtype=torch.int32)
        starts = torch.arange(requests + 1, dtype=torch.int32) * new_tokens
        dense_kv = torch.randn(2, requests, model.num_kv_heads, context, model.head_dim).to(BF16)
        dense_q = torch.randn(requests, model.num_heads, new_tokens, model.head_dim).to(BF16)
        paged = (q, keys, values, tables, lens, starts, model.head_dim**-0.5, 0)
        return Attention(paged, (dense_q, dense_kv[0], dense_kv[1]))


def attentions(ops: Ops) -> Iterator[Case]:
    model = LLAMA_1B
    for requests, new_tokens, context in ((1, 1, 512), (1, 1, 16384), (8, 1, 1024), (64, 1, 512), (1, 512, 512)):
        call = Attention.build(model, requests, new_tokens, context)
        seen = context * new_tokens - new_tokens * (new_tokens - 1) // 2
        kv_bytes = 2 * requests * context * model.num_kv_heads * model.head_dim * 2
        yield Case(
            "paged_attention",
            f"{requests} x {new_tokens} of {context}",
            partial(ops.paged_attention, *call.paged),
            partial(F.scaled_dot_product_attention, *call.dense, is_causal=new_tokens > 1, enable_gqa=True),
            kv_bytes + 2 * call.dense[0].nbytes,
            flops=4 * requests * seen * model.num_heads * model.head_dim,
        )


def encoder_parts(ops: Ops, reference: Ops) -> Iterator[Case]:
    """A layer of all-MiniLM-L6-v2: hidden size 384, inner 1536, 12 heads of 32."""
    for texts, length in ((1, 16), (16, 128), (1, 512)):
        rows = texts * length
        x, residual = torch.randn(2, rows, 384).unbind()
        weight, bias = torch.randn(2, 384).unbind()
        inner, qkv = torch.randn(rows, 1536), torch.randn(rows, 3 * 384)
        starts = torch.arange(texts + 1, dtype=torch.int32) * length
        dense = qkv.view(texts, length, 3, 12, 32).permute(2, 0, 3, 1, 4)
        yield Case(
            "layer_norm",
            f"{rows} x 384",
            partial(ops.layer_norm, x, residual, weight, bias, 1e-12),
            partial(reference.layer_norm, x, residual, weight, bias, 1e-12),
            3 * x.nbytes,
        )
        yield Case(
            "gelu",
            f"{rows} x 1536",
            partial(ops.gelu, inner),
            partial(reference.gelu, inner),
            2 * inner.nbytes,
        )
        yield Case(
            "full_attention",
            f"{texts} texts of {length}",
            partial(ops.full_attention, qkv, starts, 12, 32**-0.5),
            partial(F.scaled_dot_product_attention, *dense),
            qkv.nbytes * 4 // 3,
            dtype=F32,
            flops=4 * texts * length * length * 384,
        )


def samplings(ops: Ops, reference: Ops) -> Iterator[Case]:
    for model, rows in ((TINY, 32), (LLAMA_1B, 1), (LLAMA_1B, 64)):
        logits = torch.randn(rows, model.vocabulary) * 3
        ids = torch.randint(0, model.vocabulary, (rows,))
        for name, temperature, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("temperature", 0.8, 0, 1.0),
            ("top-k 50, top-p 0.9", 0.8, 50, 0.9),
            ("top-p 0.9", 0.8, 0, 0.9),
        ):
            settings = (
                torch.full((rows,), temperature),
                torch.full((rows,), top_k, dtype=torch.int32),
                torch.full((rows,), top_p),
                torch.zeros(rows),
                torch.rand(rows, dtype=torch.float64),
            )
            yield Case(
                "sample",
                f"{rows} x {model.vocabulary} {name}",
                partial(ops.sample, logits, *settings),
                partial(reference.sample, logits, *settings),
                logits.nbytes,
            )
        masks = np.random.default_rng(0).integers(-(2**31), 2**31, (rows, -(-model.vocabulary // 32)), dtype=np.int32)
        masked = logits.clone()
        yield Case(
            "mask_logits",
            f"{rows} x {model.vocabulary}, half kept",
            partial(ops.mask_logits, masked, range(len(masked)), masks),
            partial(reference.mask_logits, masked, range(len(masked)), masks),
            logits.nbytes + masks.nbytes,
        )
        yield Case(
            "top_logprobs",
            f"{rows} x {model.vocabulary} of 5",
            partial(ops.top_logprobs, logits, ids, 5),
            partial(reference.top_logprobs, logits, ids, 5),
            logits.nbytes,
        )


def copies(ops: Ops, reference: Ops) -> Iterator[Case]:
    caches = [torch.zeros(256, 64 << 10, dtype=BF16)]
    sources, destinations = torch.arange(0, 64), torch.arange(64, 128)
    yield Case(
        "copy_blocks",
        "64 of 128 KB",
        lambda: ops.copy_blocks(caches, sources, destinations),
        lambda: reference.copy_blocks(caches, sources, destinations),
        2 * 64 * (128 << 10),
    )


def all_cases(ops: Ops, reference: Ops) -> Iterator[Case]:
    """Made one after another, so that only one op's weights are in memory."""
    yield from linears(ops)
    yield from quantized_linears(ops)
    yield from gated_linears(ops)
    yield from mixtures(ops)
    yield from embeddings(ops, reference)
    yield from elementwise(ops, reference)
    yield from ropes(ops, reference)
    yield from attentions(ops)
    yield from encoder_parts(ops, reference)
    yield from samplings(ops, reference)
    yield from copies(ops, reference)
