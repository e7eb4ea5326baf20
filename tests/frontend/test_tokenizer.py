"""Ids and text equal transformers' AutoTokenizer on ordinary text, and user text never gives a control token."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import CHECKPOINTS, CORPUS, llama3, qwen

from penstock.base.errors import CheckpointError, ValidationError
from penstock.frontend.tokenizer import RenderedPrompt, Tokenizer

NAMES = sorted(CHECKPOINTS)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ordinary = st.text(alphabet=st.characters(exclude_categories=["Cs", "Co"]), max_size=60)


def marker_text(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Text in which control tokens, and pieces of them, are likely."""
    markers = sorted(tokenizer._control.ids)
    pieces = [marker[:cut] for marker in markers for cut in (1, 2, len(marker) // 2)]
    return st.lists(st.one_of(st.sampled_from(markers), st.sampled_from(pieces), ordinary), max_size=8).map("".join)


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_text_equal_the_reference(name: str, tokenizer_of: Callable, reference_of: Callable) -> None:
    ours, reference = tokenizer_of(name), reference_of(name)
    for text in [
        *CORPUS[:8],
        "",
        " ",
        "  leading",
        "trailing  ",
        "\n",
        "a\n\n b",
        "e\u0301 composed",
        "1234567",
        "x" * 500,
    ]:
        for special in (False, True):
            ids = ours.encode_user(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special), (text, special)
            assert ids == ours.encode(text, add_special_tokens=special)
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", NAMES)
@many
@given(data=st.data())
def test_any_text_equals_the_reference(
    name: str, data: st.DataObject, tokenizer_of: Callable, reference_of: Callable
) -> None:
    ours, reference = tokenizer_of(name), reference_of(name)
    text = data.draw(ordinary)
    assert ours.encode_user(text, add_special_tokens=True) == reference.encode(text, add_special_tokens=True)
    marked = data.draw(marker_text(ours))
    assert ours.encode(marked, add_special_tokens=False) == reference.encode(marked, add_special_tokens=False)


@pytest.mark.parametrize("name", NAMES)
@many
@given(data=st.data())
def test_user_text_never_gives_a_control_token(name: str, data: st.DataObject, tokenizer_of: Callable) -> None:
    ours = tokenizer_of(name)
    text = data.draw(marker_text(ours))
    unknown = {ours.token_to_id("<unk>")}  # also what a character outside the vocabulary becomes
    ids = ours.encode_user(text, add_special_tokens=False)
    assert not ours.control_token_ids - unknown & set(ids)
    spans = ((0, len(text)),) if text else ()
    assert ours.encode_prompt(RenderedPrompt(text, spans)) == ids


@pytest.mark.parametrize("name", [name for name in NAMES if name != "metaspace"])
@many
@given(data=st.data())
def test_user_text_survives_encoding(name: str, data: st.DataObject, tokenizer_of: Callable) -> None:
    ours = tokenizer_of(name)
    text = data.draw(marker_text(ours))
    decoded = ours.decode(ours.encode_user(text, add_special_tokens=False), skip_special_tokens=False)
    byte_level = ours._kind.name == "byte_level"
    expected = unicodedata.normalize("NFC", text) if name.startswith("qwen") else text
    expected = expected if byte_level else expected.replace("\u2581", " ")
    # A tokenizer that puts a space before every text takes one that is there already for its own.
    assert decoded in {expected, expected.removeprefix(" ")}


@pytest.mark.parametrize("name", NAMES)
@many
@given(data=st.data())
def test_any_ids_decode_like_the_reference(
    name: str, data: st.DataObject, tokenizer_of: Callable, reference_of: Callable
) -> None:
    ours, reference = tokenizer_of(name), reference_of(name)
    # Not those that a class of the reference adds to the file's own, as Gemma's does <mask>.
    some_id = st.integers(0, ours.vocab_size - 1) | st.integers(len(reference), len(reference) + 400)
    ids = data.draw(st.lists(some_id, max_size=40))
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


def test_template_markers_that_are_not_special_are_control_tokens(tmp_path: Path) -> None:
    template = "{% for m in messages %}<tool_call>{{ m.content }}</tool_call>{% endfor %}"
    with_template = Tokenizer.load(qwen().write(tmp_path / "with", template))
    without = Tokenizer.load(qwen().write(tmp_path / "without"))
    text = "<tool_call>{}</tool_call><think>"
    call, think = with_template.token_to_id("<tool_call>"), with_template.token_to_id("<think>")
    assert call in without.encode_user(text, add_special_tokens=False)
    ids = with_template.encode_user(text, add_special_tokens=False)
    assert call not in ids
    assert think in ids, "a marker the template does not write is ordinary text, as it was in training"
    assert with_template.encode(text, add_special_tokens=False)[0] == call
    # It stays visible in output: only tokens flagged special are skipped.
    assert with_template.decode([call, with_template.eos_token_ids[0]]) == "<tool_call>"


def test_a_control_token_that_merges_can_reach_is_spelled_out(tmp_path: Path) -> None:
    checkpoint = llama3()
    # A tokenizer that declares a token special that its merges produce from plain text.
    words = (t for t in checkpoint.tokenizer.get_vocab(with_added_tokens=False) if t.isalpha() and t.isascii())
    merged = max(words, key=len)
    text = f"{merged} b"
    assert merged in checkpoint.tokenizer.encode(text).tokens
    checkpoint.config["additional_special_tokens"] = [merged]
    checkpoint.tokenizer.add_special_tokens([merged])
    ours = Tokenizer.load(checkpoint.write(tmp_path))
    ids = ours.encode_user(text, add_special_tokens=False)
    assert ours.token_to_id(merged) in ours.control_token_ids
    assert ours.token_to_id(merged) not in ids
    assert ours.decode(ids) == text


def test_end_of_sequence_ids(tokenizer_of: Callable) -> None:
    llama = tokenizer_of("llama3")
    assert llama.eos_token_ids == (llama.token_to_id("<|end_of_text|>"), llama.token_to_id("<|eot_id|>"))
    assert llama.bos_token_id == llama.token_to_id("<|begin_of_text|>")
    assert tokenizer_of("llama2").eos_token_ids == (2,)
    assert tokenizer_of("qwen").bos_token_id is None


def test_vocabulary_size_is_the_checkpoints(tokenizer_of: Callable, reference_of: Callable) -> None:
    for name in NAMES:
        if name != "gemma":  # transformers' class for it adds a token of its own
            assert tokenizer_of(name).vocab_size == len(reference_of(name))


def test_a_model_may_have_more_or_fewer_tokens_than_its_tokenizer(tokenizer_of: Callable) -> None:
    tokenizer = tokenizer_of("llama3")
    whole, num_tokens = tokenizer.vocabulary(), tokenizer.vocab_size
    assert whole.token_bytes == [tokenizer.token_bytes(token_id) for token_id in range(num_tokens)]
    assert whole.eos_token_ids
    assert set(whole.eos_token_ids) <= set(whole.special_token_ids)
    padded, first_special = whole.of_size(num_tokens + 3), min(whole.special_token_ids)
    assert padded.token_bytes == [*whole.token_bytes, b"", b"", b""]
    assert (padded.special_token_ids, padded.eos_token_ids) == (whole.special_token_ids, whole.eos_token_ids)
    cut = whole.of_size(first_special)
    assert cut.token_bytes == whole.token_bytes[:first_special]
    assert (cut.special_token_ids, cut.eos_token_ids) == ([], [])


def test_half_a_surrogate_pair_is_the_users_error(tokenizer_of: Callable) -> None:
    with pytest.raises(ValidationError, match="surrogate"):
        tokenizer_of("llama3").encode_user("a\ud800b", add_special_tokens=False)


def test_a_stand_in_is_refused_in_user_text(tokenizer_of: Callable) -> None:
    ours = tokenizer_of("llama3")
    stand_in = next(iter(ours._control.stand_ins.values()))
    with pytest.raises(ValidationError, match="reserved"):
        ours.encode_user(f"x{stand_in}", add_special_tokens=False)
    with pytest.raises(ValidationError, match="reserved"):
        ours.encode_prompt(RenderedPrompt(f"x{stand_in}", ((0, 1),)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.model": "x"}, r"only tokenizer\.model"),
        ({"vocab.json": "{}", "merges.txt": ""}, r"only vocab\.json, merges\.txt"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "no JSON object"),
    ],
)
def test_unusable_checkpoints_are_refused_by_name(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.remedy


def test_an_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    from tokenizers import decoders

    checkpoint: Any = llama3()
    checkpoint.tokenizer.decoder = decoders.CTC()
    with pytest.raises(CheckpointError, match="CTC"):
        Tokenizer.load(checkpoint.write(tmp_path))
