"""What crosses a boundary: requests, outputs, step plans. Plain msgspec structs, nothing is ever pickled.

Owns: nothing (values only).
Never: imports torch, reads a clock, does I/O.
"""

from penstock.messages.engine import (
    AbortRequest,
    CaptureStats,
    EngineFatal,
    EngineInput,
    EngineMessage,
    EngineReady,
    EngineRequest,
    EngineStats,
    ErrorInfo,
    FinishReason,
    OutputBatch,
    RequestOutput,
    RequestTimings,
    ShutdownRequest,
    StartupProgress,
    TokenLogprobs,
)
from penstock.messages.grammar import (
    CallForm,
    CallStyle,
    GrammarKind,
    GrammarSpec,
    ToolCallSpec,
    ToolSpec,
    Vocabulary,
)
from penstock.messages.pooling import PoolingParams
from penstock.messages.sampling import SamplingParams
from penstock.messages.step import (
    BlockCopy,
    NewRequestData,
    SampledTokens,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
)

__all__ = [
    "AbortRequest",
    "BlockCopy",
    "CallForm",
    "CallStyle",
    "CaptureStats",
    "EngineFatal",
    "EngineInput",
    "EngineMessage",
    "EngineReady",
    "EngineRequest",
    "EngineStats",
    "ErrorInfo",
    "FinishReason",
    "GrammarKind",
    "GrammarSpec",
    "NewRequestData",
    "OutputBatch",
    "PoolingParams",
    "RequestOutput",
    "RequestTimings",
    "SampledTokens",
    "SamplingParams",
    "ScheduledRequest",
    "SchedulerOutput",
    "ShutdownRequest",
    "StartupProgress",
    "StepResult",
    "TokenLogprobs",
    "ToolCallSpec",
    "ToolSpec",
    "Vocabulary",
]
