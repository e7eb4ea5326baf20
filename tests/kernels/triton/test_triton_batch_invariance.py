"""Batch-invariant mode: every op gives a row the same bits alone, among others, and in another place; so does a model.

In the interpreter, which shows that nothing but a row's own request decides in which order it is summed. That the
compiled kernels keep it follows from there being one tile for any number of rows (linear.py); not measured on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from test_triton_attention import Sequences, Shape

from checkpoints import write_checkpoint
from penstock.base.errors import ConfigError
from penstock.config.resolve import EngineOptions, MachineFacts, resolve_engine_config
from penstock.kernels import ops as op_table
from penstock.kernels.kv_layout import BLOCK_SLOTS
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import GGUF_LAYOUTS, INT4, W8A8, WeightLayout, fp8
from penstock.kernels.triton import configs, kv_layout, moe, packing, weights
from penstock.kernels.triton.linear import linear
from penstock.loader import read_model_config
from whole_engine import build, engine_config, request, run

OPS = op_table.load("triton", 1, batch_invariant=True)
BF16, F32 = torch.bfloat16, torch.float32
NUM_ROWS = 70  # over the edge of a tile of 64, which is what products are computed in
FEW_ROWS = 20  # of ops that take a row at a time
Rows = Callable[[torch.Tensor], torch.Tensor]


def weight_of(kind: WeightLayout | torch.dtype, n: int, k: int) -> object:
    if isinstance(kind, torch.dtype):
        weight = weights.empty_linear(n, k, kind, "cpu")
        packing.pack_into(weight, 0, torch.randn(n, k))
        return weight
    quantized = weights.empty_quantized(n, k, kind, BF16, "cpu", 90)
    if kind.values != "integer":
        packing.pack_parts(quantized, 0, torch.randint(0, 100, (n, k), dtype=torch.uint8), torch.rand(n, k // 256))
        return quantized
    packing.quantize_into(quantized, 0, torch.randn(n, k))
    return quantized


def linears() -> dict[str, Rows]:
    cases: dict[str, Rows] = {}
    for name, kind in {"bf16": BF16, "f32": F32, "int4": INT4, "q8_0": GGUF_LAYOUTS[8], "w8a8": W8A8}.items():
        weight, x = weight_of(kind, 90, 512), torch.randn(NUM_ROWS, 512)
        x = x if kind is F32 else x.to(BF16)
        cases[f"linear {name}"] = lambda ids, x=x, weight=weight: OPS.linear(x[ids], weight)
    weight, x = weight_of(INT4, 20, 64), torch.randn(NUM_ROWS, 64)
    cases["linear int4 of float32"] = lambda ids: OPS.linear(x[ids], weight, None, F32)
    return cases


def row_ops() -> dict[str, Rows]:
    x, y = torch.randn(FEW_ROWS, 200).to(BF16), torch.randn(FEW_ROWS, 200).to(BF16)
    w, bias = torch.randn(200).to(BF16), torch.randn(200).to(BF16)
    table, gate_up = weight_of(BF16, 50, 64), weight_of(BF16, 96, 200)
    token_ids = torch.arange(FEW_ROWS) % 50
    logits = torch.randn(FEW_ROWS, 100) * 3
    temperature, uniform = torch.linspace(0, 2, FEW_ROWS), torch.rand(FEW_ROWS, dtype=torch.float64)
    top_k = torch.arange(FEW_ROWS, dtype=torch.int32) % 9
    top_p, min_p = torch.linspace(0.5, 1, FEW_ROWS), torch.linspace(0, 0.1, FEW_ROWS)
    parameters = (logits, temperature, top_k, top_p, min_p, uniform)
    masks = np.random.default_rng(1).integers(-(2**31), 2**31, (FEW_ROWS, 4), dtype=np.int64).astype(np.int32)

    def masked(ids: torch.Tensor) -> torch.Tensor:
        rows = logits[ids].clone()
        OPS.mask_logits(rows, list(range(len(ids))), masks[ids.numpy()])
        return rows

    def summed(ids: torch.Tensor) -> torch.Tensor:
        residual = y[ids].clone()
        return torch.cat([OPS.rms_norm(x[ids].clone(), residual, w, 1e-5), residual], dim=1)

    return {
        "rms_norm": lambda ids: OPS.rms_norm(x[ids], None, w, 1e-5),
        "rms_norm of a sum": summed,
        "layer_norm": lambda ids: OPS.layer_norm(x[ids], y[ids], w, bias, 1e-5),
        "gelu": lambda ids: OPS.gelu(x[ids]),
        "silu_and_mul": lambda ids: OPS.silu_and_mul(x[ids]),
        "gated_linear": lambda ids: OPS.gated_linear(x[ids], gate_up),
        "embedding": lambda ids: OPS.embedding(token_ids[ids], table),
        "mask_logits": masked,
        "sample": lambda ids: OPS.sample(*(part[ids] for part in parameters))[:, None],
        "top_logprobs": lambda ids: torch.cat(
            [part.view(len(ids), -1).double() for part in OPS.top_logprobs(logits[ids], token_ids[ids], 4)], dim=1
        ),
    }


def rope_case() -> Rows:
    """What is left in a token's own slot, and its rotated queries."""
    heads, groups, size = 4, 2, 32
    qkv = torch.randn(FEW_ROWS, (heads + 2 * groups) * size).to(BF16)
    angles = torch.randn(FEW_ROWS, size // 2)

    def rows(ids: torch.Tensor) -> torch.Tensor:
        shape = kv_layout.cache_shape(FEW_ROWS // BLOCK_SLOTS + 1, groups, size, BF16)
        keys, values, own = torch.zeros(shape, dtype=BF16), torch.zeros(shape, dtype=BF16), qkv[ids].clone()
        OPS.rope_and_cache(own, angles[ids].cos(), angles[ids].sin(), keys, values, ids.clone())
        written = [kv_layout.by_slot(cache, size).flatten(0, 1)[ids].flatten(1) for cache in (keys, values)]
        return torch.cat([own, *written], dim=1)

    return rows


def experts_case() -> Rows:
    """Not of the op table yet: experts among whose tokens a row is one of few or of many."""
    x = torch.randn(NUM_ROWS, 128).to(BF16)
    router = torch.randn(NUM_ROWS, 4)
    gate_up, down = weight_of(INT4, 4 * 64, 128), weight_of(INT4, 4 * 128, 32)

    def rows(ids: torch.Tensor) -> torch.Tensor:
        chosen = moe.choose_experts(router[ids], 2, renormalize=True)
        return moe.experts_mlp(x[ids], chosen, gate_up, down, 4, OPS.silu_and_mul, row_invariant=True)

    return rows


def cases() -> dict[str, Rows]:
    torch.manual_seed(5)
    return {**linears(), **row_ops(), "rope_and_cache": rope_case(), "experts": experts_case()}


CASES = cases()


@pytest.mark.parametrize("name", list(CASES))
def test_a_row_has_the_same_bits_alone_among_others_and_elsewhere(name: str) -> None:
    rows = CASES[name]
    count = NUM_ROWS if name.startswith(("linear", "experts")) else FEW_ROWS
    everything = torch.arange(count)
    together = rows(everything)
    assert not torch.equal(together[0], together[1])
    for ids in (everything.flip(0), everything[:1], everything[-1:], torch.tensor([11, 3, count - 2]), everything[:17]):
        assert torch.equal(rows(ids), together[ids])


def test_no_op_that_computes_rows_is_left_out() -> None:
    """What only packs, unpacks or moves is; attention has tests of its own below."""
    no_rows = {"pack_into", "pack_linear", "pack_parts", "pack_gguf", "quantize_into", "dequantize", "copy_blocks"}
    no_rows |= {"apply_penalties"}  # an element of the logits each
    attention = {"paged_attention", "full_attention"}
    public = {name for name in dir(Ops) if not name.startswith("_") and callable(getattr(Ops, name))}
    assert public - no_rows - attention == {name.split(" ")[0] for name in CASES} - {"experts"}


def test_attention_depends_neither_on_the_batch_nor_on_chunks() -> None:
    lengths = [300, 20, 30, 1]
    sequences = Sequences(Shape(4, 1, 32, BF16), lengths, 3)
    for index, length in enumerate(lengths):
        sequences.write(index, length)

    def attend(chunks: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        q = torch.cat([sequences.qkv[index][begin:end, : 4 * 32] for index, begin, end in chunks]).view(-1, 4, 32)
        counts = torch.tensor([0] + [end - begin for _, begin, end in chunks], dtype=torch.int32)
        tables = sequences.tables[[index for index, _, _ in chunks]]
        lens = torch.tensor([end for _, _, end in chunks], dtype=torch.int32)
        caches = (sequences.keys, sequences.values)
        out = OPS.paged_attention(q, *caches, tables, lens, counts.cumsum(0).int(), 32**-0.5)
        return list(out.split(counts[1:].tolist()))

    step = [(0, 299, 300), (1, 0, 20), (2, 3, 30), (3, 0, 1)]
    together = attend(step)
    for chunk, one in zip(step, together, strict=True):
        assert torch.equal(attend([chunk])[0], one)
    assert torch.equal(torch.cat([attend([(2, at, at + 9)])[0] for at in range(3, 30, 9)]), together[2])


def test_full_attention_depends_on_a_text_alone() -> None:
    qkv = torch.randn(100, 3 * 2 * 32).to(BF16)
    starts = torch.tensor([0, 7, 50, 100], dtype=torch.int32)
    together = OPS.full_attention(qkv, starts, 2, 0.2)
    alone = OPS.full_attention(qkv[7:50].contiguous(), torch.tensor([0, 43], dtype=torch.int32), 2, 0.2)
    assert torch.equal(together[7:50], alone)


@pytest.mark.parametrize("kind", [BF16, F32, W8A8, INT4, fp8()], ids=str)
def test_one_tile_serves_any_number_of_rows(kind: WeightLayout | torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split among programs or walked by one, it is the same tile, compiled without fused operations."""
    from penstock.kernels.triton import linear as family

    launches = []
    launch = family._launch

    def noted(*arguments: object) -> object:
        launches.append(launch(*arguments))
        return launches[-1]

    monkeypatch.setattr(family, "_launch", noted)
    weight = weight_of(kind, 70, 512)
    for count in (1, 16, 17, 64, 65, 300):
        linear(torch.zeros(count, 512, dtype=F32 if kind is F32 else BF16), weight, row_invariant=True)
    compiled = {(each.block_m, each.block_n, each.num_warps, each.num_stages, each.num_splits) for each in launches}
    assert len(compiled) == 1
    assert not any(each.constants["enable_fp_fusion"] for each in launches)
    before = (
        configs.of_device(torch.device("cpu")).tile("bf16", 1),
        configs.of_device(torch.device("cpu")).tile("bf16", 300),
    )
    assert before[0] != before[1], "without the mode, tiles follow the number of rows"


def test_a_model_gives_the_same_bits_alone_and_in_batches(tmp_path: Path) -> None:
    """Alone and whole; three at a time, prompts in chunks of what the others leave."""
    write_checkpoint(tmp_path, family="qwen3", tie_word_embeddings=True)
    source = random.Random(3)
    prompts = [[source.randrange(3, 90) for _ in range(length)] for length in (1, 18, 5)]
    requests = [
        request(
            f"r{index}",
            prompt,
            2,
            logprobs=3,
            prompt_logprobs=1 if index == 2 else None,
            temperature=index % 2,
            seed=index,
        )
        for index, prompt in enumerate(prompts)
    ]

    def answers(concurrency: int, max_num_batched_tokens: int) -> dict[str, object]:
        config = engine_config(
            tmp_path, kernels="triton", dtype="bfloat16", num_blocks=40, max_num_seqs=4,
            max_num_batched_tokens=max_num_batched_tokens,
        )  # fmt: skip
        device = "cuda" if torch.cuda.is_available() else "cpu"
        core = build(msgspec.structs.replace(config, batch_invariant=True, device=device))
        finished = run(core, requests, concurrency)
        return {name: (each.token_ids, each.logprobs, each.prompt_logprobs) for name, each in finished.items()}

    assert answers(1, 64) == answers(3, 16)


def test_the_references_refuse_the_mode(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model, machine = read_model_config(tmp_path), MachineFacts(num_cores=1)
    with pytest.raises(ConfigError, match="batch-invariant"):
        resolve_engine_config("", model, EngineOptions(kernels="reference", batch_invariant=True), machine)
    for device in ("cpu", "cuda"):
        options = EngineOptions(device=device, batch_invariant=True)
        assert resolve_engine_config("", model, options, machine).batch_invariant
