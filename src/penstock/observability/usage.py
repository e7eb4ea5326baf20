"""The usage record: exactly one closes every request, also one that failed, was refused or was cancelled.

It never holds a prompt or an output.
Owns: nothing; a record is written once and kept by the log.
"""

from __future__ import annotations

import logging

import msgspec

from penstock.observability.metrics import ServerMetrics

logger = logging.getLogger("penstock.usage")


class UsageRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one request used and how it ended.

    outcome: a finish reason (stop, length, tool_calls), or "cancelled", "refused" (4xx) or "error".
    status: the HTTP status that was sent, or would have been. Times are seconds since the request arrived;
    time_to_first_token_s includes the queue. num_*: sums over all prompts and choices.
    """

    request_id: str
    endpoint: str
    model: str
    outcome: str = ""
    status: int = 200
    error_code: str = ""
    is_stream: bool = False
    num_choices: int = 1
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    queue_s: float | None = None
    time_to_first_token_s: float | None = None
    duration_s: float = 0.0
    user: str = ""
    metadata: dict[str, str] = {}


class UsageLog:
    """Closes requests: one terminal log line and the metrics of each."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def close(self, record: UsageRecord) -> None:
        """Called once for a request, when nothing more will be sent."""
        metrics = self._metrics
        metrics.count_request(record.endpoint, record.outcome)
        if record.error_code:
            metrics.count_error(record.error_code)
        if record.num_output_tokens or record.outcome == "stop":  # a one-pass request has no output tokens
            metrics.request_duration.observe(record.duration_s)
            metrics.request_prompt_tokens.observe(record.num_prompt_tokens)
            metrics.request_output_tokens.observe(record.num_output_tokens)
            if record.queue_s is not None:
                metrics.request_queue.observe(record.queue_s)
        if logger.isEnabledFor(logging.INFO):
            # Made by hand: Logger.info would search the stack for its caller, for every request.
            line = logging.LogRecord(logger.name, logging.INFO, "", 0, "request", None, None)
            line.fields = record
            logger.handle(line)
