"""What a decoder layer launches on a GPU in a step of decoding: our kernels, the vendor's products, nothing between.

Pointwise glue is what torch.compile could fuse (docs/decisions/0010-fusion-and-stored-kernels.md): there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from checkpoints import write_checkpoint
from penstock.kernels import ops as op_table
from penstock.layers import AttentionMetadata, KVCache
from penstock.runner.kv_pool import KVPool
from penstock.runner.loading import load_model
from whole_engine import engine_config

# Memory and views of it: no kernel runs.
_NO_KERNEL = {"empty", "new_empty", "empty_like", "view", "t", "slice", "select", "as_strided", "alias", "detach"}

SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
# A product that is given out in float32 is one kernel on a GPU, and these on a CPU.
FLOAT32_PRODUCT = ["to", "to", "numpy_T", "matmul"]
NORM, SILU = "_rms_norm_kernel", "_silu_and_mul_kernel"
ATTENTION = ["_rope_and_cache_kernel", "_decode_kernel", "fold_kernel"]


def dense(product: list[str]) -> list[str]:
    """A layer of a plain decoder."""
    return [NORM, *product, *ATTENTION, *product, NORM, *product, SILU, *product]


def mixture(product: str) -> list[str]:
    """A layer of a mixture: routing, two products of all experts, and their sum."""
    first = dense(["linear" if product == "gemm_dense_kernel" else product])[:7]
    routing = ["top_k_kernel", "full", "full", "count_kernel", "sort_kernel"]
    return [*first, *FLOAT32_PRODUCT, *routing, product, SILU, product, "combine_kernel"]


CASES: dict[str, tuple[str, str | None, list[str]]] = {
    "llama": ("llama", None, dense(["linear"])),
    "qwen3": ("qwen3", None, dense(["linear"])),
    "4 bits": ("llama", "int4", dense(["gemm_codes_kernel"])),
    "8 bits": ("llama", "fp8", dense(["quantize_kernel", "gemm_dense_kernel"])),
    "mixture": ("qwen3-moe", None, mixture("gemm_dense_kernel")),
    "mixture in 4 bits": ("qwen3-moe", "int4", mixture("gemm_codes_kernel")),
}


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.is_inside and name not in _NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    launches = Launches()
    run = interpreter.GridExecutor.__call__

    def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
        launches.names.append(executor.fn.__name__)
        launches.is_inside = True
        try:
            return run(executor, *args, **kwargs)
        finally:
            launches.is_inside = False

    with monkeypatch.context() as patch, launches:
        patch.setattr(interpreter.GridExecutor, "__call__", note)
        yield launches


@torch.inference_mode()
def launches_of(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """Of a layer, in a step of two requests that decode."""
    config = msgspec.structs.replace(engine_config(path, kernels="triton", dtype="bfloat16"), **options)
    ops = op_table.load("triton", 1)
    model: Any = load_model(config, ops, lambda fraction: None)
    pool = KVPool(config.model, 4, torch.bfloat16, ops.layouts)
    metadata = AttentionMetadata(
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([5, 9], dtype=torch.int32),
        torch.tensor([[0], [1]], dtype=torch.int32),
        torch.tensor([4, 16 + 8]),
    )
    x, residual = torch.randn(2, 2, config.model.hidden_size).bfloat16()
    rotary = model.rotary(torch.tensor([4, 8]))
    with recorded(monkeypatch) as launches:
        model.layers[0].forward(x, residual, rotary, KVCache(*pool.caches[0]), metadata, ops)
    return launches.names


@pytest.mark.parametrize("case", CASES)
def test_between_products_there_is_one_kernel(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, quantization, expected = CASES[case]
    write_checkpoint(tmp_path, family, **SIZES)
    assert launches_of(tmp_path, monkeypatch, quantization=quantization) == expected
