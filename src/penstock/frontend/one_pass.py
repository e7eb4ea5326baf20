"""One-pass tasks on the text side: what a model can be asked for, texts to requests, and vectors to scores."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Final, Literal

from penstock.base.errors import ValidationError
from penstock.frontend.output import TextOutput
from penstock.messages import EngineReady, PoolingParams, RequestOutput

Task = Literal["generate", "embed", "classify", "score", "rerank"]

_VERBS: Final[dict[Task, str]] = {
    "generate": "generate text", "embed": "embed texts", "classify": "classify texts", "score": "score pairs of texts",
    "rerank": "rerank documents",
}  # fmt: skip


class UnsupportedTaskError(ValidationError):
    """The served model cannot do what was asked; the message names what it can do."""

    code = "unsupported_task"


@dataclass(frozen=True)
class Pair:
    """Two texts that a cross-encoder reads at once."""

    first: str
    second: str


Source = str | Sequence[int] | Pair


@dataclass(frozen=True)
class ModelTasks:
    """What a served model can be asked for. embedding_size: entries of a vector. labels: of a classifier, in order."""

    names: tuple[str, ...] = ("generate",)
    embedding_size: int = 0
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, ready: EngineReady) -> ModelTasks:
        return cls(ready.tasks, ready.embedding_size, ready.labels)

    def check(self, task: Task) -> None:
        """Raises UnsupportedTaskError."""
        if task not in self.names:
            raise UnsupportedTaskError(
                f"The served model does not {_VERBS[task]}; its tasks: {', '.join(self.names)}.",
                remedy="Serve a model made for that.",
                param="model",
            )


GENERATES: Final = ModelTasks()


class PooledState:
    """The text side of a one-pass request, which has no text."""

    def process(self, output: RequestOutput) -> TextOutput:
        return TextOutput(
            "",
            [],
            finish_reason=output.finish_reason,
            error=output.error,
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            timings=output.timings,
            pooled=output.pooled,
        )


def vector_of(pooled: bytes) -> array[float]:
    """The float32 entries of what an engine gave."""
    vector = array("f")
    vector.frombytes(pooled)
    return vector


@dataclass(frozen=True)
class ScorePlan:
    """How to score pairs of texts with a model.

    sources: what to pass through it. pairs: positions in `sources` whose vectors are compared, one for each score;
    None when each source, a pair itself, gives its score.
    """

    sources: list[Source]
    pooling: PoolingParams
    pairs: list[tuple[int, int]] | None

    def scores(self, pooled: Sequence[bytes]) -> list[float]:
        """One score for each pair of texts, from what the sources gave."""
        vectors = [vector_of(data) for data in pooled]
        if self.pairs is None:
            return [vector[0] for vector in vectors]
        norms = [math.sqrt(sum(map(mul, vector, vector))) or 1.0 for vector in vectors]
        return [
            sum(map(mul, vectors[first], vectors[second])) / (norms[first] * norms[second])
            for first, second in self.pairs
        ]


def plan_scores(
    tasks: ModelTasks, firsts: Sequence[str], seconds: Sequence[str], *, activate: bool = True
) -> ScorePlan:
    """Scores firsts[i] with seconds[i]; a lone first text is scored with every second.

    By a cross-encoder where the model is one, else by the cosine of the texts' vectors.
    Raises UnsupportedTaskError; ValidationError when the numbers of texts do not fit.
    """
    tasks.check("score")
    if not firsts or not seconds or len(firsts) not in (1, len(seconds)):
        raise ValidationError(
            f"{len(firsts)} texts cannot be paired with {len(seconds)}.",
            remedy="Give one text for all, or as many as there are on the other side.",
        )
    if "classify" in tasks.names:
        everyone = [*firsts] * len(seconds) if len(firsts) == 1 else firsts
        pairs: list[Source] = [Pair(first, second) for first, second in zip(everyone, seconds, strict=True)]
        return ScorePlan(pairs, PoolingParams(kind="classify", activate=activate), None)
    first_of = [0] * len(seconds) if len(firsts) == 1 else range(len(firsts))
    positions = [(first, len(firsts) + second) for first, second in zip(first_of, range(len(seconds)), strict=True)]
    return ScorePlan([*firsts, *seconds], PoolingParams(kind="embed"), positions)


def ranking(scores: Sequence[float], top_n: int | None = None) -> list[int]:
    """Indices of the best scores, best first; of equals the earlier one."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
