"""What both endpoints write: errors, usage, log-probabilities, and the fixed bytes of a stream.

An event is glued together from bytes that were encoded once a request and the one string that is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.messages import ErrorInfo
from penstock.server.generate import Choice, Usage
from penstock.server.text import TokenText

encoder: Final = msgspec.json.Encoder()
encode = encoder.encode
DONE: Final = b"data: [DONE]\n\n"


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class UsageBody(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ErrorFields(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    error: ErrorFields


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """The older format: parallel lists. The first echoed prompt token has no log-probability."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class PromptLogprob(msgspec.Struct):
    """vLLM's format, in an object keyed by token id."""

    logprob: float
    rank: int
    decoded_token: str


def error_body(error: ErrorInfo) -> bytes:
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return encode(ErrorBody(ErrorFields(error.message, kind, error.param, error.code)))


_ERROR_TYPES: Final = {
    401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error",
    503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


def error_event(error: ErrorInfo) -> bytes:
    """The error as the last event of a stream. No [DONE] follows: the answer is not complete."""
    return b"data: " + error_body(error) + b"\n\n"


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        usage.num_prompt_tokens,
        usage.num_output_tokens,
        usage.num_prompt_tokens + usage.num_output_tokens,
        CachedTokens(usage.num_cached_tokens),
    )


def chat_logprobs(tokens: Sequence[TokenText], num_top: int) -> ChatLogprobs:
    return ChatLogprobs(
        [
            TokenLogprob(
                token.text, token.logprob, list(token.data),
                [TopLogprob(top.text, top.logprob, list(top.data)) for top in token.top[:num_top]],
            )
            for token in tokens
        ]
    )  # fmt: skip


def completion_logprobs(tokens: Sequence[TokenText | None], offset: int, first_text: str = "") -> CompletionLogprobs:
    """offset: of the first token in the choice's text. None is the prompt's first token, whose text is first_text."""
    lists = CompletionLogprobs([], [], [], [])
    for token in tokens:
        text = first_text if token is None else token.text
        lists.tokens.append(text)
        lists.token_logprobs.append(None if token is None else token.logprob)
        lists.top_logprobs.append(None if token is None else _top_by_text(token))
        lists.text_offset.append(offset)
        offset += len(text)
    return lists


def _top_by_text(token: TokenText) -> dict[str, float]:
    """The likeliest tokens and the chosen one, by text; where two have one text, the likelier is kept."""
    by_text: dict[str, float] = {}
    for top in token.top:
        by_text.setdefault(top.text, top.logprob)
    by_text.setdefault(token.text, token.logprob)
    return by_text


def prompt_logprobs(choice: Choice) -> list[dict[int, PromptLogprob] | None] | None:
    """vLLM's `prompt_logprobs`: for each prompt token, the chosen one and the likeliest by token id."""
    tokens = choice.state.prompt_logprobs()
    if tokens is None:
        return None
    return [
        None
        if token is None
        else {entry.token_id: PromptLogprob(entry.logprob, entry.rank, entry.text) for entry in (token, *token.top)}
        for token in tokens
    ]
