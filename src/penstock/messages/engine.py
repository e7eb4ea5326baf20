"""Messages between a frontend and an engine (msgpack over a local socket, or handed over in process)."""

from __future__ import annotations

import enum

import msgspec

from penstock.base.errors import PenstockError, QueueFullError
from penstock.messages.grammar import Vocabulary
from penstock.messages.pooling import PoolingParams
from penstock.messages.sampling import SamplingParams


class FinishReason(enum.StrEnum):
    """Why a request ended. Closed: every accepted request gets exactly one."""

    STOP = "stop"  # an end-of-sequence or stop token, a stop string, or max_tokens where the grammar is satisfied
    LENGTH = "length"  # max_tokens, or the end of the context; with a grammar: the output is cut off
    ABORT = "abort"  # the client went away or asked to stop
    ERROR = "error"  # this request failed; `error` says why
    TIMEOUT = "timeout"  # its deadline passed


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """An error as a value: the fields of a PenstockError. retry_after_s: seconds, for 429."""

    code: str
    status: int
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: Exception) -> ErrorInfo:
        """The error as a value. What we did not foresee is reported without its details: they may hold a prompt."""
        if isinstance(error, PenstockError):
            retry_after_s = error.retry_after_s if isinstance(error, QueueFullError) else None
            return cls(error.code, error.status, str(error), error.param, retry_after_s)
        return cls("internal_error", 500, f"The request failed inside the server ({type(error).__name__}).")


class EngineRequest(msgspec.Struct, tag="request", kw_only=True, array_like=True, gc=False):
    """One sequence to generate, or to pass through the model once. `n > 1` has already become n of these.

    Times are seconds of time.monotonic() (one clock for all processes of a machine).
    stop_token_ids: end-of-sequence and stop tokens together, empty when they are to be ignored.
    namespace: whose prefix cache this request may use. priority: lower runs first.
    pooling: makes this a one-pass request: its only output is a vector, and max_tokens is 1.
    pins: (leading tokens, seconds): their blocks are evicted after all others so long after the request has ended.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    namespace: str = ""
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None
    pooling: PoolingParams | None = None
    pins: tuple[tuple[int, float], ...] = ()


class AbortRequest(msgspec.Struct, tag="abort", array_like=True):
    """Ends requests. Unknown ids are ignored: they may have finished meanwhile.

    finish_reason: STOP when the frontend found a stop string, else ABORT.
    """

    request_ids: list[str]
    finish_reason: FinishReason = FinishReason.ABORT


class ShutdownRequest(msgspec.Struct, tag="shutdown", array_like=True):
    """Finish what runs within `drain_s` seconds, abort the rest, then exit. Sent once."""

    drain_s: float = 0.0


EngineInput = EngineRequest | AbortRequest | ShutdownRequest | Vocabulary


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probability of one token, its rank (1 = most likely) and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class RequestTimings(msgspec.Struct, array_like=True, gc=False):
    """time.monotonic() seconds of the phases of a request, and how often it was preempted."""

    arrival_s: float
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0
    num_preemptions: int = 0


class RequestOutput(msgspec.Struct, array_like=True, gc=False):
    """What one step gave one request. The one with a finish_reason is the last, and carries the timings.

    stop_token_id: the token that ended it, which is not text (None when a stop string or length did).
    prompt_logprobs: for each prompt token but the first; sent once, with the first output.
    pooled: what a one-pass request asked for, as little-endian float32; it finishes with STOP.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    timings: RequestTimings | None = None
    pooled: bytes | None = None


class CaptureStats(msgspec.Struct, array_like=True, gc=False):
    """Steps that a GPU replays instead of being given their kernels one by one (runner/step_graphs.py)."""

    num_captured: int = 0  # shapes
    num_waiting: int = 0  # shapes that are worth it, as of the last capture
    num_failed: int = 0
    nbytes: int = 0
    seconds: float = 0.0  # of all captures
    num_replayed: int = 0  # steps
    num_launched: int = 0  # steps whose shape was not captured


class EngineStats(msgspec.Struct, array_like=True, gc=False):
    """State and counters of an engine; counters only grow. Sent with output batches and when idle."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0  # cached and held by nobody: free + cached + referenced == num_blocks
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_rejected: int = 0
    step_started_s: float = 0.0  # monotonic; 0 when no step is in flight
    last_step_s: float = 0.0  # duration of the last finished step
    drain_tokens_per_s: float = 0.0
    num_invariant_checks: int = 0  # an engine checks all invariants when it falls idle
    num_invariant_violations: int = 0
    num_host_blocks: int = 0  # slots of the host tier, and those that hold a block
    num_host_cached_blocks: int = 0
    num_host_hit_tokens: int = 0  # of num_cached_prompt_tokens
    num_offloaded_blocks: int = 0
    num_restored_blocks: int = 0
    captures: CaptureStats = msgspec.field(default_factory=CaptureStats)


class OutputBatch(msgspec.Struct, tag="outputs", array_like=True):
    outputs: list[RequestOutput]
    stats: EngineStats | None = None


class StartupProgress(msgspec.Struct, tag="startup", array_like=True):
    """A start-up phase began or moved on. fraction: 0 to 1. seconds: set when the phase ended."""

    phase: str
    fraction: float = 0.0
    seconds: float | None = None
    detail: str = ""


class EngineReady(msgspec.Struct, tag="ready", kw_only=True, array_like=True):
    """The engine serves. What a frontend needs to know of it.

    weights_table: how weights are held and multiplied, and their sizes.
    tasks: what the model can be asked for (config.tasks). embedding_size: entries of a vector. labels: of a classifier.
    """

    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    instruction_set: str
    phases: list[tuple[str, float]]
    memory_table: str = ""
    weights_table: str = ""
    tasks: tuple[str, ...] = ("generate",)
    embedding_size: int = 0
    labels: tuple[str, ...] = ()


class EngineFatal(msgspec.Struct, tag="fatal", array_like=True):
    """The engine cannot start or go on. It exits after this."""

    error: ErrorInfo


EngineMessage = OutputBatch | StartupProgress | EngineReady | EngineFatal
