"""GGUF files of tiny checkpoints, written by the gguf package (llama.cpp's own), not by us."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "llama", "Qwen2MoeForCausalLM": "qwen2moe", "Qwen3MoeForCausalLM": "qwen3moe",
}  # fmt: skip
_ENUMS = {name: getattr(gguf.MODEL_ARCH, name.upper()) for name in ARCHITECTURES.values()}


def write_gguf(
    path: Path,
    checkpoint: Path,
    type_of: Callable[[str], str] | str = "F16",
    *,
    pre: str = "gpt-2",
    tokenizer: bool = True,
    split_max_tensors: int = 0,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    quantize: Callable[[np.ndarray, str], np.ndarray] | None = None,
) -> None:
    """Converts a safetensors checkpoint as llama.cpp does. type_of: a tensor type, or one by GGUF name."""
    config = json.loads((checkpoint / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    _add_hyperparameters(writer, config)
    if tokenizer:
        add_byte_level_tokenizer(writer, checkpoint, pre)
    names = gguf.get_tensor_name_map(_ENUMS[arch], config["num_hidden_layers"])
    for name, values in _stacked(load_file(checkpoint / "model.safetensors")).items():
        if arch == "llama" and ".q_proj." in name:
            values = _permute(values, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in name:
            values = _permute(values, config["num_key_value_heads"])
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        kind = type_of if isinstance(type_of, str) else type_of(theirs)
        add_tensor(writer, theirs, values, kind, quantize or _by_package)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Experts below each other, the router of a shared one as a vector: as conversion/qwen.py does."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        parts = re.split(r"\.experts\.(\d+)\.", name)
        values = tensor.float().numpy()
        if len(parts) == 3:
            found.setdefault(f"{parts[0]}.experts.{parts[2]}", {})[int(parts[1])] = values
        else:
            found[name] = values[0] if name.endswith("shared_expert_gate.weight") else values
    return {
        name: np.stack([each[expert] for expert in sorted(each)]) if isinstance(each, dict) else each
        for name, each in found.items()
    }


def add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    values: np.ndarray,
    kind: str,
    quantize: Callable[[np.ndarray, str], np.ndarray],
) -> None:
    """Vectors and routers stay F32, as everywhere in llama.cpp."""
    kind = "F32" if values.ndim == 1 or "ffn_gate_inp" in name else kind
    stored = values if kind == "F32" else quantize(values, kind)
    writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[kind])


def _by_package(values: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


def _permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As conversion/llama.py does: rotary pairs side by side."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    if experts := config.get("num_local_experts", config.get("num_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, pre: str) -> None:
    backend = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    state = json.loads(backend.to_str())
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    added = {token["id"]: token for token in state["added_tokens"]}
    tokens, types = [], []
    for token_id in range(vocab_size):
        token = backend.id_to_token(token_id)
        tokens.append(token if token is not None else f"[PAD{token_id}]")
        control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
        kind = gguf.TokenType.UNUSED if token is None else gguf.TokenType.NORMAL
        types.append((control if added[token_id]["special"] else user) if token_id in added else kind)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    for name, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id)):
        if settings.get(name):
            add(tokens.index(settings[name]))
    writer.add_add_bos_token(False)
    if settings.get("chat_template"):
        writer.add_chat_template(settings["chat_template"])


def dequantized(checkpoint: Path, kind: str) -> dict[str, torch.Tensor]:
    """The state dict that is left of a checkpoint after a round trip through a type (matrices only)."""
    result = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.float().numpy()
        if values.ndim == 2:
            stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
            values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
        result[name] = torch.from_numpy(values)
    return result
