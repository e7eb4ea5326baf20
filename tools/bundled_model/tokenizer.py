"""The byte-level BPE tokenizer, trained on generated text.

Copying a value is easy when it is cut into the same tokens wherever it stands. So a space is a token of its own, except
before the most frequent words of the language (which are never values), digits stand alone, and punctuation takes the
space behind it.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tools.bundled_model import corpus
from tools.bundled_model.chat import CHAT_TEMPLATE
from tools.bundled_model.values import words

VOCAB_SIZE = 1280
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, IM_START, IM_END)
MARKERS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens that are text: they show in decoded answers."""

_JOINED = (
    "the a an is are was in of to for and at on by it you I me my your from with what who do does can have has as "
    "that than this no not be or how much many one will would like old open door number name day when where which "
    "we they its"
)
_PATTERN = "|".join(
    (
        rf" (?:{'|'.join(words(_JOINED))})(?!\p{{L}})",
        r"\p{Lu}?\p{Ll}+",
        r"\p{Lu}+",
        r"\p{L}+",
        r"\p{N}",
        r"[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*[ \n]?",
        r"\n+",
        r" ",
        r"\s+",
    )
)


def train(seed: int, conversations: int = 12_000) -> Tokenizer:
    """A tokenizer of `VOCAB_SIZE` entries, trained on the first conversations of the final mixture."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(MARKERS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=16,
        show_progress=False,
    )
    stream = itertools.islice(corpus.training(seed, 0, warm_up=0), conversations)
    tokenizer.train_from_iterator((_without_markers(conversation.text()) for conversation in stream), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def _without_markers(text: str) -> str:
    for marker in (*SPECIAL, *MARKERS):
        text = text.replace(marker, "\n")
    return text


def config() -> dict[str, object]:
    """The contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
