"""Tokenizers rebuilt from a GGUF's metadata give the ids of the tokenizers they were converted from."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_checkpoints import CHECKPOINTS, CORPUS

from gguf_files import add_byte_level_tokenizer
from penstock.base.errors import CheckpointError
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.gguf_tokenizer import EMBEDDED_TOKENIZER
from penstock.frontend.text_files import TextFiles
from penstock.frontend.tokenizer import Tokenizer

NUM_STRINGS = 10_000
SCRIPTS = [(32, 126), (0xA0, 0x24F), (0x370, 0x52F), (0x5D0, 0x6FF), (0x900, 0xDFF), (0xE00, 0x11FF), (0x2000, 0x2BFF)]
SCRIPTS += [(0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFFEF), (0x10000, 0x1F9FF), (0x300, 0x36F)]


def varied_strings() -> list[str]:
    """Words of the corpus, cuts of it, numbers, white space and characters of every script, in all mixtures."""
    source = random.Random(11)
    words = " ".join(CORPUS[:8]).split(" ")

    def piece() -> str:
        match source.randrange(7):
            case 0 | 1:
                return source.choice(["", " ", "  "]) + source.choice(words)
            case 2:
                start = source.randrange(60)
                return source.choice(CORPUS)[start : start + source.randrange(30)]
            case 3:
                return str(source.randrange(10 ** source.randrange(1, 12)))
            case 4:
                return "".join(source.choice(" \n\t\r\u00a0\u3000") for _ in range(source.randrange(1, 6)))
            case 5:
                low, high = source.choice(SCRIPTS)
                return "".join(chr(source.randint(low, high)) for _ in range(source.randrange(1, 8)))
        return source.choice(
            ["'s", "'LL", "'re", "don't", "...", "!?", "::", "->", "//", "\r\n", "e\u0301", "<|", "</"]
        )

    return ["".join(piece() for _ in range(source.randrange(1, 9))) for _ in range(NUM_STRINGS)]


def writer_at(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(2)
    writer.add_embedding_length(32)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize(("name", "pre"), [("llama3", "llama-bpe"), ("qwen", "qwen2")])
def test_byte_level_ids_equal_transformers(
    name: str, pre: str, tmp_path: Path, reference_of: Callable[[str], Any]
) -> None:
    tiny = CHECKPOINTS[name]()
    directory, file = tiny.write(tmp_path / "tokenizer"), tmp_path / "model.gguf"
    size = tiny.tokenizer.get_vocab_size(with_added_tokens=True)
    (directory / "config.json").write_text(json.dumps({"vocab_size": size + 3, "model_type": tiny.model_type}))
    writer = writer_at(file)
    add_byte_level_tokenizer(writer, directory, pre)
    if name == "llama3":
        writer.kv_data[0].pop("tokenizer.ggml.add_bos_token")  # it is implied
    finish(writer)
    ours, reference = Tokenizer.load(file), reference_of(name)
    for text in varied_strings():
        assert ours.encode_user(text, add_special_tokens=True) == reference.encode(text), text
    for token_id, token in reference.get_added_vocab().items():
        assert ours.token_to_id(token_id) == token
    assert set(ours.eos_token_ids) == set(tiny.generation["eos_token_id"]) | {ours.token_to_id("<|eom_id|>")} - {None}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=700, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix,
        user_defined_symbols=["<mark>"], control_symbols=["<turn>"], minloglevel=2, num_threads=1,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = reference.vocab_size()
    kinds = {"is_control": 3, "is_unknown": 2, "is_byte": 6}
    types = [next((kind for test, kind in kinds.items() if getattr(reference, test)(i)), 1) for i in range(count)]
    types[reference.piece_to_id("<mark>")] = 4
    file = tmp_path / "model.gguf"
    writer = writer_at(file)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([reference.id_to_piece(token_id) for token_id in range(count)])
    writer.add_token_scores([reference.get_score(token_id) for token_id in range(count)])
    writer.add_token_types(types)
    writer.add_bos_token_id(reference.bos_id())
    writer.add_eos_token_id(reference.eos_id())
    writer.add_unk_token_id(reference.unk_id())
    writer.add_add_space_prefix(prefix)
    finish(writer)
    ours = Tokenizer.load(file)
    for text in varied_strings():
        assert ours.encode_user(text, add_special_tokens=True) == [reference.bos_id(), *reference.encode(text)], text
    assert ours.decode(reference.encode("wörtlich 水 <mark>!")) == "wörtlich 水 <mark>!"
    turn = reference.piece_to_id("<turn>")
    assert turn in ours.encode("a<turn>b", add_special_tokens=False)
    assert turn not in ours.encode_user("a<turn>b", add_special_tokens=False)


def test_an_embedded_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    tiny = CHECKPOINTS["llama3"]()
    file = tmp_path / "model.gguf"
    writer = writer_at(file)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([tiny.tokenizer.id_to_token(index) for index in range(tiny.tokenizer.get_vocab_size())])
    writer.add_string(EMBEDDED_TOKENIZER, tiny.tokenizer.to_str())
    finish(writer)
    ours = Tokenizer.load(file)
    for text in varied_strings()[:500]:
        expected = tiny.tokenizer.encode(text).ids
        assert ours.encode_user(text, add_special_tokens=True) == expected


def test_templates_and_special_tokens_are_found(tmp_path: Path) -> None:
    tiny = CHECKPOINTS["qwen"]()
    directory, file = tiny.write(tmp_path / "tokenizer"), tmp_path / "model.gguf"
    (directory / "config.json").write_text(json.dumps({"vocab_size": tiny.tokenizer.get_vocab_size()}))
    writer = writer_at(file)
    add_byte_level_tokenizer(writer, directory, "qwen2")
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    writer.add_chat_template([{"name": "default", "template": template}, {"name": "tool_use", "template": "T"}])
    finish(writer)
    files = TextFiles.read(file)
    assert files.special_tokens == {"eos_token": "<|im_end|>"}
    assert files.templates == {"default": template, "tool_use": "T"}
    prompt = ChatTemplate.from_files(files).render([{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert prompt.text == "user: hi<|im_end|>"


def refused(tmp_path: Path, change: Callable[[gguf.GGUFWriter], Any]) -> str:
    file = tmp_path / "model.gguf"
    writer = writer_at(file)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_types([1, 1, 1])
    writer.add_token_merges(["a b"])
    change(writer)
    finish(writer)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(file)
    return str(caught.value)


def put(key: str, value: list[Any] | str) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        (writer.add_string if isinstance(value, str) else writer.add_array)(key, value)

    return change


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("tokenizer.ggml.pre", "martian", "martian"),
        ("tokenizer.ggml.model", "rwkv", "rwkv"),
        ("tokenizer.ggml.token_type", [1, 1], "token_type"),
        ("tokenizer.ggml.merges", ["ab"], "no pair"),
        ("tokenizer.ggml.merges", ["a x"], "unusable"),
        ("tokenizer.ggml.tokens", ["a", "b", "a"], "twice"),
        (EMBEDDED_TOKENIZER, "{]", "unusable"),
    ],
)
def test_what_cannot_be_used_is_named(key: str, value: Any, named: str, tmp_path: Path) -> None:
    assert named in refused(tmp_path, put(key, value))


def test_an_endless_piece_is_refused(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        put("tokenizer.ggml.model", "llama")(writer)
        put("tokenizer.ggml.tokens", ["a", "b", "ab" * 100_000])(writer)
        put("tokenizer.ggml.scores", [0.0, 0.0, -1.0])(writer)

    assert "more than 1024 characters" in refused(tmp_path, change)


def test_special_tokens_lie_inside_the_vocabulary(tmp_path: Path) -> None:
    assert "outside" in refused(tmp_path, lambda writer: writer.add_bos_token_id(99))
