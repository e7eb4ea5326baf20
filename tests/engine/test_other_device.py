"""An engine on a device that torch has and the host waits for (xpu, mps) gives the tokens of the CPU."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from checkpoints import write_checkpoint
from other_device import DEVICE, OtherTensor
from penstock.base.errors import ConfigError
from penstock.config.engine import EngineConfig
from penstock.engine.core import EngineCore
from penstock.kernels.devices import open_device
from penstock.kernels.reference import quantized
from penstock.runner import memory, model_runner
from whole_engine import build, engine_config, request, run

VARIANTS = {
    "llama": ({}, {}),
    "qwen3 in int8, bfloat16": ({"family": "qwen3"}, {"quantization": "int8", "dtype": "bfloat16"}),
    "mistral in q4_k_m, cache in int8": (
        {"family": "mistral", "sliding_window": 24}, {"quantization": "q4_k_m", "cache_dtype": "int8"},
    ),
}  # fmt: skip
KINDS: list[dict[str, object]] = [
    {},
    {"temperature": 0.9, "seed": 4, "top_k": 20, "repetition_penalty": 1.2},
    {"temperature": 0.7, "seed": 5, "mirostat": 2, "logprobs": 2, "prompt_logprobs": 1},
]


def config_of(path: Path, *, dtype: str = "float32", quantization: str | None = None, cache_dtype: str = "model"):
    config = engine_config(path, kernels="reference", num_blocks=24, max_num_batched_tokens=32, dtype=dtype)
    cache = msgspec.structs.replace(config.cache, dtype=cache_dtype)
    return msgspec.structs.replace(config, quantization=quantization, cache=cache)


def answers(config: EngineConfig) -> tuple[EngineCore, dict[str, object]]:
    source = random.Random(3)
    requests = [
        request(f"r{index}", [source.randrange(3, 90) for _ in range(20 * index + 3)], 5, **kind)
        for index, kind in enumerate(KINDS)
    ]
    with torch.inference_mode():  # or torch counts changes of a tensor that is only acted out
        core = build(config)
    finished = run(core, requests, 3)
    return core, {name: (each.token_ids, len(each.logprobs)) for name, each in finished.items()}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_tokens_are_the_cpus(tmp_path, monkeypatch, variant):
    checkpoint, options = VARIANTS[variant]
    write_checkpoint(tmp_path, **checkpoint)
    config = config_of(tmp_path, **options)
    monkeypatch.setattr(quantized, "sum_dtype", lambda _x: torch.float32)  # of both, or a code may round otherwise
    _, expected = answers(config)
    for module in (memory, model_runner):
        monkeypatch.setattr(module, "open_device", lambda _name: DEVICE)
    core, found = answers(msgspec.structs.replace(config, device="mps"))
    runner = core.executor.runner
    assert all(isinstance(tensor, OtherTensor) for tensor in runner._pool.tensors)
    assert found == expected


@pytest.mark.parametrize("name", ["xpu", "mps", "cuda", "rocm"])
def test_a_device_that_torch_lacks_is_refused_by_name_and_reason(name):
    if torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a device")
    with pytest.raises(ConfigError, match=f"--device {name}: .*(torch|without)") as refused:
        open_device(name)
    assert "--device cpu" in refused.value.remedy
