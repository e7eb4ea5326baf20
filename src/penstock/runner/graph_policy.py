"""Which padded shapes of steps are worth capturing, from the shapes that are used. No torch, no clock.

A step runs in a captured shape that is at least as large; its padding computes rows that nobody reads. What padding
costs decides how fine the shapes are: rows are nearly free while a step is bound by reading the weights, so small sizes
are powers of two, and from 16 on no more than a quarter is padded. A wider block table costs its copy alone, and so do
the requests of a step with prompts in it, of which there are up to four times as many, and more tokens than these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from penstock.config.engine import EngineConfig

# Larger steps are bound by arithmetic: padding costs what launching their kernels one by one does not.
MAX_DECODE_TOKENS: Final = 512
MAX_MIXED_TOKENS: Final = 128
MAX_GRAPHS: Final = 64
# Of the captured steps and of the logits they leave; the memory plan keeps it free (runner/memory.py).
GRAPH_BYTES: Final = 1 << 30
MIN_USES: Final = 16  # a shape that is used less often is not worth the time of its capture
STEPS_APART: Final = 64  # captures between steps make streams wait
MAX_FAILURES: Final = 3
_FORGET_STEPS: Final = 8192  # after so many steps, what was used counts half
_MOST_PADDING: Final = 2  # a step of up to 16 tokens, or half as large, may run in another captured shape than its own
_FREE_TOKENS: Final = 16
_LEAST_BLOCKS: Final = 32


class StepShape(NamedTuple):
    """Tokens and requests of a step, and the columns of its block table."""

    num_tokens: int
    num_requests: int
    num_blocks: int

    @property
    def is_decode(self) -> bool:
        """One token each: attention launches no kernel for longer shares."""
        return self.num_tokens == self.num_requests

    def holds(self, other: StepShape) -> bool:
        """Whether a step of the other shape runs in this one."""
        is_as_large = all(mine >= theirs for mine, theirs in zip(self, other, strict=True))
        return is_as_large and self.is_decode == other.is_decode


class GraphLimits(NamedTuple):
    """The largest step: its requests, tokens, and columns of the block table. nbytes: for all captures together."""

    max_num_seqs: int
    max_num_tokens: int
    max_blocks: int
    nbytes: int = GRAPH_BYTES

    @classmethod
    def of(cls, config: EngineConfig) -> GraphLimits:
        limits = config.scheduler
        max_blocks = -(-limits.max_model_len // config.cache.block_size)
        return cls(limits.max_num_seqs, limits.max_num_batched_tokens, max_blocks)

    @property
    def max_requests(self) -> int:
        """Of a captured step."""
        return min(self.max_num_seqs, MAX_DECODE_TOKENS)

    def padded(self, step: StepShape) -> StepShape | None:
        """The shape to capture for such steps; None: they are too large."""
        num_blocks = _LEAST_BLOCKS
        while num_blocks < step.num_blocks:
            num_blocks *= 4
        num_blocks = min(num_blocks, self.max_blocks)
        if step.is_decode:
            size = min(padded_size(step.num_tokens), self.max_requests)
            return StepShape(size, size, num_blocks) if step.num_tokens <= size else None
        num_requests = 1
        while num_requests < step.num_requests:
            num_requests *= 4
        num_requests = min(num_requests, self.max_requests)
        # More tokens than requests, or it would be taken for a step of decodes.
        num_tokens = min(padded_size(max(step.num_tokens, num_requests + 1)), self.max_num_tokens)
        if not num_requests < num_tokens <= MAX_MIXED_TOKENS or step.num_tokens > num_tokens:
            return None
        return StepShape(num_tokens, num_requests, num_blocks)

    def allows(self, shape: StepShape) -> bool:
        """Whether it is a shape that this engine would capture (one of a file may not be)."""
        return min(shape) >= 1 and shape.num_tokens >= shape.num_requests and self.padded(shape) == shape


class GraphPolicy:
    """wanted: shapes to capture without having been used, as an earlier engine had.

    Owns: which shapes were used, which are captured.
    """

    def __init__(self, limits: GraphLimits, wanted: Iterable[StepShape] = ()) -> None:
        self.limits = limits
        self._wanted = {shape for shape in wanted if limits.allows(shape)}
        self._uses: Counter[StepShape] = Counter()
        self._captured: dict[StepShape, int] = {}
        self._failed: set[StepShape] = set()
        self._num_steps = 0
        self._captured_at = 0

    @property
    def captured(self) -> list[StepShape]:
        """In the order of their capture."""
        return list(self._captured)

    @property
    def worthwhile(self) -> list[StepShape]:
        """What an engine that starts anew should capture: what this one has, and would."""
        return sorted({*self._captured, *self._wanted - self._failed}, reverse=True)

    @property
    def nbytes(self) -> int:
        return sum(self._captured.values())

    def find(self, step: StepShape) -> StepShape | None:
        """The captured shape for this step; None: it is launched kernel by kernel. Counts the use."""
        self._num_steps += 1
        if self._num_steps % _FORGET_STEPS == 0:
            self._uses = Counter({shape: uses // 2 for shape, uses in self._uses.items() if uses > 1})
        own = self.limits.padded(step)
        if own is None:
            return None
        self._uses[own] += 1
        if own in self._captured:
            return own
        most = _MOST_PADDING * max(step.num_tokens, _FREE_TOKENS // _MOST_PADDING)
        fitting = [shape for shape in self._captured if shape.holds(own) and shape.num_tokens <= most]
        return min(fitting, default=None)

    def waiting(self) -> list[StepShape]:
        """Shapes worth a capture, the largest first: the smaller ones then find room in the memory of the larger."""
        if len(self._captured) >= MAX_GRAPHS or len(self._failed) >= MAX_FAILURES:
            return []
        # What a capture takes is known afterwards: it is taken to be no more than the most that one took so far.
        if self.nbytes + max(self._captured.values(), default=0) > self.limits.nbytes:
            return []
        used = {shape for shape, uses in self._uses.items() if uses >= MIN_USES}
        return sorted((self._wanted | used) - self._captured.keys() - self._failed, reverse=True)

    def next_capture(self, *, is_idle: bool) -> StepShape | None:
        """What to capture now. is_idle: nobody waits for a step."""
        if not is_idle and self._num_steps - self._captured_at < STEPS_APART:
            return None
        waiting = self.waiting()
        return waiting[0] if waiting else None

    def keep(self, shape: StepShape, nbytes: int) -> None:
        """It is captured, in so many bytes more."""
        self._captured[shape] = nbytes
        self._captured_at = self._num_steps

    def refuse(self, shape: StepShape) -> None:
        """It cannot be captured, and is not tried again."""
        self._failed.add(shape)
        self._captured_at = self._num_steps


def padded_size(count: int) -> int:
    """1, 2, 4, 8, 16, then in steps of 8, 16, 32 ...: four to each power of two from 32 on."""
    power = 1 << max(count - 1, 0).bit_length()
    if power <= _FREE_TOKENS:
        return power
    step = max(power // 8, 8)
    return -(-count // step) * step


def usual_shapes(limits: GraphLimits) -> list[StepShape]:
    """What a new engine is likely to meet: every number of decodes, in contexts of up to 2048 tokens."""
    steps = [
        StepShape(count, count, min(num_blocks, limits.max_blocks))
        for count in range(1, limits.max_requests + 1)
        for num_blocks in (_LEAST_BLOCKS, 4 * _LEAST_BLOCKS)
    ]
    shapes = {shape for step in steps if (shape := limits.padded(step)) is not None}
    return sorted(shapes, reverse=True)[:MAX_GRAPHS]
