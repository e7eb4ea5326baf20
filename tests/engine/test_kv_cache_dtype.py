"""A whole engine whose keys and values are kept in 8 bits."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from checkpoints import write_checkpoint
from penstock.base.errors import ConfigError
from penstock.config.engine import EngineConfig
from penstock.kernels.layouts import HostLayouts
from penstock.runner.kv_pool import block_nbytes, cache_dtype
from whole_engine import Finished, build, engine_config, request, run


def with_cache(config: EngineConfig, dtype: str) -> EngineConfig:
    return msgspec.structs.replace(config, cache=msgspec.structs.replace(config.cache, dtype=dtype))


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_log_probabilities_stay_near_and_do_not_depend_on_the_batch(tmp_path: Path, dtype: str, kernels: str) -> None:
    write_checkpoint(tmp_path)
    source = random.Random(5)
    prompts = [[source.randrange(200) for _ in range(source.randint(1, 70))] for _ in range(6)]
    config = engine_config(tmp_path, kernels=kernels, max_num_batched_tokens=64)
    requests = [request(f"r{i}", prompt, 8, prompt_logprobs=0) for i, prompt in enumerate(prompts)]
    exact = run(build(config), requests, 6)
    together = run(build(with_cache(config, dtype)), requests, 6)
    alone = run(build(with_cache(config, dtype)), requests, 1)

    def prompt_logprobs(finished: Finished) -> list[float]:
        return [entry.logprob for entry in finished.prompt_logprobs or []]

    for name, finished in together.items():
        pairs = zip(prompt_logprobs(finished), prompt_logprobs(exact[name]), strict=True)
        differences = [abs(rounded - unrounded) for rounded, unrounded in pairs]
        assert sum(differences) <= (0.05 if dtype == "int8" else 0.15) * len(differences)
        if kernels == "native":
            assert finished.token_ids == alone[name].token_ids
            assert prompt_logprobs(finished) == prompt_logprobs(alone[name])


def test_8_bit_floats_are_refused_before_any_weight_is_read_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    config = engine_config(tmp_path)
    build(with_cache(config, "fp8"))
    monkeypatch.setattr(HostLayouts, "has_fp8", False)
    build(with_cache(config, "int8"))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ConfigError, match="no 8-bit floats") as refused:
        build(with_cache(config, "fp8"))
    assert "--kv-cache-dtype int8" in refused.value.remedy


def test_a_block_takes_about_half_of_bfloat16(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config, layouts = engine_config(tmp_path, dtype="bfloat16"), HostLayouts()
    full, half = (
        block_nbytes(each.model, 16, cache_dtype(each, layouts), layouts)
        for each in (config, with_cache(config, "int8"))
    )
    head_dim = config.model.head_dim
    assert half / full == (16 * head_dim + 64) / (32 * head_dim)
