"""What both endpoints write: errors, usage, log-probabilities, and the fixed bytes of a stream.

An event is glued together from bytes that were encoded once a request and the one string that is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.frontend.output import LogprobEntry, TokenEntry
from penstock.messages import ErrorInfo
from penstock.server.body import ignored_fields
from penstock.server.generate import Usage

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


class WarningBody(msgspec.Struct):
    """Our addition to OpenAI's format: what a client should know that is no error. code is stable."""

    code: str
    message: str


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


def ignored_warnings(names: Sequence[str]) -> list[WarningBody]:
    """What --lenient made of unknown fields."""
    return [WarningBody(**fields) for fields in ignored_fields(names)]


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


class OpenAIErrors:
    """How a wire format with OpenAI's errors says them, before an answer has begun and after."""

    def error_body(self, error: ErrorInfo) -> bytes:
        return error_body(error)

    def error_event(self, error: ErrorInfo) -> bytes:
        return error_event(error)


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        usage.num_prompt_tokens,
        usage.num_output_tokens,
        usage.num_prompt_tokens + usage.num_output_tokens,
        CachedTokens(usage.num_cached_tokens),
    )


def chat_logprobs(entries: Sequence[LogprobEntry], num_top: int) -> ChatLogprobs:
    return ChatLogprobs(
        [
            TokenLogprob(
                entry.token.text, _number(entry.token), list(entry.token.data),
                [TopLogprob(top.text, _number(top), list(top.data)) for top in entry.top[:num_top]],
            )
            for entry in entries
        ]
    )  # fmt: skip


def _number(token: TokenEntry) -> float:
    """The log-probability as JSON can hold it: minus infinity (an excluded token) becomes OpenAI's -9999."""
    return max(token.logprob, -9999.0)


def add_logprobs(lists: CompletionLogprobs, entries: Sequence[LogprobEntry], shift: int, num_top: int) -> None:
    """Appends entries. shift: added to their offsets, which never fall below 0."""
    for entry in entries:
        lists.tokens.append(entry.token.text)
        lists.token_logprobs.append(_number(entry.token))
        lists.top_logprobs.append(_top_by_text(entry, num_top))
        lists.text_offset.append(max(0, entry.text_offset + shift))


def _top_by_text(entry: LogprobEntry, num_top: int) -> dict[str, float]:
    """The likeliest tokens and the chosen one, by text; where two have one text, the likelier is kept."""
    by_text: dict[str, float] = {}
    for top in entry.top[:num_top]:
        by_text.setdefault(top.text, _number(top))
    by_text.setdefault(entry.token.text, _number(entry.token))
    return by_text


def prompt_logprobs(entries: Sequence[LogprobEntry | None] | None) -> list[dict[int, PromptLogprob] | None] | None:
    """vLLM's `prompt_logprobs`: for each prompt token, the chosen one and the likeliest by token id."""
    return None if entries is None else [None if entry is None else _by_token_id(entry) for entry in entries]


def _by_token_id(entry: LogprobEntry) -> dict[int, PromptLogprob]:
    by_id = {top.token_id: PromptLogprob(_number(top), rank, top.text) for rank, top in enumerate(entry.top, start=1)}
    by_id[entry.token.token_id] = PromptLogprob(_number(entry.token), entry.rank, entry.token.text)
    return by_id
