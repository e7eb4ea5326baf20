"""An initialisation that copies from the first step on.

Copying a value from the prompt takes two heads in a row (an induction head): one that writes into each position which
token came before it, and one that looks for the position after an earlier occurrence of the current token and predicts
what stands there. Gradient descent finds them after some ten million tokens, which is all that a CPU run of an hour
has. So they are built by hand, at random directions, and training only has to sharpen them.
"""

from __future__ import annotations

import torch
from tools.bundled_model.model import Block, Network, Shape
from torch import Tensor

_PREVIOUS_SHARPNESS = 5.0
_MATCH_SHARPNESS = 4.0
_COPY_STRENGTH = 3.2
_CONSTANT = 2.0
_EMBEDDING = 1.0
_FINAL_GAIN = 0.1
_STABLE_RADIANS = 0.01
"""Rotary pairs slower than this, in radians per token, hardly turn within a conversation, so contents match by them."""


@torch.no_grad()
def install(network: Network) -> None:
    """Writes a previous-token layer and an induction layer into the first two layers of a fresh `network`."""
    shape = network.shape
    first, second = network.layers[0], network.layers[1]
    assert isinstance(first, Block)
    assert isinstance(second, Block)
    network.embed.copy_(torch.randn_like(network.embed) * _EMBEDDING)
    network.norm.fill_(_FINAL_GAIN)
    network.embed[:, 0] = _CONSTANT  # what the previous-token heads compute their constant queries from
    groups, head, hidden = shape.num_key_value_heads, shape.head_dim, shape.hidden_size
    share = shape.num_attention_heads // groups
    codes = _directions(groups * head, hidden)
    written = _directions(groups * head, hidden)
    copied = _directions(groups * head, hidden)
    frequency = shape.rope_theta ** (-torch.arange(0, head, 2) / head)
    stable = (frequency < _STABLE_RADIANS).repeat(2).float().unsqueeze(1)
    for group in range(groups):
        rows = slice(group * head, (group + 1) * head)
        query = slice(group * share * head, (group * share + 1) * head)
        key, value = _key_value_rows(shape, group)
        first.qkv[query], first.qkv[key] = _look_back_one(frequency, hidden)
        first.qkv[value] = codes[rows]
        first.out[:, query] = written[rows].T * _EMBEDDING
        second.qkv[query] = codes[rows] * stable * _MATCH_SHARPNESS
        second.qkv[key] = written[rows] * stable * _MATCH_SHARPNESS
        second.qkv[value] = copied[rows] * _COPY_STRENGTH
        second.out[:, query] = copied[rows].T * _COPY_STRENGTH


def _directions(count: int, hidden: int) -> Tensor:
    """`count` orthonormal rows, none of which sees the constant."""
    basis = torch.linalg.qr(torch.randn(hidden - 1, count)).Q.T
    return torch.cat((torch.zeros(count, 1), basis), dim=1)


def _key_value_rows(shape: Shape, group: int) -> tuple[slice, slice]:
    """Rows of the fused qkv matrix that make key and value of `group`."""
    head = shape.head_dim
    keys = (shape.num_attention_heads + group) * head
    values = (shape.num_attention_heads + shape.num_key_value_heads + group) * head
    return slice(keys, keys + head), slice(values, values + head)


def _look_back_one(frequency: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Query and key matrices whose score, once rotated, is sum(cos((distance - 1) * frequency)) over the fast pairs."""
    pairs = len(frequency)
    fast = (torch.arange(pairs) < 6).float()
    query, key = torch.zeros(2 * pairs, hidden), torch.zeros(2 * pairs, hidden)
    query[:pairs, 0] = fast * _PREVIOUS_SHARPNESS
    key[:pairs, 0] = fast * frequency.cos() * _PREVIOUS_SHARPNESS
    key[pairs:, 0] = fast * frequency.sin() * _PREVIOUS_SHARPNESS
    return query, key
