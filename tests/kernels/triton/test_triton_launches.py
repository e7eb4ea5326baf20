"""What a decoder layer launches on a GPU in a step of decoding: our kernels, the vendor's products, nothing between.

Pointwise glue is what torch.compile could fuse (docs/decisions/0010-fusion-and-stored-kernels.md): there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


# Norms and the activation round for the product behind them; what attention gives has a kernel for that.
EIGHT_BITS = [
    NORM, "gemm_dense_kernel", *ATTENTION, "quantize_kernel", "gemm_dense_kernel", NORM, "gemm_dense_kernel",
    "quantize_kernel", "gemm_dense_kernel",
]  # fmt: skip


def mixture(first: list[str], experts: list[str]) -> list[str]:
    """A layer of a mixture: routing, two products of all experts, and their sum. The router takes no rounded norm."""
    routing = ["top_k_kernel", "full", "full", "count_kernel", "sort_kernel"]
    return [*first, *FLOAT32_PRODUCT, *routing, *experts, "combine_kernel"]


CASES: dict[str, tuple[str, str | None, list[str]]] = {
    "llama": ("llama", None, dense(["linear"])),
    "qwen3": ("qwen3", None, dense(["linear"])),
    "4 bits": ("llama", "int4", dense(["gemm_codes_kernel"])),
    "8 bits": ("llama", "fp8", EIGHT_BITS),
    "int8": ("qwen3", "int8", EIGHT_BITS),
    "mixture": ("qwen3-moe", None, mixture(dense(["linear"])[:7], ["gemm_dense_kernel", SILU, "gemm_dense_kernel"])),
    "mixture in 4 bits": (
        "qwen3-moe",
        "int4",
        mixture(dense(["gemm_codes_kernel"])[:7], ["gemm_codes_kernel", SILU, "gemm_codes_kernel"]),
    ),
    "mixture in 8 bits": ("qwen3-moe", "fp8", mixture(EIGHT_BITS[:8], ["quantize_kernel", *EIGHT_BITS[8:]])),
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
def recorded(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
        yield


@torch.inference_mode()
def run_layer(path: Path, ops: op_table.Ops, launches: AbstractContextManager[Any], **options: Any) -> Any:
    """What a layer adds, and the residual, in a step of two requests that decode."""
    config = msgspec.structs.replace(engine_config(path, kernels="triton", dtype="bfloat16"), **options)
    model: Any = load_model(config, ops, lambda fraction: None)
    pool = KVPool(config.model, 4, torch.bfloat16, ops.layouts)
    metadata = AttentionMetadata(
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([5, 9], dtype=torch.int32),
        torch.tensor([[0], [1]], dtype=torch.int32),
        torch.tensor([4, 16 + 8]),
    )
    generator = torch.Generator().manual_seed(1)
    x, residual = torch.randn(2, 2, config.model.hidden_size, generator=generator).bfloat16()
    rotary = model.rotary(torch.tensor([4, 8]))
    with launches:
        out = model.layers[0].forward(x, residual, rotary, KVCache(*pool.caches[0]), metadata, ops)
    return out, residual


@pytest.mark.parametrize("case", CASES)
def test_between_products_there_is_one_kernel(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, quantization, expected = CASES[case]
    write_checkpoint(tmp_path, family, **SIZES)
    launches = Launches()
    run_layer(tmp_path, op_table.load("triton", 1), recorded(launches, monkeypatch), quantization=quantization)
    assert launches.names == expected


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("family", "quantization"), [("llama", "fp8"), ("llama", "int8"), ("qwen3-moe", "fp8")])
def test_rounding_early_changes_no_bit(family: str, quantization: str, batch_invariant: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, **SIZES)
    ops = [op_table.load("triton", 1, batch_invariant=batch_invariant) for _ in range(2)]
    ops[1].rounded = None
    early, late = (run_layer(tmp_path, each, nullcontext(), quantization=quantization) for each in ops)
    assert torch.equal(early[0], late[0])
    assert torch.equal(early[1], late[1])
