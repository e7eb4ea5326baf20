"""POST /, /generate and /generate_stream: TGI's format in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.output import LogprobEntry, TextOutput
from penstock.messages import ErrorInfo, GrammarKind, GrammarSpec, SamplingParams
from penstock.server.body import decode_body, ignored_fields
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest
from penstock.server.tgi.schema import NO_OP_VALUES, GenerateRequest, Grammar, Parameters

encode: Final = msgspec.json.Encoder().encode
DEFAULT_NEW_TOKENS: Final = 100  # TGI's
_decoder = msgspec.json.Decoder(GenerateRequest)
_ERROR_TYPES: Final = {400: "validation", 429: "overloaded", 503: "unhealthy", 504: "timeout"}


def error_body(error: ErrorInfo) -> bytes:
    return encode({"error": error.message, "error_type": _ERROR_TYPES.get(error.status, "generation")})


class TgiFormat:
    """The wire format of one of the three routes. streams: always, never, or None: as the request says."""

    endpoint = "tgi"

    def __init__(self, state: ServerState, *, streams: bool | None, in_list: bool = False) -> None:
        """in_list: the whole answer is the only entry of a list, as on `/`."""
        self._state = state
        self._streams = streams
        self._in_list = in_list

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError."""
        state = self._state
        request, ignored = decode_body(_decoder, body, lenient=state.settings.lenient)
        parameters = request.parameters or Parameters()
        is_stream = bool(request.stream) if self._streams is None else self._streams
        if self._streams is False and request.stream:
            raise ValidationError("stream: true needs /generate_stream.", param="stream")
        timeout_s = exchange.timeout_s(state.settings.request_timeout)
        generation = GenerationRequest(
            request_id=state.new_id(),
            prompts=[request.inputs],
            sampling=sampling_of(parameters, with_tokens=is_stream or bool(parameters.details)),
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
        )
        answer = TgiAnswer(request.inputs, parameters, ignored, in_list=self._in_list)
        return Ask(generation, answer, is_stream)

    def error_body(self, error: ErrorInfo) -> bytes:
        return error_body(error)

    def error_event(self, error: ErrorInfo) -> bytes:
        return b"data:" + error_body(error) + b"\n\n"


def sampling_of(parameters: Parameters, *, with_tokens: bool) -> SamplingParams:
    """Raises ValidationError. with_tokens: the answer lists tokens, so it needs their log-probabilities."""
    for name, allowed in NO_OP_VALUES.items():
        value = getattr(parameters, name)
        if value is not None and value not in allowed:
            param = f"parameters.{name}"
            raise ValidationError(f"{param} is not supported with this value.", remedy="Leave it out.", param=param)
    is_sampled = parameters.do_sample or any(
        value is not None for value in (parameters.temperature, parameters.top_k, parameters.top_p)
    )
    given: dict[str, Any] = {
        "max_tokens": DEFAULT_NEW_TOKENS if parameters.max_new_tokens is None else parameters.max_new_tokens,
        "temperature": parameters.temperature if is_sampled else 0.0,
        "top_k": parameters.top_k,
        "top_p": parameters.top_p,
        "repetition_penalty": parameters.repetition_penalty,
        "frequency_penalty": parameters.frequency_penalty,
        "seed": parameters.seed,
        "stop": tuple((parameters.stop or []) + (parameters.stop_sequences or [])),
        "logprobs": (parameters.top_n_tokens or 0) if with_tokens else None,
        "typical_p": parameters.typical_p,
        "grammar": _grammar(parameters.grammar) if parameters.grammar is not None else None,
        "include_stop_str_in_output": True,  # TGI leaves the stop string in the text
    }
    sampling = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    try:
        sampling.validate()
    except ValidationError as error:
        name = {"max_tokens": "max_new_tokens", "logprobs": "top_n_tokens"}.get(error.param or "", error.param or "")
        message = error.message.replace(error.param or "", name, 1)
        raise ValidationError(f"parameters.{message}", param=f"parameters.{name}") from None
    return sampling


def _grammar(wanted: Grammar) -> GrammarSpec:
    param = "parameters.grammar.value"
    if wanted.type == "regex":
        if not isinstance(wanted.value, str):
            raise ValidationError(f"{param} must be a text.", param=param)
        return GrammarSpec(GrammarKind.REGEX, wanted.value, param=param)
    schema: Any = wanted.value
    if wanted.type == "json_schema":
        schema = schema.get("schema") if isinstance(schema, dict) else None
    if schema is None:
        raise ValidationError(f"{param}.schema is required.", param=param)
    return GrammarSpec(GrammarKind.JSON_SCHEMA, schema if isinstance(schema, str) else json.dumps(schema), param=param)


class TgiAnswer:
    """Renders one text, streamed token by token or whole."""

    def __init__(self, inputs: str, parameters: Parameters, ignored: Sequence[str], *, in_list: bool) -> None:
        self._prefix = inputs if parameters.return_full_text else ""
        self._has_details = bool(parameters.details)
        self._num_top = parameters.top_n_tokens or 0
        self._seed = parameters.seed
        self._warnings = ignored_fields(ignored)
        self._in_list = in_list
        self._texts: list[str] = []
        self._num_events = 0
        self._last = b""  # the event with the last token waits for the counts of the whole

    def event(self, choice: Choice, delta: TextOutput) -> bytes:
        """An event for each token; the text of a delta goes with its last one."""
        self._texts.append(delta.text)
        tokens = [_token(entry, "") for entry in delta.logprobs or ()]
        if delta.finish_reason is not None and (not tokens or delta.stop_token_id is not None):
            tokens.append({"id": delta.stop_token_id, "text": "", "logprob": None, "special": True})
        if not tokens:
            return b""
        tokens[-1]["text"] = delta.text
        if delta.text and tokens[-1]["special"]:  # clients leave special tokens out of the text
            tokens[-1]["special"] = False
        tops = [self._top(entry) for entry in delta.logprobs or ()]
        events = [self._event(token, tops[at] if at < len(tops) else None) for at, token in enumerate(tokens)]
        if delta.finish_reason is None:
            return b"".join(b"data:" + encode(event) + b"\n\n" for event in events)
        last = events.pop()
        last["generated_text"] = self._prefix + "".join(self._texts)
        last["details"] = self._ending(choice)
        self._last = b"data:" + encode(last) + b"\n\n"
        return b"".join(b"data:" + encode(event) + b"\n\n" for event in events)

    def last_events(self, usage: Usage) -> bytes:  # noqa: ARG002 - the counts are in the details
        return self._last

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:  # noqa: ARG002 - the counts are in the details
        choice = choices[0]
        answer: dict[str, Any] = {"generated_text": self._prefix + choice.text}
        if self._has_details:
            entries = choice.logprobs or []
            answer["details"] = {
                **self._ending(choice),
                "prefill": [],
                "tokens": [_token(entry, entry.token.text) for entry in entries],
                **({"top_tokens": [self._top(entry) for entry in entries]} if self._num_top else {}),
            }
        elif self._warnings:
            answer["warnings"] = self._warnings
        return encode([answer] if self._in_list else answer)

    def _event(self, token: dict[str, Any], top: list[dict[str, Any]] | None) -> dict[str, Any]:
        self._num_events += 1
        event = {"index": self._num_events, "token": token, "generated_text": None, "details": None}
        if self._num_top and top is not None:
            event["top_tokens"] = top
        return event

    def _top(self, entry: LogprobEntry) -> list[dict[str, Any]]:
        return [
            {"id": top.token_id, "text": top.text, "logprob": max(top.logprob, -9999.0), "special": False}
            for top in entry.top[: self._num_top]
        ]

    def _ending(self, choice: Choice) -> dict[str, Any]:
        if choice.finish_reason == "length":
            reason = "length"
        else:
            reason = "stop_sequence" if isinstance(choice.stop_reason, str) else "eos_token"
        ending: dict[str, Any] = {
            "finish_reason": reason,
            "generated_tokens": choice.num_output_tokens,
            "seed": self._seed,
            "input_length": len(choice.sequenced.request.prompt_token_ids),
        }
        if self._warnings:
            ending["warnings"] = self._warnings
        return ending


def _token(entry: LogprobEntry, text: str) -> dict[str, Any]:
    return {
        "id": entry.token.token_id,
        "text": text,
        "logprob": max(entry.token.logprob, -9999.0),
        "special": False,
    }
