"""Forced text is spelled as the model's tokenizer spells it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from vocabularies import small_vocabulary

import penstock.assets
from penstock.frontend.tokenizer import Tokenizer
from penstock.messages import Vocabulary
from penstock.structured.spelling import Spelling

BUNDLED = Tokenizer.load(Path(penstock.assets.__file__).parent / "model")
SPELLING = Spelling(BUNDLED.vocabulary())


@given(st.text(max_size=40))
def test_it_is_the_tokenizers(text: str) -> None:
    ids = SPELLING(text.encode())
    assert b"".join(map(BUNDLED.token_bytes, ids)) == text.encode()
    assert ids == BUNDLED.encode_user(text, add_special_tokens=False)


def test_what_is_kept_is_what_was_spelled() -> None:
    spelling = Spelling(BUNDLED.vocabulary())
    for index in (*range(5000), 0, 4999, 10**300):
        text = f'"key {index}": '
        assert spelling(text.encode()) == BUNDLED.encode_user(text, add_special_tokens=False)


def metaspace_vocabulary() -> Vocabulary:
    """As Llama 2 has it: every text begins with a space."""
    pieces = ["<unk>", "</s>", "\u2581", "\n", "a", "b", "\u2581a", "ab", "\u2581ab"]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b")]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    token_bytes = [piece.replace("\u2581", " ").encode() for piece in pieces]
    return Vocabulary(token_bytes, [0, 1], [1], backend.to_str())


@pytest.mark.parametrize(("text", "spelled"), [
    (b"ab", [7]), (b" ab", [8]), (b"a ab", [4, 8]), (b"aba", [7, 4]), (b"", []), (b"\n", [3]), (b"x", []),
])  # fmt: skip
def test_a_space_that_the_tokenizer_puts_before_every_text_is_left_out(text: bytes, spelled: list[int]) -> None:
    assert Spelling(metaspace_vocabulary())(text) == spelled


def test_without_a_tokenizer_the_longest_tokens_are_taken() -> None:
    vocabulary = small_vocabulary()
    spelling = Spelling(vocabulary)
    for text in (b'{"name": "hello', "é<tool_call>".encode(), b"\xff\x00"):
        assert b"".join(vocabulary.token_bytes[token_id] for token_id in spelling(text)) == text
        assert set(vocabulary.special_token_ids).isdisjoint(spelling(text))
    assert len(spelling(b'{"name": "hello')) == 5
