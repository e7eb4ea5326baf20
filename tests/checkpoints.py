"""Tiny random checkpoints of every family, written by transformers, and the transformers model to compare with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ARCHITECTURES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral",
    "qwen2-moe": "Qwen2Moe", "qwen3-moe": "Qwen3Moe",
}  # fmt: skip
# Of mixtures, beside TINY.
TINY_EXPERTS = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2-moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "shared_expert_intermediate_size": 52,
    },
    "qwen3-moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44},
}  # fmt: skip

# Small and awkward on purpose: nothing is a multiple of a vector or tile, heads are wider than hidden / heads.
TINY = {
    "vocab_size": 211,
    "hidden_size": 60,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Encoders, as awkward.
TINY_ENCODER = {
    "vocab_size": 211,
    "hidden_size": 60,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
ENCODERS = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_model(family: str = "llama", seed: int = 0, head: str = "", **overrides: Any) -> Any:
    """A transformers model with random weights: biases and norms too, which transformers starts at zero and one.

    head: what follows the family in the class's name; left out, ForCausalLM for decoders and Model for encoders.
    overrides: entries of the configuration; `head_dim=None` drops one.
    """
    import transformers

    is_encoder = family in ENCODERS
    tiny, name = (TINY_ENCODER, ENCODERS[family]) if is_encoder else (TINY, ARCHITECTURES[family])
    tiny = {**tiny, **TINY_EXPERTS.get(family, {})}
    values = {key: value for key, value in {**tiny, **overrides}.items() if value is not None}
    if family in ("qwen2", "qwen2-moe"):
        values.pop("head_dim", None)
    config = getattr(transformers, f"{name}Config")(**values)
    if family in TINY_EXPERTS:
        config._experts_implementation = "eager"  # the others want sizes that are multiples of 16
    torch.manual_seed(seed)
    model = getattr(transformers, name + (head or ("Model" if is_encoder else "ForCausalLM")))(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0.0, 0.3)
        elif "norm" in name.lower():
            parameter.data.normal_(1.0, 0.2)
        elif name.endswith(".gate.weight"):
            parameter.data.normal_(0.0, 0.2)  # Qwen's start at zero
    return model


def write_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: bool = False,
    max_shard_size: str = "2GB",
    **overrides: Any,
) -> Any:
    """Writes a checkpoint of `build_model` in `dtype` to `path`; returns the model of those weights in float32."""
    model = build_model(family, seed, **overrides)
    # Of the copy: converting a model rounds its rotary frequencies too, which a float32 model would keep.
    stored = copy.deepcopy(model).to(getattr(torch, dtype))
    stored.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        write_tokenizer(path, model.config.vocab_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    return model


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens with a ChatML template. It needs at least 260."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|bos|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ("the quick brown fox jumps over the lazy dog and sings of rivers, reservoirs and turbines " * 4).split()
    tokenizer.train_from_iterator([" ".join(words[start:]) for start in range(len(words))], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
