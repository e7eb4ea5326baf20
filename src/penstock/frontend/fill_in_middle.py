"""A text with a gap, for models that were trained to fill it.

Such models know three control tokens; the prompt is what stands before the gap, what stands behind it, and a third
token after which the model writes what belongs between (Bavarian et al. 2022, "Efficient Training of Language Models
to Fill in the Middle", arXiv:2207.14255; in the order of their PSM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.base.errors import ValidationError
from penstock.frontend.tokenizer import Tokenizer

# Before, behind, between: Qwen-Coder and CodeGemma, StarCoder and Granite, SantaCoder, DeepSeek-Coder.
MARKERS: Final = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)


@dataclass(frozen=True)
class Gap:
    """The texts before and behind it."""

    before: str
    after: str


def gap_token_ids(tokenizer: Tokenizer, gap: Gap, *, add_special_tokens: bool) -> list[int]:
    """The prompt for a gap. Control tokens written out in its texts stay text.

    add_special_tokens: with the token that begins a sequence, where the tokenizer has one.
    Raises ValidationError where the model does not know gaps.
    """
    for markers in MARKERS:
        before_id, after_id, between_id = map(tokenizer.token_to_id, markers)
        if before_id is not None and after_id is not None and between_id is not None:
            break
    else:
        raise ValidationError(
            "suffix: this model has no tokens that mark a gap, so it cannot fill one.",
            remedy="Leave it out, or serve a model that was trained for it.",
            param="suffix",
        )
    before, after = (tokenizer.encode_user(text, add_special_tokens=False) for text in (gap.before, gap.after))
    return [*tokenizer.first_ids(add_special_tokens), before_id, *before, after_id, *after, between_id]
