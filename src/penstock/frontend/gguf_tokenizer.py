"""Tokenizer, special tokens and chat templates out of a GGUF's metadata alone.

A file that carries its whole tokenizer.json (key tokenizer.huggingface.json) is taken at its word. Otherwise the
`tokenizers` pipeline is rebuilt: byte-level BPE ("gpt2") with the pre-tokenizer that tokenizer.ggml.pre names, or a
SentencePiece vocabulary with scores ("llama"), whose merges are derived as transformers derives them.

Never: guesses a pre-tokenizer it does not know: the ids would be silently wrong.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from penstock.base.errors import CheckpointError
from penstock.loader import GGUFCheckpoint, GGUFFile

METASPACE: Final = "\u2581"
EMBEDDED_TOKENIZER: Final = "tokenizer.huggingface.json"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_MAX_TEMPLATES: Final = 16
_MAX_PIECE_CHARS: Final = 1024  # every way to cut a piece in two is looked at

# Patterns of byte-level BPE, as the models' own tokenizer.json files have them.
_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH_TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_TAIL}"
)
_GPT4O: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
)
_DIGITS: Final = r"\p{N}"
_DEEPSEEK3_TAIL: Final = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3: Final = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3_TAIL)

_LLAMA3_NAMES: Final = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_GPT2_NAMES: Final = ("gpt-2", "mpt", "olmo", "jais", "phi-2", "gigachat", "roberta-bpe", "jina-es")
_DIGIT_NAMES: Final = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")

# tokenizer.ggml.pre -> the patterns that split a text, one after the other.
PATTERNS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys((*_LLAMA3_NAMES, "smaug-bpe", "dbrx", "chatglm-bpe", "glm4"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo"), (_QWEN2,)),
    **dict.fromkeys(_GPT2_NAMES, (_GPT2,)),
    **dict.fromkeys(_DIGIT_NAMES, (_DIGITS, _GPT2)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
}
# A word that is a token is taken whole, whatever the merges say.
_WHOLE_WORDS: Final = frozenset({*_LLAMA3_NAMES, "tekken", "chatglm-bpe"})
_BEGIN_BY_DEFAULT: Final = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
_NFC: Final = frozenset({"qwen2", "deepseek-r1-qwen"})  # their tokenizers normalize first


class GGUFText:
    """What a GGUF says about text. special_tokens: by name ("bos_token"); templates: by name, "default" the unnamed."""

    def __init__(self, path: Path) -> None:
        with contextlib.closing(GGUFCheckpoint(path)) as checkpoint:
            file = checkpoint.head
            self.name = path.name
            self.architecture = checkpoint.architecture
            self.kind = file.text("tokenizer.ggml.model")
            self.tokens = file.strings("tokenizer.ggml.tokens")
            self.eos_token_ids = [token_id for token_id in checkpoint.end_token_ids() if token_id < len(self.tokens)]
            if not self.tokens or len(set(self.tokens)) != len(self.tokens):
                raise CheckpointError(f"{path.name} has no usable vocabulary: it is empty, or a token is there twice.")
            self.special_tokens = self._special_tokens(file)
            self.templates = _templates(file)
            self.backend = self._backend(file)

    def _special_tokens(self, file: GGUFFile) -> dict[str, str]:
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        found = {}
        for theirs, ours in names.items():
            token_id = file.integer(f"tokenizer.ggml.{theirs}_token_id", -1)
            if token_id >= len(self.tokens):
                raise CheckpointError(f"{self.name}: the {ours} {token_id} is outside the vocabulary.")
            if token_id >= 0:
                found[ours] = self.tokens[token_id]
        return found

    def _backend(self, file: GGUFFile) -> Backend:
        try:
            if EMBEDDED_TOKENIZER in file:
                return Backend.from_str(file.text(EMBEDDED_TOKENIZER))
            types = self._numbers(file, "tokenizer.ggml.token_type")
            if self.kind == "gpt2":
                backend = self._byte_level(file)
            elif self.kind == "llama":
                backend = self._sentencepiece(file, types)
            else:
                raise CheckpointError(
                    f"{self.name} has a tokenizer of the kind {self.kind[:40]!r}, which is not supported.",
                    remedy="Supported are byte-level BPE (gpt2) and SentencePiece BPE (llama).",
                )
            self._add_tokens(backend, types)
            self._surround(backend, file)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"The tokenizer in {self.name} is unusable: {error}.") from error
        return backend

    def _numbers(self, file: GGUFFile, key: str) -> list[Any]:
        values = file.numbers(key)
        if values is None or len(values) != len(self.tokens):
            raise CheckpointError(f"{self.name}: {key} has not one entry for each token.")
        listed: list[Any] = values.tolist()
        return listed

    def _byte_level(self, file: GGUFFile) -> Backend:
        pre = self._pre(file)
        pairs = [merge.partition(" ") for merge in file.strings("tokenizer.ggml.merges")]
        merges = [(left, right) for left, _, right in pairs]
        if not all(left and right for left, right in merges):
            raise CheckpointError(f"{self.name}: tokenizer.ggml.merges has an entry that is no pair.")
        vocabulary = {token: token_id for token_id, token in enumerate(self.tokens)}
        backend = Backend(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS))
        if pre in _NFC:
            backend.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS[pre]]
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_of])
        backend.decoder = decoders.ByteLevel()
        return backend

    def _pre(self, file: GGUFFile) -> str:
        pre = file.text("tokenizer.ggml.pre", "")
        if pre not in PATTERNS:
            raise CheckpointError(
                f"{self.name} has the pre-tokenizer {pre[:40]!r}, which is not known here.",
                remedy=f"Known: {', '.join(sorted(PATTERNS))}. Files that llama.cpp made before May 2024 name none: "
                "convert them again.",
            )
        return pre

    def _sentencepiece(self, file: GGUFFile, types: list[int]) -> Backend:
        scores = self._numbers(file, "tokenizer.ggml.scores")
        vocabulary = {token: token_id for token_id, token in enumerate(self.tokens)}
        pieces = {
            token: scores[token_id]
            for token, token_id in vocabulary.items()
            if types[token_id] not in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        }
        if max(map(len, pieces), default=0) > _MAX_PIECE_CHARS:
            raise CheckpointError(f"{self.name} has a token of more than {_MAX_PIECE_CHARS} characters.")
        unknown = self.special_tokens.get("unk_token")
        backend = Backend(
            models.BPE(vocabulary, _merges(pieces, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        prefix = file.flag("tokenizer.ggml.add_space_prefix", default=True)
        spaces = normalizers.Replace(" ", METASPACE)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), spaces]) if prefix else spaces
        steps = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
        return backend

    def _add_tokens(self, backend: Backend, types: list[int]) -> None:
        named = set(self.special_tokens.values())
        added = []
        for token, kind in zip(self.tokens, types, strict=True):
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) or token in named:
                added.append(AddedToken(token, special=kind != _USER_DEFINED, normalized=False))
        backend.add_tokens(added)

    def _surround(self, backend: Backend, file: GGUFFile) -> None:
        begins = self.kind == "llama" or file.text("tokenizer.ggml.pre", "") in _BEGIN_BY_DEFAULT
        begin = file.flag("tokenizer.ggml.add_bos_token", default=begins)
        end = file.flag("tokenizer.ggml.add_eos_token", default=False)
        bos = self.special_tokens.get("bos_token") if begin else None
        eos = self.special_tokens.get("eos_token") if end else None
        used = [token for token in (bos, eos) if token is not None]
        if used:
            single = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
            ids = [(token, self.tokens.index(token)) for token in dict.fromkeys(used)]
            backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others; the likeliest piece first, as SentencePiece merges."""
    merges = []
    for piece, score in scores.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        usable = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        merges += [(score, pair) for pair in sorted(usable, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1][0]), -len(merge[1][1])))
    return [pair for _, pair in merges]


def _templates(file: GGUFFile) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = [key for key in file.keys() if key.startswith(f"{prefix}.")][:_MAX_TEMPLATES]  # noqa: SIM118  no mapping
    templates = {key.removeprefix(f"{prefix}."): file.text(key) for key in named}
    return {"default": file.text(prefix), **templates} if prefix in file else templates
