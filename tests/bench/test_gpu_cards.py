"""The simulated clock of a GPU: floors from its limits, in the numbers that the kernels aim at."""

from __future__ import annotations

import msgspec
import pytest

from penstock.base.errors import ConfigError
from penstock.bench.gpu_cards import CARDS
from penstock.bench.step_time import StepWork
from penstock.cli.bench_parser import CARD_NAMES
from penstock.config.model import ModelConfig

LLAMA_8B = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    }
)  # fmt: skip


def test_the_command_line_knows_every_card():
    assert sorted(CARDS) == list(CARD_NAMES)


def test_a_decode_step_is_bytes_over_bandwidth_and_launches():
    card = CARDS["h200"]
    step = card.step_time(LLAMA_8B, 16)
    weights = 2 * (32 * ((2 * 32 + 2 * 8) * 128 * 4096 + 3 * 4096 * 14336) + 128256 * 4096)
    assert step.weight_bytes == weights
    floor_s = (weights + 32 * 1024 * 131072) / card.bandwidth  # 32 requests of 1,024 tokens of 128 KiB
    measured = step.seconds(StepWork(32, 32, 32 * 1024, 0))
    assert measured == pytest.approx(floor_s / 0.85 + 300 * card.launch_s)
    assert 0.004 < measured < 0.008
    # A prefill of 8,192 tokens is bound by multiplications.
    prefill = step.seconds(StepWork(8192, 1, 0, 8192 * 8193 // 2))
    assert prefill > 2 * 7.5e9 * 8192 / card.flops


def test_the_cache_is_what_the_weights_leave():
    card = CARDS["h200"]
    blocks = card.num_blocks(LLAMA_8B, 16, 16)
    assert 55_000 < blocks < 70_000
    assert card.num_blocks(LLAMA_8B, 4, 16) > blocks
    huge = msgspec.structs.replace(LLAMA_8B, num_layers=900)
    with pytest.raises(ConfigError, match="the card has 149"):
        card.num_blocks(huge, 16, 16)


def test_a_block_of_the_host_tier_takes_its_bytes_over_the_link():
    card = CARDS["h200"]
    assert card.block_copy_s(LLAMA_8B, 16) == pytest.approx((2 << 20) / card.link)
    assert card.num_host_blocks(LLAMA_8B, 16, 100e9) == int(100e9 / (2 << 20))
