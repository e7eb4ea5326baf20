"""Tiny tokenizers in the shapes of the published families, trained on text that is written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12:45 already, isn't it?",
    "Pumpwerk, Schleuse und Stausee: größer, älter, übersät mit Öl und Ärger.",
    "Вода течёт по трубе к турбине; 水は低い方へ流れる。물은 아래로 흐른다。",
    "def flow(rate, head):\n    return rate * head * 9.81  # kilowatts\n\n\tindent\n",
    '{"name": "open_gate", "arguments": {"level": 3, "unit": "metres"}}',
    "user assistant system tool <tool> </tool> [LIST] think function call response",
    "A list:\n- one\n- two\n  - three\n\n\nThe end.   Many    spaces.",
    "Emoji 🙂🙃 and 👩‍👩‍👧 family, flags 🇩🇪, maths ∑∫√, quotes “like ‘this’”.",
] * 8

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass
class TinyCheckpoint:
    """What to write: the tokenizer, and the fields of tokenizer_config.json and config.json."""

    tokenizer: Tokenizer
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, chat_template: str | list[dict[str, str]] | None = None) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(path / "tokenizer.json"))
        added = {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "normalized": token.normalized,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in self.tokenizer.get_added_tokens_decoder().items()
        }
        config = {"added_tokens_decoder": added, **self.config}
        if chat_template is not None:
            config["chat_template"] = chat_template
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        (path / "config.json").write_text(json.dumps({"model_type": self.model_type}))
        if self.generation:
            (path / "generation_config.json").write_text(json.dumps(self.generation))
        return path


def _byte_level(pattern: str, special: list[str], other: list[str], vocab_size: int = 700) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in special])
    tokenizer.add_tokens([AddedToken(content, special=False, normalized=False) for content in other])
    return tokenizer


def qwen(tokenizer_class: str = "Qwen2Tokenizer", model_type: str = "qwen3") -> TinyCheckpoint:
    """Byte-level BPE, NFC, no token before a text; tool and thinking markers are not flagged special."""
    markers = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    tokenizer = _byte_level(QWEN_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], markers)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
    }
    eos = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    return TinyCheckpoint(tokenizer, model_type, config, {"eos_token_id": eos})


def llama3() -> TinyCheckpoint:
    """Byte-level BPE with a token before every text, and reserved special tokens behind the vocabulary."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>"]
    special += [f"<|reserved_special_token_{index}|>" for index in range(20)]
    tokenizer = _byte_level(LLAMA3_PATTERN, special, [])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
            ),
        ]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
    }
    eos = [tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")]
    return TinyCheckpoint(tokenizer, "llama", config, {"eos_token_id": eos})


def _sentencepiece(control: list[str]) -> Tokenizer:
    """BPE over text with metaspaces and byte fallback; the control tokens are the first of the vocabulary."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁")  # for training: no merges across words
    trainer = trainers.BpeTrainer(vocab_size=256 + 500, special_tokens=control + bytes_, show_progress=False)
    # No CJK and no emoji in the corpus, so that those take the way over bytes.
    tokenizer.train_from_iterator([line for line in CORPUS if not {"水", "🙂"} & set(line)], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in control]
    tokenizer = Tokenizer.from_str(json.dumps({**data, "pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def llama2(tokenizer_class: str = "LlamaTokenizer", *, legacy: bool = False) -> TinyCheckpoint:
    """SentencePiece-like BPE as the Llama 2 files describe it."""
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": legacy,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return TinyCheckpoint(_sentencepiece(["<unk>", "<s>", "</s>"]), "llama", config, {"eos_token_id": 2})


def mistral() -> TinyCheckpoint:
    """SentencePiece-like BPE with a Metaspace pre-tokenizer and instruction markers among its control tokens."""
    control = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    tokenizer = _sentencepiece([*control, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"])
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return TinyCheckpoint(tokenizer, "mistral", config, {"eos_token_id": 2})


def gemma() -> TinyCheckpoint:
    """SentencePiece-like BPE without a leading space, with white space and markup among the added tokens."""
    tokenizer = _sentencepiece(["<pad>", "<unk>", "<s>", "<eos>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in ("\n\n", "\n", "<table>")])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    config = {"tokenizer_class": "GemmaTokenizerFast", "bos_token": "<s>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return TinyCheckpoint(tokenizer, "tiny_gemma", config)


def phi3() -> TinyCheckpoint:
    """SentencePiece-like BPE whose markers swallow the white space after them."""
    base = llama2("PreTrainedTokenizerFast")
    markers = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    base.tokenizer.add_special_tokens(
        [AddedToken(content, rstrip=True, special=True, normalized=False) for content in markers]
    )
    base.config["eos_token"] = "<|endoftext|>"
    return base


def metaspace_bpe() -> TinyCheckpoint:
    """Metaspace on both sides, no byte fallback: characters outside the vocabulary are unknown tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return TinyCheckpoint(tokenizer, "llama", {**config, "unk_token": "<unk>"})


CHECKPOINTS: dict[str, Callable[[], TinyCheckpoint]] = {
    "qwen": qwen,
    "qwen2-generic-class": lambda: qwen("PreTrainedTokenizerFast", "qwen2"),
    "qwen3-generic-class": lambda: qwen("PreTrainedTokenizerFast"),
    "llama3": llama3,
    "llama2": llama2,
    "llama2-legacy": lambda: llama2(legacy=True),
    "llama2-file": lambda: llama2("PreTrainedTokenizerFast"),
    "mistral": mistral,
    "gemma": gemma,
    "phi3": phi3,
    "metaspace": metaspace_bpe,
}


def corpus_checkpoint(kind: str, special: list[str], other: list[str]) -> TinyCheckpoint:
    """A tokenizer ("bytes" or "pieces") that knows every marker of a corpus of templates."""
    if kind == "bytes":
        tokenizer = _byte_level(LLAMA3_PATTERN, ["<unk>", "<s>", "</s>", *special], other)
    else:
        tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"])
        tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in special])
        tokenizer.add_tokens([AddedToken(content, normalized=False) for content in other])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return TinyCheckpoint(tokenizer, "llama", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
