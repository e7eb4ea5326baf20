"""What the formats of one-pass tasks share: how such a request enters the common path, and how its answer leaves it.

A one-pass request takes the path of a generating one (see generate.py); its answer is never streamed.
Owns: nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.one_pass import Source
from penstock.frontend.output import TextOutput
from penstock.messages import PoolingParams, SamplingParams
from penstock.messages.bounds import MAX_ENTRIES
from penstock.messages.sampling import check_bound
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest

TO_THE_CONTEXT = -1  # of truncate_prompt_tokens: cut to what the model can read


class OnePassFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What every format takes. truncate_prompt_tokens: None refuses what is too long; TO_THE_CONTEXT or a number of
    tokens cuts it. The names are OpenAI's and vLLM's."""

    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    user: str | None = None


class PooledAnswer(ABC):
    """Renders a whole answer."""

    @abstractmethod
    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """choices: one for each source, in order, with what the engine gave in `pooled`."""

    def event(self, choice: Choice, delta: TextOutput) -> NoReturn:  # noqa: ARG002 the protocol's signature
        raise AssertionError("a one-pass answer is not streamed")

    def last_events(self, usage: Usage) -> NoReturn:  # noqa: ARG002 the protocol's signature
        raise AssertionError("a one-pass answer is not streamed")


def ask_for(
    state: ServerState,
    exchange: Exchange,
    arrival_s: float,
    sources: Sequence[Source],
    pooling: PoolingParams,
    answer: PooledAnswer,
    fields: OnePassFields,
) -> Ask:
    """A decoded request for `pooling` of each source. fields: as the client sent them; they are checked here.

    Raises ValidationError.
    """
    if not sources or len(sources) > MAX_ENTRIES["inputs"]:
        raise ValidationError(
            f"{len(sources)} texts were sent; a request takes 1 to {MAX_ENTRIES['inputs']}.", param="input"
        )
    truncate_tokens, priority = fields.truncate_prompt_tokens, fields.priority
    if truncate_tokens is not None:
        check_bound("truncate_prompt_tokens", truncate_tokens)
    if truncate_tokens == 0:
        raise ValidationError(
            "truncate_prompt_tokens must not be 0.",
            remedy="Use -1 to cut to what the model can read.",
            param="truncate_prompt_tokens",
        )
    if priority is not None:
        check_bound("priority", priority)
    state.check_priority(priority)
    if fields.user is not None and len(fields.user) > MAX_ENTRIES["user_chars"]:
        raise ValidationError(f"user is over {MAX_ENTRIES['user_chars']} characters.", param="user")
    if fields.cache_salt is not None and not 0 < len(fields.cache_salt) <= MAX_ENTRIES["namespace_chars"]:
        raise ValidationError(
            f"cache_salt must have 1 to {MAX_ENTRIES['namespace_chars']} characters.", param="cache_salt"
        )
    request = GenerationRequest(
        request_id=state.new_id(),
        prompts=sources,
        sampling=SamplingParams(),
        pooling=pooling,
        truncate_tokens=truncate_tokens,
        namespace=fields.cache_salt or "",
        priority=priority or 0,
        arrival_s=arrival_s,
        deadline_s=arrival_s + exchange.timeout_s(state.settings.request_timeout),
    )
    return Ask(request, answer, is_stream=False, user=fields.user or "")
