"""Text to token ids and back, with `tokenizers` alone.

A user's text can never become a control token, by construction: the tokenizer underneath does not know control tokens
by their text at all. It knows a secret stand-in for each, drawn at load; where trusted text (a chat template's own)
holds a control token, its stand-in is put in, and its id is put back afterwards. See docs/decisions/0003.
Owns: the `tokenizers` object, which never changes after `load`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from penstock.base.errors import CheckpointError, ValidationError
from penstock.frontend.detokenizer import (
    BYTE_OF_CHARACTER,
    ByteLevelDetokenizer,
    ByteTable,
    Detokenizer,
    PieceDetokenizer,
    PieceTable,
)
from penstock.frontend.text_files import TextFiles
from penstock.frontend.token_pipeline import METASPACE, DecoderKind, apply_class_pipeline, decoder_kind
from penstock.frontend.traced_text import Spans
from penstock.messages import Vocabulary

# Markers that tokenizers often fail to flag as special: <|fim_prefix|>, <｜tool▁sep｜> and their like.
_MARKER_SHAPE: Final = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
# No text of use has more characters to a token, even where a tokenizer drops some of them.
LOSSY_CHARS_PER_TOKEN: Final = 1024
_CHARACTER_OF: Final = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}

MAX_KEPT_SEARCHES: Final = 64


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt and which of its characters a user supplied: ascending, disjoint [start, end) ranges."""

    text: str
    user_spans: Spans = ()


@dataclass(frozen=True)
class _PairLayout:
    """The ids before, between and behind the two texts of a pair. is_typed: they are told apart from the second on."""

    before: list[int]
    between: list[int]
    behind: list[int]
    is_typed: bool


@dataclass(frozen=True)
class _ControlTokens:
    """The control tokens of a tokenizer and their stand-ins.

    ids: by content. pattern: matches any of them, longest first. stand_ins: by content. nonce: part of every stand-in.
    first_stand_in_id, real_ids: stand-in id `first_stand_in_id + i` means token `real_ids[i]`.
    spelled: for each control id that plain text could yet produce by merges, the ids of its characters.
    """

    ids: dict[str, int]
    pattern: re.Pattern[str]
    stand_ins: dict[str, str]
    nonce: str
    first_stand_in_id: int
    real_ids: list[int]
    spelled: dict[int, list[int]]


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads; encoding releases the GIL."""

    def __init__(self, backend: Backend, files: TextFiles) -> None:
        """Takes over `backend`, as read from tokenizer.json. Use `load`."""
        backend.no_truncation()
        backend.no_padding()
        apply_class_pipeline(backend, files)
        _add_declared_tokens(backend, files)
        self._backend = backend
        self._kind = decoder_kind(backend)
        self._prefix_ids, self._suffix_ids = _surrounding_ids(backend)
        self._pair_layout = _pair_layout(backend)
        added = backend.get_added_tokens_decoder()
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_tokens = files.special_tokens
        self.bos_token_id = self.token_to_id(files.special_tokens.get("bos_token", ""))
        self.eos_token_ids = self._eos_token_ids(files)
        self._control = _install_control_tokens(backend, added, files, self._kind)
        self.control_token_ids = frozenset(self._control.ids.values())
        self._longest_token: int | None = None
        self._tokens_with: dict[tuple[str, ...], tuple[int, ...]] = {}
        unknown = range(self._control.first_stand_in_id, self._control.first_stand_in_id + len(self._control.ids))
        self._skipped_ids = frozenset((*unknown, *self.special_token_ids))
        self._tables = {False: self._table(unknown), True: self._table(self._skipped_ids)}
        self._marker_tables: dict[frozenset[str], ByteTable | PieceTable] = {}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads the checkpoint's directory. Raises CheckpointError when it has no usable tokenizer.json."""
        return cls.from_files(TextFiles.read(path))

    @classmethod
    def from_files(cls, files: TextFiles) -> Tokenizer:
        if files.backend is not None:
            return cls(files.backend, files)
        file = files.path / "tokenizer.json"
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}.", remedy="Fetch the checkpoint again.") from error
        return cls(backend, files)

    def _eos_token_ids(self, files: TextFiles) -> tuple[int, ...]:
        """What the model's configuration names, then the tokenizer's own, which chat templates end a turn with."""
        own = self.token_to_id(files.special_tokens.get("eos_token", ""))
        return tuple(dict.fromkeys([*files.eos_token_ids, *([] if own is None else [own])]))

    def _table(self, skipped: Iterable[int]) -> ByteTable | PieceTable:
        ids = frozenset(skipped)
        if self._kind.name == "byte_level":
            return ByteTable(self._backend.id_to_token, ids)
        return PieceTable(self._backend.id_to_token, ids, self._kind)

    def _marker_table(self, markers: frozenset[str]) -> ByteTable | PieceTable:
        kept = {
            token_id
            for token_id in self.special_token_ids
            if (content := (self._backend.id_to_token(token_id) or "").strip())
            and any(content in marker for marker in markers)
        }
        table = self._table(self._skipped_ids - kept)
        self._marker_tables[markers] = table
        return table

    # Text to ids

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Trusted text: control tokens written out in it become control tokens.

        add_special_tokens: with what the tokenizer puts around a text (usually a token that begins a sequence).
        Raises ValidationError when the text is no valid Unicode.
        """
        return self._surround(self._real_ids(self._encode(self._with_stand_ins(text))), add_special_tokens)

    def encode_user(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text from a user: whatever it holds, no control token comes of it."""
        self._refuse_stand_ins(text)
        return self._surround(self._encode(text), add_special_tokens)

    def encode_whole(self, text: str, second: str | None, max_tokens: int | None) -> tuple[list[int], int]:
        """A user's text, or a pair of texts, for a one-pass task: the ids, and where the second text starts.

        That is 0 for a lone text and where the model does not tell the two apart. max_tokens: the text (of a pair the
        second) is cut so that no more ids come out, but never to less than nothing.
        Raises ValidationError for invalid Unicode, and for a pair where the tokenizer has no way of joining two texts.
        """
        self._refuse_stand_ins(text)
        ids = self._encode(text)
        if second is None:
            before, behind = self._prefix_ids, self._suffix_ids
            return [*before, *_cut(ids, max_tokens, len(before) + len(behind)), *behind], 0
        layout = self._pair_layout
        if layout is None:
            raise ValidationError("This model's tokenizer does not join two texts.", param="model")
        self._refuse_stand_ins(second)
        start = [*layout.before, *ids, *layout.between]
        second_ids = _cut(self._encode(second), max_tokens, len(start) + len(layout.behind))
        return [*start, *second_ids, *layout.behind], len(start) if layout.is_typed else 0

    def encode_prompt(self, prompt: RenderedPrompt) -> list[int]:
        """A rendered chat: control tokens the template wrote become control tokens, those in user text do not."""
        self._refuse_stand_ins(prompt.text)
        pieces: list[str] = []
        position = 0
        for start, end in prompt.user_spans:
            pieces += (self._with_stand_ins(prompt.text[position:start]), prompt.text[start:end])
            position = end
        pieces.append(self._with_stand_ins(prompt.text[position:]))
        return self._real_ids(self._encode("".join(pieces)))

    def _with_stand_ins(self, trusted: str) -> str:
        return self._control.pattern.sub(lambda match: self._control.stand_ins[match[0]], trusted)

    def _refuse_stand_ins(self, text: str) -> None:
        if self._control.nonce in text:
            raise ValidationError("The text holds a sequence that is reserved here.", remedy="Restart the server.")

    def _encode(self, text: str) -> list[int]:
        try:
            # The batch call releases the GIL, the plain one holds it for the whole text.
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise ValidationError("The text is no valid Unicode: it holds half of a surrogate pair.") from error
        control = self._control
        if control.spelled and not control.spelled.keys().isdisjoint(ids):
            ids = [part for token_id in ids for part in control.spelled.get(token_id, (token_id,))]
        return ids

    def _real_ids(self, ids: list[int]) -> list[int]:
        first, real_ids = self._control.first_stand_in_id, self._control.real_ids
        return [token_id if token_id < first else real_ids[token_id - first] for token_id in ids]

    def _surround(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        return [*self._prefix_ids, *ids, *self._suffix_ids] if add_special_tokens else ids

    def first_ids(self, add_special_tokens: bool) -> list[int]:
        """What the tokenizer puts before a text."""
        return list(self._prefix_ids) if add_special_tokens else []

    # Ids to text

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        markers: frozenset[str] = frozenset(),
        keep_first_space: bool = False,
    ) -> Detokenizer:
        """A new stream of text. Ids outside the vocabulary contribute nothing.

        markers: special tokens that are one, or part of one, are text all the same; each set gets a table of its own.
        keep_first_space: the text is exactly the tokens' bytes, also where the decoder would drop a space it begins
        with (what a grammar has allowed must not change).
        """
        table = self._tables[skip_special_tokens]
        if markers and skip_special_tokens:
            table = self._marker_tables.get(markers) or self._marker_table(markers)
        if isinstance(table, ByteTable):
            return ByteLevelDetokenizer(table)
        kind = replace(self._kind, strip_first_space=False, first_token_bare=False) if keep_first_space else self._kind
        return PieceDetokenizer(table, kind)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all these tokens."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return (stream.add(token_ids) if token_ids else "") + stream.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token, which may be part of a character. Empty for an id outside the vocabulary."""
        piece = self._tables[False][token_id]
        if piece is None:
            return b""
        if isinstance(piece, int):
            return bytes((piece,))
        return piece.encode() if isinstance(piece, str) else piece

    def vocabulary(self) -> Vocabulary:
        """What an engine needs to constrain outputs, of all tokens there are. Takes 0.2 s for 100,000 tokens."""
        return Vocabulary(
            token_bytes=[self.token_bytes(token_id) for token_id in range(self.vocab_size)],
            special_token_ids=sorted(self.special_token_ids | self.control_token_ids),
            eos_token_ids=list(self.eos_token_ids),
            tokenizer=self._backend.to_str(),
        )

    def tokens_with(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        """The ids of all tokens that hold one of the texts; 0.1 s for 100,000 tokens when they are new."""
        if texts not in self._tokens_with:
            if len(self._tokens_with) >= MAX_KEPT_SEARCHES:
                self._tokens_with.clear()
            wanted = [text.encode(errors="replace") for text in texts]
            found = (
                token_id
                for token_id in range(self.vocab_size)
                if any(one in self.token_bytes(token_id) for one in wanted)
            )
            self._tokens_with[texts] = tuple(found)
        return self._tokens_with[texts]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact content."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @property
    def longest_token(self) -> int:
        """Characters of the longest token: no text is shorter in tokens than its length divided by this."""
        if self._longest_token is None:
            self._longest_token = max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)
            if self._kind.continuation is not None:  # long words become one unknown token, white space none
                self._longest_token = max(self._longest_token, LOSSY_CHARS_PER_TOKEN)
        return self._longest_token


def _add_declared_tokens(backend: Backend, files: TextFiles) -> None:
    """Adds what tokenizer_config.json declares and tokenizer.json lacks; where both have it, the declared flags win."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = [AddedToken(content, **flags) for _, content, flags in files.added_tokens]
    known.update(content for _, content, _ in files.added_tokens)
    named = [*files.special_tokens.values(), *files.extra_special_tokens]
    missing = [content for content in dict.fromkeys(named) if content and content not in known]
    backend.add_tokens(declared + [AddedToken(content, special=True, normalized=False) for content in missing])


def _surrounding_ids(backend: Backend) -> tuple[list[int], list[int]]:
    """The ids the post-processor puts before and after a text."""
    inner = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    raise CheckpointError("The post-processor in tokenizer.json changes the tokens of the text itself.")


def _pair_layout(backend: Backend) -> _PairLayout | None:
    """How the post-processor joins two texts; None where it leaves one out or changes them."""
    first, second = (backend.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
    whole = backend.encode("a", "b", add_special_tokens=True)
    ids, types = whole.ids, whole.type_ids
    for start in range(len(ids) - len(first) + 1):
        end = start + len(first)
        if ids[start:end] != first:
            continue
        for again in range(end, len(ids) - len(second) + 1):
            if ids[again : again + len(second)] == second:
                behind = ids[again + len(second) :]
                return _PairLayout(ids[:start], ids[end:again], behind, is_typed=types[again] == 1)
    return None


def _cut(ids: list[int], max_tokens: int | None, num_around: int) -> list[int]:
    return ids if max_tokens is None else ids[: max(max_tokens - num_around, 0)]


def _is_control(token: AddedToken, template_text: str) -> bool:
    content: str = token.content
    if token.special or _MARKER_SHAPE.fullmatch(content):
        return True
    # Added tokens that a template writes are its markers, but not words or white space that merely occur in it.
    return content in template_text and not content.isspace() and not content.isalnum()


def _install_control_tokens(
    backend: Backend, added: dict[int, Any], files: TextFiles, kind: DecoderKind
) -> _ControlTokens:
    """Makes `backend` blind to control tokens written out, and teaches it their stand-ins."""
    template_text = "\n".join(files.templates.values())
    control = {token_id: token for token_id, token in sorted(added.items()) if _is_control(token, template_text)}
    nonce = f"\U000f0000{secrets.token_hex(8)}\U000f0001"
    first = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
    if any(backend.id_to_token(first + index) is not None for index in range(len(control))):
        raise CheckpointError("The vocabulary in tokenizer.json has gaps: ids above its size are in use.")
    # Flagged special, a token is text to the tokenizer while encode_special_tokens is set.
    backend.add_special_tokens(
        [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=True,
            )
            for token in control.values()
        ]
    )
    backend.encode_special_tokens = True
    stand_ins = {token.content: f"{nonce}{index}\U000f0001" for index, token in enumerate(control.values())}
    backend.add_tokens(
        [
            AddedToken(stand_ins[token.content], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
            for token in control.values()
        ]
    )
    ids = {token.content: token_id for token_id, token in control.items()}
    installed = [backend.token_to_id(stand_in) for stand_in in stand_ins.values()]
    assert installed == list(range(first, first + len(installed))), "stand-ins must lie behind all other ids"
    contents = sorted(ids, key=len, reverse=True)
    return _ControlTokens(
        ids=ids,
        pattern=re.compile("|".join(map(re.escape, contents)) or r"(?!)"),
        stand_ins=stand_ins,
        nonce=nonce,
        first_stand_in_id=first,
        real_ids=list(ids.values()),
        spelled=_spelled(backend, ids, files, kind),
    )


def _spelled(backend: Backend, ids: dict[str, int], files: TextFiles, kind: DecoderKind) -> dict[int, list[int]]:
    """How to write control tokens that the model's own vocabulary holds, so that plain text might merge into them."""
    unknown = files.special_tokens.get("unk_token")  # stands for characters outside the vocabulary, in any text
    spelled = {}
    for content, token_id in ids.items():
        if content != unknown and backend.model.token_to_id(content) == token_id:
            spelled[token_id] = [part for character in content for part in _character_ids(backend, character, kind)]
    return spelled


def _character_ids(backend: Backend, character: str, kind: DecoderKind) -> list[int]:
    """The ids of one character taken by itself: its own token, else its bytes. Empty when it has neither."""
    if kind.name == "byte_level":
        names = [_CHARACTER_OF[byte] for byte in character.encode()]
    else:
        own = METASPACE if character == " " else character
        names = [own] if backend.model.token_to_id(own) is not None else [f"<0x{byte:02X}>" for byte in own.encode()]
    ids = [backend.model.token_to_id(name) for name in names]
    return [token_id for token_id in ids if token_id is not None]
