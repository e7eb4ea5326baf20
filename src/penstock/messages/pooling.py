"""What a one-pass request asks for: a vector or class scores instead of tokens."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.base.errors import ValidationError


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters of one one-pass request.

    kind: "embed" gives a vector, "classify" a score for each label of the model. dimensions: keep so many leading
    entries of the vector (matryoshka), None for all. normalize: to unit length after that; None: as the checkpoint
    says. activate: scores as probabilities (or whatever activation the checkpoint names); false for the raw logits.
    second_text_start: position of the first token of the second text of a pair; 0 when there is one text.
    Raises ValidationError from `validate()`, naming the field.
    """

    kind: Literal["embed", "classify"]
    dimensions: int | None = None
    normalize: bool | None = None
    activate: bool = True
    second_text_start: int = 0

    def validate(self, embedding_size: int) -> None:
        """embedding_size: entries of the model's whole vector."""
        if self.dimensions is not None and not 1 <= self.dimensions <= embedding_size:
            raise ValidationError(
                f"dimensions must be between 1 and {embedding_size}, the size of this model's vectors.",
                param="dimensions",
            )
