"""ModelConfig.from_hf: what real configurations mean, and that hostile ones are refused by name."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from penstock.base.errors import CheckpointError
from penstock.config.model import SUPPORTED_ARCHITECTURES, ModelConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "sliding_window": 32,
    "use_sliding_window": True,
    "max_window_layers": 3,
}


def test_llama_3_2():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (16, 32, 8, 64)
    assert config.rope.rope_type == "llama3"
    assert (config.rope.rope_theta, config.rope.factor) == (500000.0, 32.0)
    assert config.rope.original_max_position_embeddings == 8192
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.dtype == "bfloat16"
    assert config.sliding_windows == (0,) * 16
    assert config.max_context_len == 131072


def test_both_rope_spellings_mean_the_same():
    inside = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
    inside["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert ModelConfig.from_hf(inside) == ModelConfig.from_hf(LLAMA)


def test_it_survives_json():
    config = ModelConfig.from_hf(LLAMA)
    assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config


def test_defaults_are_those_of_transformers():
    minimal = {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    minimal |= {"num_attention_heads": 32, "max_position_embeddings": 4096}
    llama = ModelConfig.from_hf({**minimal, "architectures": ["LlamaForCausalLM"]})
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps) == (32, 64, 1e-6)
    assert (llama.rope.rope_type, llama.rope.rope_theta) == ("default", 10000.0)
    assert (llama.tie_word_embeddings, llama.attention_bias, llama.eos_token_ids) == (False, False, ())
    mistral = ModelConfig.from_hf({**minimal, "architectures": ["MistralForCausalLM"]})
    assert (mistral.num_kv_heads, mistral.sliding_windows[0]) == (8, 4096)
    assert ModelConfig.from_hf({**minimal, "architectures": ["Qwen3ForCausalLM"]}).head_dim == 128


def test_biases_and_norms_by_family():
    def made(architecture, **extra):
        config = ModelConfig.from_hf({**LLAMA, "architectures": [architecture], **extra})
        return config.attention_bias, config.output_bias, config.mlp_bias, config.qk_norm

    assert made("LlamaForCausalLM", attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert made("Qwen2ForCausalLM") == (True, False, False, False)
    assert made("Qwen3ForCausalLM") == (False, False, False, True)
    assert made("Qwen3ForCausalLM", attention_bias=True) == (True, True, False, True)
    assert made("MistralForCausalLM") == (False, False, False, False)


def test_sliding_windows():
    assert ModelConfig.from_hf(QWEN).sliding_windows == (0, 0, 0, 32)
    assert ModelConfig.from_hf({**QWEN, "use_sliding_window": False}).sliding_windows == (0, 0, 0, 0)
    types = ["sliding_attention", "full_attention"] * 2
    assert ModelConfig.from_hf({**QWEN, "layer_types": types}).sliding_windows == (32, 0, 32, 0)
    mistral = {**QWEN, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert ModelConfig.from_hf(mistral).sliding_windows == (32,) * 4
    assert ModelConfig.from_hf({**mistral, "sliding_window": None}).sliding_windows == (0,) * 4


def test_scaled_contexts():
    def length(**rope):
        return ModelConfig.from_hf({**QWEN, "rope_scaling": rope}).max_context_len

    assert length(type="linear", factor=4.0) == 1024
    assert length(type="dynamic", factor=2) == 512
    assert length(type="yarn", factor=4.0, original_max_position_embeddings=256) == 1024
    assert length(type="yarn", factor=2.0, original_max_position_embeddings=64) == 256


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForQuestionAnswering", "x" * 5000, 7, None])
def test_an_unlisted_architecture_is_refused_with_the_list(architecture):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hf({**LLAMA, "architectures": [architecture]})
    assert len(str(caught.value)) < 500
    for name in SUPPORTED_ARCHITECTURES:
        assert name in str(caught.value)


def test_code_and_quantization_are_refused_by_name():
    with pytest.raises(CheckpointError, match="auto_map"):
        ModelConfig.from_hf({**LLAMA, "auto_map": {"AutoModel": "evil.Model"}})
    with pytest.raises(CheckpointError, match=r"quantization_config.*aqlm"):
        ModelConfig.from_hf({**LLAMA, "quantization_config": {"quant_method": "aqlm"}})


REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [-1, 0, 10**12, 10**400, 2.0, 2.5, "64", True, [1], {}, math.nan])
def test_absurd_sizes_are_refused_by_name(name, value):
    with pytest.raises(CheckpointError, match=name):
        ModelConfig.from_hf({**LLAMA, name: value})


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_sizes_are_refused_by_name(name):
    with pytest.raises(CheckpointError, match=name):
        ModelConfig.from_hf({key: value for key, value in LLAMA.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_key_value_heads": 64}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim"),
        ({"head_dim": 512}, "head_dim"),
        ({"head_dim": None, "hidden_size": 2047}, "hidden_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_scaling": 7}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2, "short_factor": [1.0]}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": None}, "rope_parameters"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2] * 100}, "eos_token_id"),
        ({"architectures": []}, "architecture"),
        ({"architectures": "LlamaForCausalLM"}, "architecture"),
    ],
)
def test_inconsistent_values_are_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_hf({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": -4}, "sliding_window"),
        ({"max_window_layers": -1}, "max_window_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layer_types"),
    ],
)
def test_wrong_windows_are_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_hf({**QWEN, **changes})


def test_anything_but_an_object_is_refused():
    for value in ([], None, "x", 3):
        with pytest.raises(CheckpointError):
            ModelConfig.from_hf(value)


def test_arbitrary_json_values_never_escape_as_other_errors():
    nested = json.loads("[" * 50 + "]" * 50)
    values = [None, True, -1, 0, 1, 10**30, 1.5, math.inf, "", "x", [], [[]], {}, {"a": {}}, nested]
    messages = []
    for name in [*LLAMA, "head_dim", "attention_bias", "mlp_bias", "quantization_config", "rope_parameters"]:
        for value in values:
            try:
                ModelConfig.from_hf({**LLAMA, name: value})
            except CheckpointError as error:
                messages.append(str(error))
    assert len(messages) > 150
    assert max(map(len, messages)) < 600
