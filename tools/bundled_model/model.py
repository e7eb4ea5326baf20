"""The network as it is trained (the Llama architecture) and its export as a transformers checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tools.bundled_model import tokenizer
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the names are those of transformers' LlamaConfig."""

    vocab_size: int = tokenizer.VOCAB_SIZE
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **self.__dict__,
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": self.token_ids()["eos_token_id"],
            "pad_token_id": self.token_ids()["pad_token_id"],
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": "bfloat16",
        }

    def token_ids(self) -> dict[str, int]:
        """Ids of the control tokens: they and the markers are the last entries of the vocabulary."""
        first = self.vocab_size - len(tokenizer.SPECIAL) - len(tokenizer.MARKERS)
        ids = {token: first + offset for offset, token in enumerate(tokenizer.SPECIAL)}
        return {"eos_token_id": ids[tokenizer.IM_END], "pad_token_id": ids[tokenizer.END_OF_TEXT]}


class Block(nn.Module):
    """One decoder layer over x[B, T, hidden]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, head = shape.hidden_size, shape.head_dim
        self.heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.post_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = _matrix(sum(self.heads) * head, hidden)
        self.out = nn.Parameter(torch.zeros(hidden, shape.num_attention_heads * head))
        self.gate_up = _matrix(2 * shape.intermediate_size, hidden)
        self.down = nn.Parameter(torch.zeros(hidden, shape.intermediate_size))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        eps = self.shape.rms_norm_eps
        y = F.rms_norm(x, x.shape[-1:], self.input_norm, eps)
        heads = F.linear(y, self.qkv).view(*x.shape[:-1], -1, self.shape.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, self.heads, dim=1)
        attended = _attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + F.linear(attended.transpose(1, 2).flatten(-2), self.out)
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], self.post_norm, eps), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Network(nn.Module):
    """ids[B, T] int64 -> hidden states [B, T, hidden]; `logits` applies the tied head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.05)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(shape.max_position_embeddings).float(), frequency)
        self.cos, self.sin = angle.cos(), angle.sin()

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = F.embedding(ids, self.embed)
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.rms_norm(x, x.shape[-1:], self.norm, self.shape.rms_norm_eps)

    def loss(self, ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the cross entropies; `labels` and `weights` are [B, T], weight 0 for padding."""
        logits = F.linear(self(ids), self.embed).float().flatten(0, 1)
        return (F.cross_entropy(logits, labels.flatten(), reduction="none") * weights.flatten()).sum()


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5 * 0.6)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; q[B, H, T, D], k and v [B, G, T, D] -> [B, H, T, D].

    Two products and a softmax: at these lengths three times as fast, there and back, as torch's fused CPU kernel.
    """
    batch, groups, length, head = k.shape
    share = q.shape[1] // groups
    mask = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1).repeat(share, 1)
    queries = q.reshape(batch * groups, share * length, head)
    keys, held = k.reshape(batch * groups, length, head), v.reshape(batch * groups, length, head)
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=head**-0.5)
    return torch.bmm(scores.softmax(-1), held).view(q.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the NeoX layout; x[B, heads, T, head_dim], cos and sin [T, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def export(state: dict[str, Tensor], shape: Shape, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bf16) from a state dict of `Network`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    generation = {"do_sample": False, **shape.token_ids()}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {"model.embed_tokens.weight": state["embed"], "model.norm.weight": state["norm"]}
    head = shape.head_dim
    sizes = [shape.num_attention_heads * head, shape.num_key_value_heads * head, shape.num_key_value_heads * head]
    for index in range(shape.num_hidden_layers):
        source, target = f"layers.{index}.", f"model.layers.{index}."
        q, k, v = torch.split(state[source + "qkv"], sizes)
        gate, up = state[source + "gate_up"].chunk(2)
        tensors |= {
            target + "input_layernorm.weight": state[source + "input_norm"],
            target + "post_attention_layernorm.weight": state[source + "post_norm"],
            target + "self_attn.q_proj.weight": q,
            target + "self_attn.k_proj.weight": k,
            target + "self_attn.v_proj.weight": v,
            target + "self_attn.o_proj.weight": state[source + "out"],
            target + "mlp.gate_proj.weight": gate,
            target + "mlp.up_proj.weight": up,
            target + "mlp.down_proj.weight": state[source + "down"],
        }
    rounded = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, directory / "model.safetensors", metadata={"format": "pt"})
