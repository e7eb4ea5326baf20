"""Writes a Llama checkpoint (safetensors in bf16, byte-level BPE) as a GGUF file with the same weights, for llama.cpp.

Runs in llama.cpp's environment, which has numpy and gguf but no torch: tensors stay raw 16-bit words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint16]

# Hugging Face's names inside a block, and GGUF's.
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def read_safetensors(path: Path) -> dict[str, Words]:
    """The bf16 tensors of one file, mapped. Raises ValueError for another dtype."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] != "BF16":
            raise ValueError(f"{path.name}: {name} is {info['dtype']}; this converter takes bf16 checkpoints only")
        offset = 8 + size + info["data_offsets"][0]
        tensors[name] = np.memmap(path, np.uint16, "r", offset, tuple(info["shape"]))
    return tensors


def interleave_rotary(weight: Words, num_heads: int) -> Words:
    """Rows of a q or k projection from halves (x_i, x_{i + d/2}) to GGUF's neighbouring pairs, head by head."""
    rows, columns = weight.shape
    split = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows, columns)


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight. KeyError for a tensor that a Llama does not have."""
    stem = name.removesuffix(".weight")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{BLOCK_NAMES[inner]}.weight"


def add_weights(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    """Matrices as bf16, norms as f32."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for path in sorted(model.glob("*.safetensors")):
        for name, words in read_safetensors(path).items():
            if words.ndim == 1:
                writer.add_tensor(gguf_name(name), (words.astype(np.uint32) << 16).view(np.float32))
                continue
            projection = name.split(".")[-2]
            data = interleave_rotary(words, heads[projection]) if projection in heads else words
            writer.add_tensor(gguf_name(name), data.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


def add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    """The byte-level BPE of tokenizer.json; ids that it lacks become unused tokens."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    size = config["vocab_size"]
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], kinds[index] = token, int(gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(gguf.TokenType.CONTROL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def convert(model: Path, target: Path) -> None:
    """Writes `target`; raises ValueError for anything but a plain Llama."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"this converter takes Llama checkpoints only, not {config['model_type']}")
    rope = config.get("rope_parameters") or config
    if rope.get("rope_type", "default") != "default":
        raise ValueError("this converter takes plain rotary embeddings only")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    add_tokenizer(writer, model, config)
    add_weights(writer, model, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(model: str, work: str) -> Path:
    """The GGUF file of `model` below `work`, made on first use."""
    source = Path(model).resolve()
    target = Path(work) / "gguf" / f"{source.parent.name}-{source.name}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        convert(source, part)
        part.rename(target)
    return target
