"""Text comes out early and whole: the deltas add up to the decoding of all tokens, and no character comes in parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import CHECKPOINTS

from penstock.frontend.detokenizer import BYTE_OF_CHARACTER, byte_level_bytes
from penstock.frontend.tokenizer import Tokenizer

NAMES = sorted(CHECKPOINTS)
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that stand for one byte each, so that parts of characters are likely."""
    character_of = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
    names = [name for byte in range(256) for name in (f"<0x{byte:02X}>", character_of[byte])]
    return [token_id for token_id in map(tokenizer.token_to_id, names) if token_id is not None]


@pytest.mark.parametrize("name", NAMES)
@many
@given(data=st.data())
def test_deltas_add_up_to_decoding_all(
    name: str, data: st.DataObject, tokenizer_of: Callable, reference_of: Callable
) -> None:
    ours, reference = tokenizer_of(name), reference_of(name)
    # Not those that a class of the reference adds to the file's own, as Gemma's does <mask>.
    any_id = st.integers(0, ours.vocab_size - 1) | st.integers(len(reference), len(reference) + 50)
    ids = data.draw(st.lists(st.sampled_from(byte_ids(ours)) | any_id, max_size=40))
    skip = data.draw(st.booleans())
    whole = reference.decode(ids, skip_special_tokens=skip)
    stream = ours.detokenizer(skip_special_tokens=skip)
    text, rest = "", ids
    while rest:
        size = data.draw(st.integers(1, 5))
        text += stream.add(rest[:size])
        rest = rest[size:]
        assert whole.startswith(text), "what has been given out is final"
    assert text + stream.finish() == whole


@pytest.mark.parametrize("name", NAMES)
@many
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_broken_character_while_text_is_whole(name: str, text: str, tokenizer_of: Callable) -> None:
    ours = tokenizer_of(name)
    ids = ours.encode_user(text.replace("\ufffd", ""), add_special_tokens=False)
    stream = ours.detokenizer(skip_special_tokens=False)
    assert not any("\ufffd" in stream.add((token_id,)) for token_id in ids)
    assert "\ufffd" not in stream.finish()


def test_a_character_comes_when_its_last_byte_does(tokenizer_of: Callable) -> None:
    ours = tokenizer_of("llama3")
    ids = [ours.token_to_id(next(c for c, b in BYTE_OF_CHARACTER.items() if b == byte)) for byte in "水".encode()]
    stream = ours.detokenizer()
    assert [stream.add((token_id,)) for token_id in ids] == ["", "", "水"]
    assert stream.finish() == ""


def test_a_broken_character_is_given_out_only_at_the_end(tokenizer_of: Callable) -> None:
    ours = tokenizer_of("llama3")
    first = ours.token_to_id(next(c for c, b in BYTE_OF_CHARACTER.items() if b == "水".encode()[0]))
    stream = ours.detokenizer()
    assert stream.add((first,)) == ""
    assert stream.finish() == "\ufffd"


def test_a_run_of_bytes_waits_for_what_follows(tokenizer_of: Callable) -> None:
    ours = tokenizer_of("llama2")
    run = [ours.token_to_id(f"<0x{byte:02X}>") for byte in "水é".encode()]
    letter = ours.token_to_id("a")
    stream = ours.detokenizer()
    assert [stream.add((token_id,)) for token_id in [*run, letter]] == ["", "", "", "", "", "水éa"]
    broken = ours.detokenizer()
    assert broken.add(run[:4]) == ""
    assert broken.add((letter,)) == "\ufffd\ufffd\ufffd\ufffda"


def test_the_held_text_stays_short_however_much_is_broken(tokenizer_of: Callable) -> None:
    ours = tokenizer_of("llama3")
    continuation = ours.token_to_id(next(c for c, b in BYTE_OF_CHARACTER.items() if b == 0x80))
    stream = ours.detokenizer()
    assert stream.add([continuation] * 10_000) == "\ufffd" * 10_000
    assert len(stream._held) <= 3


def test_the_byte_alphabet_is_complete() -> None:
    assert sorted(BYTE_OF_CHARACTER.values()) == list(range(256))
    assert byte_level_bytes("Ġa") == b" a"
    assert byte_level_bytes("a b") == b"a b", "a space is no part of the alphabet: the token stands for itself"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "metaspace"])
def test_bytes_of_tokens_add_up(name: str, tokenizer_of: Callable) -> None:
    ours = tokenizer_of(name)
    text = "Öl 水 🙂 and text"
    ids = ours.encode_user(text, add_special_tokens=False)
    assert b"".join(map(ours.token_bytes, ids)).decode().removeprefix(" ") == text
