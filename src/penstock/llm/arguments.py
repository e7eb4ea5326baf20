"""One or many: what the Python API's calls take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Conversation = Sequence[Mapping[str, Any]]


def as_prompts(prompts: Any) -> list[str | Sequence[int]]:
    """A text or a list of token ids is one prompt; anything else is several."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def as_conversations(conversations: Any) -> list[Conversation]:
    """A list of messages is one conversation; anything else is several."""
    if len(conversations) and isinstance(conversations[0], Mapping):
        return [conversations]
    return list(conversations)
