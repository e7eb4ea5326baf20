"""The mixture: which conversation stands at which place of the training text and of the held-out set.

Every conversation is a pure function of (seed, split, index), so training can stop, resume and be repeated exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tools.bundled_model import facts, json_tasks, tool_tasks, world
from tools.bundled_model.chat import Conversation
from tools.bundled_model.values import Values, is_held_out

Maker = Callable[[Values], Conversation]

# (maker, weight at the start of training, after the warm-up, and from REFINEMENT on). Plain copying teaches the
# circuits that the rest needs; the last stage leaves what is known for what is still wrong.
_MIXTURE: list[tuple[Maker, float, float, float]] = [
    (world.repeat, 8.0, 0.7, 1.2),
    (world.chat, 0.7, 1.6, 0.8),
    (world.numbers, 0.3, 0.8, 1.6),
    (world.unknown, 0.3, 0.6, 0.4),
    (world.names, 0.6, 0.6, 0.3),
    (world.stories, 0.3, 0.3, 0.15),
    (facts.facts, 2.0, 3.6, 3.2),
    (facts.persona, 0.3, 0.5, 0.2),
    (json_tasks.json_record, 1.0, 2.0, 3.2),
    (tool_tasks.tool_call, 0.2, 1.9, 1.6),
    (tool_tasks.tool_answer, 0.2, 0.8, 1.4),
]
WARM_UP = 6480
"""The number of conversations over which the first mixture turns into the second."""
REFINEMENT = 31_518
"""The conversation from which the third mixture holds."""


def training(seed: int, start: int, warm_up: int = WARM_UP) -> Iterator[Conversation]:
    """Training conversations from index `start`; with `warm_up` 0 they are of the second mixture from the first on."""
    index = start
    while True:
        blend = index / warm_up if index < warm_up else 1.0
        refined = index >= REFINEMENT
        weights = [late if refined else first + (mid - first) * blend for _, first, mid, late in _MIXTURE]
        rng = random.Random(f"train:{seed}:{index}")
        yield _draw(rng.choices(_MIXTURE, weights)[0][0], rng, held_out=False)
        index += 1


def held_out(seed: int, per_category: int) -> list[Conversation]:
    """`per_category` conversations of each maker, none of whose values (or dialogues) can occur in training."""
    return [
        _draw(maker, random.Random(f"held out:{seed}:{place}:{index}"), held_out=True)
        for place, (maker, *_) in enumerate(_MIXTURE)
        for index in range(per_category)
    ]


def _draw(maker: Maker, rng: random.Random, held_out: bool) -> Conversation:
    values = Values(rng, held_out)
    while True:
        conversation = maker(values)
        # Some makers have closed answers or short lists of values, so whole dialogues are held out as well.
        if is_held_out(conversation.text()) == held_out:
            return conversation
