#!/usr/bin/env python3
"""Writes a Llama or Qwen3-MoE checkpoint of a published shape with random weights and a real tokenizer, for benchmarks.

    make_checkpoint.py llama3.2-1b OUT_DIR       one of the shapes below
    make_checkpoint.py --list

The weights mean nothing; speed, memory and the loading path are those of a real checkpoint. The same seed writes the
same bytes. The tokenizer is a byte-level BPE trained on the running Python's standard library, filled up with words so
that every id has text. Needs torch, safetensors and tokenizers; downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
LEARNED_TOKENS = 32000
SHARD_BYTES = 2 << 30
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama, or with experts (of `inner` each) of a Qwen3-MoE."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    is_tied: bool = False
    rope_theta: float = 10000.0
    experts: int = 0
    experts_per_token: int = 0


SHAPES = {
    "tiny": Shape(128, 352, 3, 4, 2, 32, 2048, 2048),
    "small": Shape(256, 704, 4, 4, 2, 64, 32000, 4096),  # a usual vocabulary, and little else
    "llama-160m": Shape(768, 3072, 12, 12, 12, 64, 32000, 4096),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, 64, 32000, 4096),
    "llama3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, 131072, is_tied=True, rope_theta=500000.0),
    # Qwen3-30B-A3B's layers, a quarter of them, with a quarter of its experts and a small vocabulary.
    "qwen3-moe-2b": Shape(
        2048, 768, 12, 32, 4, 128, 32000, 8192, rope_theta=1000000.0, experts=32, experts_per_token=8
    ),
    "llama3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, 131072, rope_theta=500000.0),
}


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the file."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}."
        yield stem + "input_layernorm.weight", (shape.hidden,)
        yield stem + "self_attn.q_proj.weight", (shape.heads * shape.head_dim, shape.hidden)
        yield stem + "self_attn.k_proj.weight", (shape.kv_heads * shape.head_dim, shape.hidden)
        yield stem + "self_attn.v_proj.weight", (shape.kv_heads * shape.head_dim, shape.hidden)
        yield stem + "self_attn.o_proj.weight", (shape.hidden, shape.heads * shape.head_dim)
        yield stem + "post_attention_layernorm.weight", (shape.hidden,)
        if shape.experts:
            yield stem + "self_attn.q_norm.weight", (shape.head_dim,)
            yield stem + "self_attn.k_norm.weight", (shape.head_dim,)
            yield stem + "mlp.gate.weight", (shape.experts, shape.hidden)
        for block in [f"experts.{index}." for index in range(shape.experts)] or [""]:
            yield stem + f"mlp.{block}gate_proj.weight", (shape.inner, shape.hidden)
            yield stem + f"mlp.{block}up_proj.weight", (shape.inner, shape.hidden)
            yield stem + f"mlp.{block}down_proj.weight", (shape.hidden, shape.inner)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.is_tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def config(shape: Shape, dtype: str) -> dict[str, Any]:
    experts = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.inner,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return {
        "architectures": ["Qwen3MoeForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if shape.experts else "llama",
        **(experts if shape.experts else {}),
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.is_tied,
        "torch_dtype": dtype,
        "vocab_size": shape.vocabulary,
    }


def write_weights(out: Path, shape: Shape, dtype: str, seed: int) -> int:
    """Shards of at most SHARD_BYTES and their index; returns the number of parameters. One shard is in memory."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    item = torch.empty((), dtype=getattr(torch, dtype)).element_size()
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = 0
    for name, dimensions in tensor_shapes(shape):
        count = dimensions[0] * (dimensions[1] if len(dimensions) > 1 else 1)
        if size + count * item > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, dimensions))
        size += count * item
        total += count
    places = {}
    for index, shard in enumerate(shards):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, dimensions in shard:
            tensor = torch.ones(dimensions) if len(dimensions) == 1 else torch.randn(dimensions) * 0.02
            tensors[name] = tensor.to(getattr(torch, dtype))
            places[name] = file
        save_file(tensors, out / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total * item}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    return total


def write_tokenizer(out: Path, vocabulary: int) -> None:
    """tokenizer.json with exactly `vocabulary` ids, and tokenizer_config.json with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, LEARNED_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for pattern in ("*.py", "*/*.py") for path in root.glob(pattern) if "site-packages" not in path.parts
    )
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8", errors="replace") for path in files), trainer)
    content = json.loads(tokenizer.to_str())
    known = content["model"]["vocab"]
    for index in range(len(known), vocabulary):
        known[f"\u0120word{index}"] = index
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def make(out: Path, shape: Shape, dtype: str = "bfloat16", seed: int = 0) -> int:
    """Writes the whole checkpoint; returns the number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out, shape.vocabulary)
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}))
    parameters = write_weights(out, shape, dtype, seed)
    # Last, so that a directory with a config.json is a whole checkpoint.
    (out / "config.json").write_text(json.dumps(config(shape, dtype), indent=1))
    return parameters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?")
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    if options.list or options.out is None:
        print("\n".join(SHAPES))
        return 0 if options.list else 2
    if options.shape not in SHAPES:
        parser.error(f"unknown shape {options.shape!r}; one of: {', '.join(SHAPES)}")
    parameters = make(options.out, SHAPES[options.shape], options.dtype, options.seed)
    print(json.dumps({"shape": options.shape, "parameters": parameters, "out": str(options.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
