"""What a checkpoint's config.json says about a model, checked and bounded.

Owns: nothing (values only).
Never: imports torch; trusts a number of a downloaded file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from penstock.base.errors import CheckpointError
from penstock.config.pooler import (
    CLASSIFY_TASKS,
    CROSS_ENCODER_TASKS,
    EMBED_TASKS,
    GENERATE_TASKS,
    PoolerConfig,
    classifier_of,
)
from penstock.config.quantization import QuantizationConfig, quantization_of

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

SUPPORTED_ARCHITECTURES: Final = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "BertModel",
    "RobertaModel",
    "XLMRobertaModel",
)
# What a config.json may call a checkpoint of such a family, after the family's name.
_DECODER_HEADS: Final = ("ForCausalLM", "Model", "ForSequenceClassification")
_ENCODER_HEADS: Final = ("Model", "ForMaskedLM", "ForSequenceClassification")

SUPPORTED_DTYPES: Final = ("bfloat16", "float16", "float32")

# Largest values a config.json may name. Far above every published model of these families; they exist so that a
# hostile file is refused here and not by an allocation or an integer overflow later.
_LIMITS: Final[dict[str, int]] = {
    "vocab_size": 4_194_304,
    "hidden_size": 131_072,
    "intermediate_size": 1_048_576,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 256,  # kernels.kv_layout.MAX_HEAD_DIM
    "max_position_embeddings": 16_777_216,
    "original_max_position_embeddings": 16_777_216,
    "sliding_window": 16_777_216,
    "max_window_layers": 1024,
    "type_vocab_size": 1024,
    "num_experts": 1024,  # kernels.triton.moe.MAX_EXPERTS
    "num_local_experts": 1024,
    "num_experts_per_tok": 64,
    "moe_intermediate_size": 1_048_576,
    "shared_expert_intermediate_size": 1_048_576,
    "decoder_sparse_step": 1024,
}

# What transformers assumes when config.json leaves a key out; a key in neither place is required.
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "LlamaForCausalLM": {"attention_bias": False, "mlp_bias": False},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 128, "attention_bias": False},
    "MixtralForCausalLM": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    "Qwen3MoeForCausalLM": {
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "attention_bias": False,
    },
    "BertModel": {"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "RobertaModel": {"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "XLMRobertaModel": {"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
}


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding parameters under the names of transformers 5's `rope_parameters`.

    Fields that a rope_type does not use keep their defaults. attention_factor: None means "derived from factor".
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts in place of the feed-forward block, in all layers but dense_layers.

    per_token: experts that each token meets. is_renormalized: their weights add up to one. shared_intermediate_size: of
    the expert that every token meets beside them, 0 where there is none.
    """

    count: int
    per_token: int
    intermediate_size: int
    is_renormalized: bool
    shared_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a model. Build it with `from_hf`; every number is then in bounds and consistent.

    sliding_windows: for each layer the window in tokens, 0 for full attention.
    attention_bias: of q, k and v. output_bias: of the attention's output projection.
    dtype: of the checkpoint ("bfloat16", "float16" or "float32"). quantization: how its linears are stored; None: as
    floats, or in a GGUF's types.
    rms_norm_eps: of every norm, also where a family's are LayerNorms.
    tasks: what the model can be asked for. is_encoder: every token sees every other, and nothing is generated.
    first_position: the position embedding's row of a text's first token. max_position_embeddings counts from there.
    max_sequence: the tokens that the checkpoint's pooling was made for, where it names them.
    experts: of a mixture; intermediate_size is then of its dense layers.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    sliding_windows: tuple[int, ...]
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    quantization: QuantizationConfig | None = None
    tasks: tuple[str, ...] = GENERATE_TASKS
    pooler: PoolerConfig = PoolerConfig()
    is_encoder: bool = False
    type_vocab_size: int = 0
    first_position: int = 0
    max_sequence: int | None = None
    experts: ExpertsConfig | None = None

    @property
    def max_context_len(self) -> int:
        """The longest context in tokens that the checkpoint is meant for, scaled as its rope type says."""
        if self.max_sequence is not None:
            return min(self.max_sequence, self._max_rotated)
        return self._max_rotated

    @property
    def _max_rotated(self) -> int:
        rope = self.rope
        if rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.rope_type == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads the dictionary of a config.json. Raises CheckpointError naming the key that is wrong."""
        if not isinstance(config, Mapping):
            raise CheckpointError("config.json is not a JSON object.")
        architecture, head = _architecture(config)
        reader = _Reader({**_DEFAULTS[architecture], **config})
        tasks, pooler = _tasks(config, head)
        if architecture.endswith("Model"):
            return _encoder(config, architecture, reader, tasks, pooler)
        num_layers = reader.size("num_hidden_layers")
        num_heads = reader.size("num_attention_heads")
        hidden_size = reader.size("hidden_size")
        num_kv_heads = reader.size("num_key_value_heads", default=num_heads)
        head_dim = _head_dim(reader, hidden_size, num_heads)
        if num_heads % num_kv_heads:
            raise _wrong("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads ({num_heads})")
        vocab_size = reader.size("vocab_size")
        max_position_embeddings = reader.size("max_position_embeddings")
        activation = reader.values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise _wrong("hidden_act", f"{activation!r} is not supported; these families use 'silu'")
        bias, is_qwen2_moe = reader.flag("attention_bias"), architecture == "Qwen2MoeForCausalLM"
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=reader.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
            rope=_rope(reader, head_dim, max_position_embeddings),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            sliding_windows=_sliding_windows(reader, architecture, num_layers),
            attention_bias=architecture == "Qwen2ForCausalLM" or bias or (is_qwen2_moe and reader.flag("qkv_bias")),
            output_bias=architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM") and bias,
            mlp_bias=architecture == "LlamaForCausalLM" and reader.flag("mlp_bias"),
            qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            eos_token_ids=eos_token_ids(config),
            dtype=_dtype(config),
            quantization=quantization_of(config),
            tasks=tasks,
            pooler=pooler,
            experts=_experts(reader, architecture, num_layers),
        )


def _experts(reader: _Reader, architecture: str, num_layers: int) -> ExpertsConfig | None:
    """Of a Qwen that has neither of its two spellings of the number of experts, transformers' default."""
    if architecture == "MixtralForCausalLM":
        count, inner = reader.size("num_local_experts"), reader.size("intermediate_size")
        is_renormalized, shared = True, 0
        dense: tuple[int, ...] = ()
    elif architecture in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        count = reader.size("num_local_experts", default=0) or reader.size("num_experts", default=128)
        inner, is_renormalized = reader.size("moe_intermediate_size"), reader.flag("norm_topk_prob")
        shared = reader.size("shared_expert_intermediate_size") if architecture == "Qwen2MoeForCausalLM" else 0
        dense = _dense_layers(reader, num_layers)
    else:
        return None
    per_token = reader.size("num_experts_per_tok")
    if per_token > count:
        raise _wrong("num_experts_per_tok", f"{per_token} exceeds the {count} experts")
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        intermediate_size=inner,
        is_renormalized=is_renormalized,
        shared_intermediate_size=shared,
        dense_layers=dense,
    )


def _dense_layers(reader: _Reader, num_layers: int) -> tuple[int, ...]:
    listed = reader.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in listed):
        raise _wrong("mlp_only_layers", "it is not a list of whole numbers")
    step = reader.size("decoder_sparse_step", default=1)
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)


def _encoder(
    config: Mapping[str, Any], architecture: str, reader: _Reader, tasks: tuple[str, ...], pooler: PoolerConfig
) -> ModelConfig:
    """BERT's shape: learned positions, LayerNorm after each block, an ungated GELU in between."""
    values = reader.values
    if values.get("hidden_act") != "gelu":
        raise _wrong("hidden_act", f"{_shown(values.get('hidden_act'))} is not supported; this family uses 'gelu'")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise _wrong("position_embedding_type", f"{_shown(values['position_embedding_type'])} is not supported")
    if values.get("is_decoder"):
        raise _wrong("is_decoder", "this family is served as an encoder only")
    hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    if hidden_size % num_heads:
        raise _wrong("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads ({num_heads})")
    if hidden_size // num_heads > _LIMITS["head_dim"]:
        raise _wrong("num_attention_heads", f"heads of {hidden_size // num_heads} exceed {_LIMITS['head_dim']}")
    num_layers, num_positions = reader.size("num_hidden_layers"), reader.size("max_position_embeddings")
    first_position = 0
    if architecture != "BertModel":  # RoBERTa's positions begin behind the padding token's id
        padding = values.get("pad_token_id", 1)
        if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding < num_positions - 1:
            raise _wrong("pad_token_id", f"{_shown(padding)} is not between 0 and {num_positions - 2}")
        first_position = padding + 1
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=num_positions - first_position,
        rms_norm_eps=reader.number("layer_norm_eps", 0.0, 1.0),
        rope=RopeConfig(),
        tie_word_embeddings=True,
        sliding_windows=(0,) * num_layers,
        dtype=_dtype(config),
        quantization=quantization_of(config),
        tasks=tasks,
        pooler=pooler if pooler.labels else msgspec.structs.replace(pooler, pooling="mean"),
        is_encoder=True,
        type_vocab_size=reader.size("type_vocab_size"),
        first_position=first_position,
    )


def _tasks(config: Mapping[str, Any], head: str) -> tuple[tuple[str, ...], PoolerConfig]:
    """What a checkpoint with this head is for."""
    if head == "ForSequenceClassification":
        pooler = classifier_of(config)
        return (CROSS_ENCODER_TASKS if len(pooler.labels) == 1 else CLASSIFY_TASKS), pooler
    return (GENERATE_TASKS if head == "ForCausalLM" else EMBED_TASKS), PoolerConfig()


class _Reader:
    """Typed, bounded access to the values of a config.json."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def size(self, name: str, *, default: int | None = None) -> int:
        """A whole number from 1 to _LIMITS[name]. JSON null counts as absent."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json lacks {name}.")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(name, f"{_shown(value)} is not a whole number")
        if not 1 <= value <= _LIMITS[name]:
            raise _wrong(name, f"{_shown(value)} is not between 1 and {_LIMITS[name]}")
        return value

    def number(self, name: str, lowest: float, highest: float, *, default: float | None = None) -> float:
        """A finite number above `lowest`, at most `highest`. JSON null counts as absent."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json lacks {name}.")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(name, f"{_shown(value)} is not a number")
        if not lowest < value <= highest:  # false for NaN too
            raise _wrong(name, f"{_shown(value)} is not above {lowest:g} and at most {highest:g}")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong(name, f"{_shown(value)} is not true or false")
        return value


def eos_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The `eos_token_id` of a config.json or generation_config.json: absent, a number, or a list of numbers."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > 64:
        raise _wrong("eos_token_id", f"{len(ids)} entries are more than 64")
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < _LIMITS["vocab_size"]:
            raise _wrong("eos_token_id", f"{_shown(token_id)} is not a token id")
    return tuple(dict.fromkeys(ids))


def _architecture(config: Mapping[str, Any]) -> tuple[str, str]:
    """The supported architecture of the checkpoint's family, and what follows the family's name in config.json."""
    if "auto_map" in config:
        raise CheckpointError(
            "config.json has auto_map: this checkpoint wants to run its own Python code.",
            remedy="Penstock never runs code that came with a model. Use a checkpoint of a listed architecture: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}.",
        )
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError(
            "config.json names no architecture.", remedy=f"Supported: {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    for architecture in SUPPORTED_ARCHITECTURES:
        main, *others = _ENCODER_HEADS if architecture.endswith("Model") else _DECODER_HEADS
        family = architecture.removesuffix(main)
        for head in (main, *others):
            if names[0] == family + head:
                return architecture, head
    raise CheckpointError(
        f"Architecture {_shown(names[0])} is not supported.",
        remedy=f"Supported: {', '.join(SUPPORTED_ARCHITECTURES)}, and these families' classifiers and bare models.",
    )


def _head_dim(reader: _Reader, hidden_size: int, num_heads: int) -> int:
    if reader.values.get("head_dim") is None and hidden_size % num_heads:
        raise _wrong("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads ({num_heads})")
    head_dim = reader.size("head_dim", default=max(hidden_size // num_heads, 1))
    if head_dim % 2:
        raise _wrong("head_dim", f"{head_dim} is odd; rotary embedding turns pairs")
    return head_dim


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype", config.get("torch_dtype")) or "float32"
    if value not in SUPPORTED_DTYPES:
        raise _wrong("torch_dtype", f"{_shown(value)} is not one of {', '.join(SUPPORTED_DTYPES)}")
    return str(value)


def _sliding_windows(reader: _Reader, architecture: str, num_layers: int) -> tuple[int, ...]:
    """Mistral, Mixtral: every layer when set. Qwen: those that `layer_types` or max_window_layers name. Llama: none."""
    full = (0,) * num_layers
    if architecture == "LlamaForCausalLM" or reader.values.get("sliding_window") in (None, 0):
        return full
    window = reader.size("sliding_window")
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        return (window,) * num_layers
    if not reader.flag("use_sliding_window"):
        return full
    if architecture.endswith("MoeForCausalLM"):
        raise _wrong("use_sliding_window", "it is not supported in this family, whose published models have none")
    types = reader.values.get("layer_types")
    if types is None:
        first = reader.values.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first <= _LIMITS["max_window_layers"]:
            raise _wrong("max_window_layers", f"{_shown(first)} is not between 0 and {_LIMITS['max_window_layers']}")
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise _wrong("layer_types", f"it is not a list of {num_layers} entries")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise _wrong("layer_types", f"{_shown(kind)} is neither 'full_attention' nor 'sliding_attention'")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _rope(reader: _Reader, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """Both spellings: `rope_scaling` beside a top-level rope_theta, and `rope_parameters` with everything inside."""
    raw = reader.values.get("rope_scaling") or reader.values.get("rope_parameters") or {}
    if not isinstance(raw, Mapping):
        raise _wrong("rope_scaling", "it is not a JSON object")
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise _wrong("rope_parameters", "parameters that differ by layer type are not supported")
    inherited = {key: reader.values[key] for key in ("rope_theta", "partial_rotary_factor") if key in reader.values}
    rope = _Reader({**inherited, **raw})
    rope_type = rope.values.get("rope_type", rope.values.get("type", "default"))
    if rope_type not in ("default", "linear", "dynamic", "llama3", "yarn", "longrope"):
        raise _wrong("rope_type", f"{_shown(rope_type)} is not supported")
    if rope.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        raise _wrong("partial_rotary_factor", "rotating a part of each head is not supported")
    theta = rope.number("rope_theta", 1.0, 1e15, default=10_000.0)
    if rope_type == "default":
        return RopeConfig(rope_theta=theta)
    original = max_position_embeddings
    if reader.values.get("original_max_position_embeddings") is not None:  # the top level wins, as in transformers
        original = reader.size("original_max_position_embeddings")
    elif rope.values.get("original_max_position_embeddings") is not None:
        original = rope.size("original_max_position_embeddings")
    if rope_type in ("yarn", "longrope"):
        implied: float | None = max(max_position_embeddings / original, 1e-3)
    else:
        implied = None
    factor = rope.number("factor", 0.0, 1e6, default=implied)
    built = RopeConfig(
        rope_type=rope_type,
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        **_rope_details(rope, rope_type, head_dim),
    )
    _check_rope(built, head_dim)
    return built


def _rope_details(rope: _Reader, rope_type: str, head_dim: int) -> dict[str, Any]:
    """The fields that only one rope type has."""
    if rope_type == "llama3":
        return {
            "low_freq_factor": rope.number("low_freq_factor", 0.0, 1e6),
            "high_freq_factor": rope.number("high_freq_factor", 0.0, 1e6),
        }
    attention_factor = None
    if rope.values.get("attention_factor") is not None:
        attention_factor = rope.number("attention_factor", 0.0, 1e3)
    if rope_type == "yarn":
        return {
            "attention_factor": attention_factor,
            "beta_fast": rope.number("beta_fast", 0.0, 1e6, default=32.0),
            "beta_slow": rope.number("beta_slow", 0.0, 1e6, default=1.0),
            "mscale": _optional_scale(rope, "mscale"),
            "mscale_all_dim": _optional_scale(rope, "mscale_all_dim"),
            "truncate": rope.flag("truncate", default=True),
        }
    if rope_type == "longrope":
        return {
            "attention_factor": attention_factor,
            "short_factor": _factors(rope, "short_factor", head_dim // 2),
            "long_factor": _factors(rope, "long_factor", head_dim // 2),
        }
    return {}


def _optional_scale(rope: _Reader, name: str) -> float:
    value = rope.values.get(name)
    return 0.0 if value is None or value == 0 else rope.number(name, 0.0, 1e3)


def _factors(rope: _Reader, name: str, count: int) -> tuple[float, ...]:
    values = rope.values.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise _wrong(name, f"it is not a list of {count} numbers")
    entries = (_Reader({name: value}) for value in values)
    return tuple(entry.number(name, 0.0, 1e9) for entry in entries)


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    if rope.rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise _wrong("high_freq_factor", "it must be above low_freq_factor")
    if rope.rope_type == "yarn" and rope.beta_fast < rope.beta_slow:
        raise _wrong("beta_fast", "it must not be below beta_slow")
    if rope.rope_type == "dynamic" and head_dim <= 2:
        raise _wrong("head_dim", "dynamic rope scaling needs more than one pair")
    if rope.rope_type == "longrope" and rope.original_max_position_embeddings < 2:
        raise _wrong("original_max_position_embeddings", "longrope needs at least 2")
    if rope.rope_type in ("dynamic", "linear") and not math.isfinite(rope.factor):
        raise _wrong("factor", "it is not finite")


def _shown(value: object) -> str:
    """A value for a message, cut short: it comes from a file that nobody vouches for."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"config.json: {name} is unusable: {why}.")
