"""The memory plan: what it gives, what it refuses, and that what it proposes then fits."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
import torch
from driving import engine_config

from penstock.base.errors import MemoryPlanError
from penstock.runner import memory, plan_memory
from penstock.runner.memory import RESERVED_BYTES

GIB = 1 << 30
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
BLOCK_BYTES = 2 * 16 * 8 * 64 * 16 * 2  # keys and values, layers, heads, head size, slots, bf16


# As their model cards count them, with the numbers of their config.json.
MIXTURES = {
    "Mixtral-8x7B": (46_702_792_704, {
        "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
    }),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
    }),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("kernels", ["native", "triton"])
def test_every_expert_is_counted(name, kernels, tmp_path):
    num_parameters, values = MIXTURES[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = engine_config(
        tmp_path, dtype="bfloat16", kernels=kernels, max_model_len=2048, num_blocks=0, max_memory_bytes=0
    )
    plan = plan_memory(found, 200 * GIB)
    # On a host, routers of 1, 8 and 60 rows are padded to a multiple of 16.
    assert 0 <= plan.weights_bytes / 2 - num_parameters <= (0 if kernels == "triton" else 2e6)


@pytest.fixture
def config(tmp_path):
    """Llama 3.2 1B in bf16 with 64 sequences of 2,048 tokens; only its config.json exists."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))

    def make(**overrides):
        values = {"dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
        return engine_config(tmp_path, **{**values, "num_blocks": 0, "max_memory_bytes": 0, **overrides})

    return make


def test_a_large_machine_gets_all_sequences_at_once(config):
    plan = plan_memory(config(), 100 * GIB)
    assert plan.weights_bytes == 2 * 1_235_814_400
    assert plan.num_blocks == 64 * (2048 // 16 + 1)
    assert plan.kv_bytes == plan.num_blocks * BLOCK_BYTES
    assert plan.max_model_len == 2048
    for word in ("weights", "activations", "KV cache", "limit", "2.30 GiB", str(plan.num_blocks)):
        assert word in plan.table


def test_the_default_takes_half_of_what_is_free_beside_the_weights(config):
    plan = plan_memory(config(), 6 * GIB)
    left = 6 * GIB - RESERVED_BYTES - plan.weights_bytes - plan.activation_bytes
    assert left / 2 - BLOCK_BYTES < plan.kv_bytes <= left / 2


def test_a_limit_may_be_used_up(config):
    plan = plan_memory(config(max_memory_bytes=5 * GIB))
    used = plan.weights_bytes + plan.activation_bytes + plan.kv_bytes
    assert 5 * GIB - BLOCK_BYTES < used <= 5 * GIB


def test_an_open_context_is_lowered_to_what_fits(config):
    plan = plan_memory(config(max_model_len=131072, max_model_len_is_auto=True), 6 * GIB)
    assert 16_384 < plan.max_model_len < 131_072
    assert plan.max_model_len % 128 == 0
    assert plan.num_blocks * 16 >= plan.max_model_len
    assert plan_memory(config(max_model_len_is_auto=True), 100 * GIB).max_model_len == 2048


def test_a_context_that_was_asked_for_is_refused_with_one_that_fits(config):
    asked = config(max_model_len=131072, max_memory_bytes=5 * GIB)
    with pytest.raises(MemoryPlanError, match="131072") as caught:
        plan_memory(asked)
    proposed = re.search(r"--max-model-len (\d+)", str(caught.value))
    assert proposed is not None
    length = int(proposed[1])
    assert length > 32_768
    assert plan_memory(config(max_model_len=length, max_memory_bytes=5 * GIB)).max_model_len == length
    with pytest.raises(MemoryPlanError):
        plan_memory(config(max_model_len=length + 256, max_memory_bytes=5 * GIB))


def test_a_smaller_step_is_proposed_when_activations_are_too_much(config):
    limit = 2 * 1_235_814_400 + 60 * 2**20
    with pytest.raises(MemoryPlanError) as caught:
        plan_memory(config(max_memory_bytes=limit))
    flags = dict(re.findall(r"--([a-z-]+) (\d+)", str(caught.value)))
    assert "max-num-batched-tokens" in flags
    fitting = {name.replace("-", "_"): int(value) for name, value in flags.items()}
    assert plan_memory(config(max_memory_bytes=limit, **fitting)).num_blocks > 0


def test_what_can_never_fit_is_refused(config):
    with pytest.raises(MemoryPlanError, match="smaller model"):
        plan_memory(config(max_memory_bytes=GIB))
    with pytest.raises(MemoryPlanError, match="bfloat16"):
        plan_memory(config(dtype="float32", max_memory_bytes=GIB))
    with pytest.raises(MemoryPlanError):
        plan_memory(config(max_model_len_is_auto=True), GIB)


def test_an_explicit_pool_is_taken_or_refused(config):
    assert plan_memory(config(num_blocks=777), 100 * GIB).num_blocks == 777
    with pytest.raises(MemoryPlanError, match="1000000 blocks"):
        plan_memory(config(num_blocks=1_000_000), 20 * GIB)


def test_a_plan_is_a_value(config):
    plan = plan_memory(config(), 20 * GIB)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=type(plan)) == plan


def test_a_card_is_planned_from_its_own_free_memory_and_filled(config, monkeypatch):
    on_card = msgspec.structs.replace(config(), device="cuda", kernels="triton")
    monkeypatch.setattr(memory, "open_device", torch.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100 * GIB, 140 * GIB))
    plan = plan_memory(on_card)
    assert plan.limit_bytes == 100 * GIB - memory.CARD_RESERVED_BYTES
    left = plan.limit_bytes - plan.weights_bytes - plan.activation_bytes
    assert 0 <= left - plan.kv_bytes < BLOCK_BYTES, "no share is left over"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (4 * GIB, 140 * GIB))
    with pytest.raises(MemoryPlanError):
        plan_memory(on_card)
