"""What rounding weights costs in quality: figures of docs/formats.md, measured there with `penstock eval perplexity`.

They are the bundled model's, a small one: larger models lose less. They rank formats; a model's own loss is measured
with the same command.
"""

from __future__ import annotations

from typing import Final

import msgspec


class FormatLoss(msgspec.Struct, frozen=True):
    """bits: of a weight, scales included. perplexity: over bfloat16's. same_best: how often the likeliest token is the
    one that bfloat16 finds likeliest."""

    bits: float
    perplexity: float
    same_best: float


# By the value of --quantization; "" is bfloat16.
LOSSES: Final[dict[str, FormatLoss]] = {
    "": FormatLoss(16.0, 1.0, 1.0),
    "int8": FormatLoss(8.0, 1.0003, 0.9809),
    "q4_k_m": FormatLoss(4.9, 1.0182, 0.9321),
    "int4": FormatLoss(4.5, 1.0187, 0.9151),
    "fp8": FormatLoss(8.0, 1.0272, 0.9437),
}


def loss_line(quantization: str) -> str:
    """In words; "" for bfloat16 and for what was not measured."""
    loss = LOSSES.get(quantization)
    if loss is None or loss.perplexity == 1.0:
        return ""
    return (
        f"{quantization} weights cost the bundled model {loss.perplexity - 1:.2%} of perplexity and change "
        f"{1 - loss.same_best:.1%} of its likeliest tokens (docs/formats.md); `penstock eval perplexity` tells of yours"
    )
