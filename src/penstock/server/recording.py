"""What `serve --record` keeps of a request, once it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from penstock.messages import EngineRequest
from penstock.observability.traffic import TraceRecord, TrafficRecorder, redacted
from penstock.observability.usage import UsageRecord

# Sampling parameters that hold texts or tokens of the user's.
_CONTENTS: Final = ("stop", "bad_words", "bad_words_token_ids", "stop_token_ids", "logit_bias")


def record_request(
    recorder: TrafficRecorder, usage: UsageRecord, request: EngineRequest, answer: Sequence[int], requester: str,
    body: bytes,
) -> None:  # fmt: skip
    """Of a request with several sequences, the first. requester: the key or user, of which a salted hash is kept."""
    arrival_s = request.arrival_s
    is_cancelled = usage.outcome == "cancelled"
    parameters: dict[str, Any] = msgspec.to_builtins(request.sampling)
    record = TraceRecord(
        timestamp=recorder.milliseconds(arrival_s),
        input_length=len(request.prompt_token_ids),
        output_length=len(answer),
        id=usage.request_id,
        tenant=recorder.hasher.name(requester),
        endpoint=usage.endpoint,
        parameters={name: value for name, value in parameters.items() if name not in _CONTENTS},
        status=usage.status,
        finish_reason=usage.outcome,
        cancelled_after_ms=usage.duration_s * 1e3 if is_cancelled else None,
        cached_tokens=None if is_cancelled else usage.num_cached_tokens,
        ttft_ms=usage.time_to_first_token_s * 1e3 if usage.time_to_first_token_s is not None else None,
        e2e_ms=usage.duration_s * 1e3,
        payload=redacted(msgspec.json.decode(body)) if body else None,
    )
    recorder.record(record, request.prompt_token_ids, answer, arrival_s + usage.duration_s)
