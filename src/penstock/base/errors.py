"""The errors a user can meet. Each says what happened, why, and what to do.

`code` is stable and machine-readable; `status` is the HTTP status the server maps it to (decided here, once, so
that every protocol answers alike). Text never carries a prompt, an address or a stack trace.
"""

from __future__ import annotations


class PenstockError(Exception):
    """Base of all expected errors. `param` names the offending request field or setting, when there is one."""

    code = "internal_error"
    status = 500

    def __init__(self, message: str, *, remedy: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ValidationError(PenstockError):
    """A request is malformed or outside its bounds."""

    code = "invalid_request"
    status = 400


class ContextOverflowError(ValidationError):
    """Prompt plus requested output cannot fit the model's context."""

    code = "context_length_exceeded"


class UnknownModelError(PenstockError):
    code = "model_not_found"
    status = 404


class QueueFullError(PenstockError):
    """The bounded waiting queue has no room; `retry_after_s` is computed from the measured drain rate."""

    code = "queue_full"
    status = 429

    def __init__(self, message: str, *, retry_after_s: float, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(PenstockError):
    code = "deadline_exceeded"
    status = 504


class RequestFailedError(PenstockError):
    """The engine could not compute a request."""

    code = "request_failed"


class DrainingError(PenstockError):
    """The server is shutting down and takes no new work."""

    code = "draining"
    status = 503


class EngineDeadError(PenstockError):
    code = "engine_dead"
    status = 503


class DeviceLostError(PenstockError):
    """A GPU's context is beyond use (an illegal access, a memory fault): only another process can go on."""

    code = "device_lost"
    status = 503


class ConfigError(PenstockError):
    """A setting is unknown, malformed, or contradicts another."""

    code = "invalid_configuration"


class CheckpointError(PenstockError):
    """The checkpoint is missing, corrupt, unsafe or of an unlisted architecture."""

    code = "invalid_checkpoint"


class MemoryPlanError(PenstockError):
    """What was asked for cannot fit in memory."""

    code = "insufficient_memory"
