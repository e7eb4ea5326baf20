"""Rows that obey a grammar: masks, the end inside the budget, steps that are computed again, a thread that is lost."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from vocabularies import EOS, small_vocabulary

from penstock.messages import GrammarSpec
from penstock.structured import CompiledGrammar, TokenMasks, token_masks
from penstock.structured.backend import Matcher
from penstock.structured.closing import ClosingTokens, closing_path
from penstock.structured.llguidance_backend import LlguidanceBackend

VOCABULARY = small_vocabulary()
VOCAB_SIZE = len(VOCABULARY.token_bytes)
BACKEND = LlguidanceBackend(VOCABULARY)
CLOSING = ClosingTokens(VOCABULARY)
PERSON = GrammarSpec.json_schema({
    "type": "object", "additionalProperties": False, "required": ["name", "tags"],
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}},
                   "inner": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}},
})  # fmt: skip

LONG_KEYS = {
    "type": "object", "additionalProperties": False, "required": ["the first of the names", "another_name"],
    "properties": {"the first of the names": {"enum": ["hello there", "hello here"]},
                   "another_name": {"type": "integer"}},
}  # fmt: skip


def compiled(spec: GrammarSpec) -> CompiledGrammar:
    matcher = BACKEND.compile(BACKEND.text(spec))
    mask = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.int32)
    path = closing_path(matcher, CLOSING, mask, 500)
    return CompiledGrammar(matcher, CLOSING, None if path is None else len(path))


def allowed(masks: TokenMasks, row: int) -> list[int]:
    found = masks.masks([row])
    assert found is not None
    return np.flatnonzero(np.unpackbits(found[1][0].view(np.uint8), bitorder="little")).tolist()


def draw(masks: TokenMasks, row: int, budget: int, chance: random.Random) -> list[int]:
    """Draws at random, but for what is forced, until the output ends or the budget is spent; the tokens without the
    end."""
    drawn: list[int] = []
    while len(drawn) < budget:
        if jump := masks.jumps_of([row]).get(0):
            masks.jump([(row, jump, len(drawn))])
            drawn += jump
            chance.random()
            continue
        choices = allowed(masks, row)
        assert choices, masks.error(row)
        [token_id] = masks.advance([row], [choices[int(chance.random() * len(choices))]], [len(drawn)])
        assert token_id in choices
        if token_id == EOS:
            break
        drawn.append(token_id)
    return drawn


@pytest.mark.parametrize("spec", [
    PERSON, GrammarSpec.json_object(), GrammarSpec.regex(r"[a-f]+-\d+/x"), GrammarSpec.regex(r"(?:é|ab){1,40}"),
    GrammarSpec.structural_tag({"structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}],
                                "triggers": ["<"]}),
])  # fmt: skip
def test_outputs_end_inside_their_budgets(spec: GrammarSpec) -> None:
    grammar = compiled(spec)
    assert grammar.num_closing_tokens is not None
    for seed in range(25):
        chance = random.Random(seed)
        budget = grammar.num_closing_tokens + chance.randint(1, 60)
        masks = TokenMasks(VOCAB_SIZE, 8)
        masks.add(0, grammar, [], budget)
        drawn = draw(masks, 0, budget, chance)
        if len(drawn) == budget:
            assert masks.is_complete(0)
        matcher = grammar.matcher.copy()
        assert all(matcher.consume(token_id) for token_id in drawn)
        assert matcher.is_complete(), b"".join(VOCABULARY.token_bytes[token_id] for token_id in drawn)


def test_an_output_too_short_for_its_grammar_is_not_complete() -> None:
    masks = TokenMasks(VOCAB_SIZE, 8)
    masks.add(0, compiled(PERSON), [], 5)
    assert len(draw(masks, 0, 5, random.Random(0))) == 5
    assert not masks.is_complete(0)


def test_a_row_comes_back_after_a_preemption_as_it_was() -> None:
    grammar = compiled(PERSON)
    for budget, jumps in itertools.product((12, 40, 200, None), (False, True)):
        masks = TokenMasks(VOCAB_SIZE, 8)
        masks.jumps = jumps
        masks.add(3, grammar, [], budget)
        drawn = draw(masks, 3, 10, random.Random(5))
        expected = masks.jumps_of([3]) or allowed(masks, 3)
        masks.remove(3)
        assert not masks
        masks.add(1, grammar, drawn, budget)
        assert (masks.jumps_of([1]) or allowed(masks, 1)) == expected


def test_a_step_that_is_computed_again_changes_nothing() -> None:
    masks = TokenMasks(VOCAB_SIZE, 8)
    masks.add(0, compiled(PERSON), [], None)
    first = allowed(masks, 0)[0]
    assert masks.advance([0], [first], [0]) == [first]
    expected = allowed(masks, 0)
    assert masks.advance([0], [first], [0]) == [first]
    assert allowed(masks, 0) == expected


def test_free_rows_and_rows_without_a_token_are_left_alone() -> None:
    masks = TokenMasks(VOCAB_SIZE, 8)
    assert masks.masks([0, 1]) is None
    assert masks.advance([0, 1], [7, -1], [0, 0]) == [7, -1]
    masks.add(1, compiled(PERSON), [], 9)
    assert masks.masks([0]) is None
    before = allowed(masks, 1)
    assert masks.advance([0, 1], [7, -1], [0, 0]) == [7, -1]
    assert allowed(masks, 1) == before
    assert masks.error(0) == ""


def mask_of(matcher: Matcher) -> list[int]:
    mask = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.int32)
    matcher.fill_mask(mask.ctypes.data, mask.nbytes)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_rows_together_may_draw_what_a_matcher_alone_allows(seed: int) -> None:
    """But for text that is forced, where of the ways to spell it the tokenizer's is left."""
    chance = random.Random(seed)
    specs = [PERSON, GrammarSpec.json_object(), GrammarSpec.regex(r"[a-f]+-\d+/x"), GrammarSpec.json_schema(LONG_KEYS)]
    grammars = [compiled(chance.choice(specs)) for _ in range(8)]
    masks, alone = TokenMasks(VOCAB_SIZE, 8), [grammar.matcher.copy() for grammar in grammars]
    for row, grammar in enumerate(grammars):
        masks.add(row, grammar, [], chance.choice([None, 400]), jumps=False)
    positions = [0] * len(grammars)
    for _ in range(60):
        rows = sorted(chance.sample(range(8), chance.randint(1, 8)))
        drawn = []
        for row in rows:
            choices = allowed(masks, row)
            forced = alone[row].forced_tokens()
            assert choices == (forced[:1] if len(choices) == 1 and forced else mask_of(alone[row]))
            drawn.append(chance.choice(choices))
        assert masks.advance(rows, drawn, [positions[row] for row in rows]) == drawn
        for row, token_id in zip(rows, drawn, strict=True):
            positions[row] += 1
            alone[row].consume(token_id)
            if token_id == EOS:
                masks.remove(row)
                masks.add(row, grammars[row], [], None, jumps=False)
                alone[row], positions[row] = grammars[row].matcher.copy(), 0


_MUCH = bytes(1 << 20)


class SlowMatcher:
    """Takes long for its masks, but for the first: of a processor, or (is_starved) until it gets one."""

    def __init__(self, seconds: float, *, is_starved: bool = False) -> None:
        self.num_masks = 0
        self.seconds = seconds
        self.is_starved = is_starved

    def copy(self) -> SlowMatcher:
        return self

    def consume(self, token_id: int) -> bool:
        return True

    def fill_mask(self, address: int, size_bytes: int) -> None:
        self.num_masks += 1
        if self.num_masks > 1 and self.is_starved:
            time.sleep(self.seconds)
        elif self.num_masks > 1:
            until_s = time.thread_time() + self.seconds
            while time.thread_time() < until_s:
                hashlib.sha256(_MUCH)  # without the interpreter's lock, as the library is

    def is_complete(self) -> bool:
        return False

    def error(self) -> str:
        return ""

    def forced_tokens(self) -> list[int]:
        return []


class PlainBatch:
    """A batch that asks one matcher after another."""

    def fill_masks(self, matchers: Sequence[Matcher], slots: Sequence[int], masks: NDArray[np.int32]) -> None:
        for matcher, slot in zip(matchers, slots, strict=True):
            matcher.fill_mask(masks[slot].ctypes.data, masks[slot].nbytes)


class FaultyBatch(PlainBatch):
    """Fails whenever it is asked."""

    def fill_masks(self, matchers: Sequence[Matcher], slots: Sequence[int], masks: NDArray[np.int32]) -> None:
        raise RuntimeError


def test_forced_text_is_given_out_at_once_or_drawn_token_by_token() -> None:
    grammar = compiled(GrammarSpec.json_schema(LONG_KEYS))
    for seed, budget in itertools.product(range(6), (None, 80, 150)):
        outputs = []
        for jumps in (True, False):
            masks = TokenMasks(VOCAB_SIZE, 8)
            masks.jumps = jumps
            masks.add(0, grammar, [], budget)
            # The same numbers for the same positions, whether or not what lies between was forced.
            outputs.append(draw_by_position(masks, budget or 300, seed))
        assert outputs[0][0] == outputs[1][0]
        assert outputs[0][1] > 0
        assert outputs[1][1] == 0


def draw_by_position(masks: TokenMasks, budget: int, seed: int) -> tuple[list[int], int]:
    """(the output of row 0, how many of its tokens were given out at once)."""
    drawn: list[int] = []
    num_forced = 0
    while len(drawn) < budget and EOS not in drawn:
        if jump := masks.jumps_of([0]).get(0):
            masks.jump([(0, jump, len(drawn))])
            drawn += jump
            num_forced += len(jump)
            continue
        choices = allowed(masks, 0)
        choice = choices[random.Random(f"{seed} {len(drawn)}").randrange(len(choices))]
        drawn += masks.advance([0], [choice], [len(drawn)])
    return drawn, num_forced


def test_a_fault_of_the_library_ends_nothing_that_goes_well_one_by_one() -> None:
    masks, expected = TokenMasks(VOCAB_SIZE, 8, FaultyBatch()), TokenMasks(VOCAB_SIZE, 8)
    for one in (masks, expected):
        one.add(0, compiled(PERSON), [], None)
    assert draw(masks, 0, 30, random.Random(1)) == draw(expected, 0, 30, random.Random(1))


def test_a_matcher_that_hangs_ends_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_masks, "MAX_MASK_S", 0.1)
    masks = TokenMasks(VOCAB_SIZE, 8, PlainBatch())
    grammar = compiled(PERSON)
    masks.add(0, grammar, [], None)
    masks.add(1, CompiledGrammar(SlowMatcher(1.0), CLOSING, None), [], None)  # type: ignore[arg-type]
    masks.add(2, grammar, [], None)
    [brace, *_] = allowed(masks, 0)
    started = time.monotonic()
    masks.advance([0, 1, 2], [brace, 5, brace], [0, 0, 0])
    found = masks.masks([0, 1, 2])
    assert time.monotonic() - started < 0.9
    assert found is not None
    assert "too long" in masks.error(1)
    assert not found[1][1].any()
    assert masks.error(0) == masks.error(2) == ""
    assert (found[1][0] == found[1][2]).all()
    assert allowed(masks, 2)
    masks.advance([2], [allowed(masks, 2)[0]], [1])
    assert allowed(masks, 2)


def test_rows_of_a_busy_machine_are_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread waits for a processor, or all rows together take long: each of them takes little."""
    monkeypatch.setattr(token_masks, "MAX_MASK_S", 0.1)
    masks = TokenMasks(VOCAB_SIZE, 8, PlainBatch())
    matchers = [SlowMatcher(0.35, is_starved=True), *(SlowMatcher(0.03) for _ in range(6))]
    for row, matcher in enumerate(matchers):
        masks.add(row, CompiledGrammar(matcher, CLOSING, None), [], None)  # type: ignore[arg-type]
    rows = list(range(len(matchers)))
    masks.masks(rows)
    masks.advance(rows, [5] * len(rows), [0] * len(rows))
    masks.masks(rows)
    assert [masks.error(row) for row in rows] == [""] * len(rows)
    assert matchers[-1].num_masks > 2  # they were worked on together first
