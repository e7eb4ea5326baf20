"""How a tokenizer's tokens become text: which decoder the checkpoint has, and what each token contributes.

Two transformers classes (LlamaTokenizer, Qwen2Tokenizer) ignore the pipeline that tokenizer.json describes and set
up their own; `apply_class_pipeline` does the same here, so that a checkpoint gives the same ids in both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Literal

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from penstock.base.errors import CheckpointError
from penstock.frontend.text_files import TextFiles

METASPACE: Final = "\u2581"
_QWEN2_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How `tokenizers` tidies up the spaces that WordPiece puts before every word.
_WORD_PIECE_CLEANUP: Final = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@dataclass(frozen=True)
class DecoderKind:
    """How tokens join into text.

    "byte_level": tokens are bytes in a printable alphabet; the whole is decoded as UTF-8, invalid bytes as U+FFFD.
    "byte_fallback": tokens are text, or one byte each written <0xNN>; a run of bytes that is not UTF-8 as a whole
    becomes one U+FFFD for each byte. "text": tokens are text.
    replacements: applied to each token of the last two. strip_first_space: the whole text loses one leading space.
    first_token_bare: the first token loses its metaspaces instead of having them replaced.
    continuation: what tokens begin with that continue a word (WordPiece); all others begin one, behind a space.
    """

    name: Literal["byte_level", "byte_fallback", "text"]
    replacements: tuple[tuple[str, str], ...] = ()
    strip_first_space: bool = False
    first_token_bare: bool = False
    continuation: str | None = None


def is_byte_level(backend: Tokenizer) -> bool:
    """Whether the pre-tokenizer or the decoder is (or contains) ByteLevel."""
    return any('"ByteLevel"' in json.dumps(_state(part)) for part in (backend.pre_tokenizer, backend.decoder))


def apply_class_pipeline(backend: Tokenizer, files: TextFiles) -> None:
    """Replaces normalizer, pre-tokenizer and decoder where transformers' class for this checkpoint does."""
    config = files.tokenizer_config
    if files.pipeline == "qwen2" and is_byte_level(backend):
        prefix = bool(config.get("add_prefix_space"))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
    elif files.pipeline == "llama" and not is_byte_level(backend):
        prefix = config.get("add_prefix_space") is not False
        scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE, prepend_scheme=scheme, split=False)
        steps = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def decoder_kind(backend: Tokenizer) -> DecoderKind:
    """Reads the decoder's description. Raises CheckpointError, naming it, when it is none of the known ones."""
    state = _state(backend.decoder)
    steps = state.get("decoders", [state]) if state else []
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return DecoderKind("byte_level")
    if names == ["Metaspace"]:
        bare = steps[0].get("prepend_scheme", "always") != "never"
        return DecoderKind("text", ((steps[0]["replacement"], " "),), first_token_bare=bare)
    if names == ["WordPiece"]:
        clean = _WORD_PIECE_CLEANUP if steps[0].get("cleanup") else ()
        return DecoderKind("text", clean, first_token_bare=True, continuation=steps[0].get("prefix", "##"))
    num_replace = 0
    while num_replace < len(steps) and names[num_replace] == "Replace" and "String" in steps[num_replace]["pattern"]:
        num_replace += 1
    replacements = tuple((step["pattern"]["String"], step["content"]) for step in steps[:num_replace])
    rest = steps[num_replace:]
    if names[num_replace:] in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        strip = rest[2] if len(rest) == 3 else None
        if strip is None or (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0):
            return DecoderKind("byte_fallback", replacements, strip_first_space=strip is not None)
    raise CheckpointError(
        f"tokenizer.json has a decoder that is not supported: {' + '.join(names) or 'none'}.",
        remedy="Supported: ByteLevel, Metaspace, WordPiece, and Replace + ByteFallback + Fuse with an optional Strip.",
    )


def _state(part: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(part.__getstate__()) if part is not None else {}
    return state
