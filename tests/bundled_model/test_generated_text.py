"""The generator: splits never meet, the same seed gives the same text, and every answer ends where it should."""

import itertools
import random
import re

import pytest
from tools.bundled_model import corpus
from tools.bundled_model.values import Values, is_held_out


def _training(start, count):
    return list(itertools.islice(corpus.training(0, start, warm_up=0), count))


def test_the_same_seed_gives_the_same_conversations_from_any_index():
    assert [c.text() for c in _training(0, 60)][40:] == [c.text() for c in _training(40, 20)]


def test_another_seed_gives_other_conversations():
    other = itertools.islice(corpus.training(1, 0, warm_up=0), 20)
    assert [c.text() for c in _training(0, 20)] != [c.text() for c in other]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("draw", ["name", "word", "person", "place", "clock", "price", "code", "email", "anything"])
def test_values_come_from_their_own_split(draw, held_out):
    values = Values(random.Random(5), held_out)
    for _ in range(50):
        text = getattr(values, draw)()
        whole_is_of_the_split = is_held_out(text) == held_out
        # Names of two words and addresses are made of parts, each of the split.
        assert whole_is_of_the_split or all(
            is_held_out(part) == held_out for part in re.findall(r"[a-z]+", text.lower())[:2]
        )


def test_no_held_out_dialogue_occurs_in_training():
    held_out = {conversation.text() for conversation in corpus.held_out(0, 50)}
    assert len(held_out) > 500
    assert not held_out & {conversation.text() for conversation in _training(0, 3000)}


def test_the_answer_is_what_follows_the_prompt():
    for conversation in corpus.held_out(0, 10):
        assert conversation.prompt().endswith("<|im_start|>assistant\n")
        assert conversation.prompt() + conversation.answer() + "<|im_end|>\n" == conversation.text()
        assert conversation.answer()
