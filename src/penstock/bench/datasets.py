"""Where requests come from: generated workloads, and files of prompts. Traces, which bring their own times: traces.py.

A dataset is an iterator of PlannedRequests without times; everything drawn follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from penstock.base.errors import ConfigError
from penstock.bench.plan import PlannedRequest, Prompt
from penstock.bench.prompts import PromptMaker

T = TypeVar("T")
CHARACTERS_PER_TOKEN: Final = 4
# Without these, answers end where the model likes: two servers would be given different work.
FIXED_LENGTH: Final[dict[str, Any]] = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Shape:
    """Of generated requests. spread: lengths are drawn from (1 +- spread) times the wanted one.

    levels: of a tree of shared prefixes, (tokens, branches) from the root on. turns, think_s: of conversations.
    """

    input_len: int = 512
    output_len: int = 128
    spread: float = 0.0
    levels: tuple[tuple[int, int], ...] = ()
    turns: int = 4
    think_s: float = 1.0
    parameters: dict[str, Any] = field(default_factory=lambda: dict(FIXED_LENGTH))

    def input_of(self, source: random.Random) -> int:
        return _drawn(source, self.input_len, self.spread)

    def output_of(self, source: random.Random) -> int:
        return _drawn(source, self.output_len, self.spread)


def _drawn(source: random.Random, length: int, spread: float) -> int:
    return max(1, round(length * source.uniform(1 - spread, 1 + spread))) if spread else length


def random_prompts(shape: Shape, maker: PromptMaker, count: int, seed: int) -> Iterator[PlannedRequest]:
    """Nothing shared: the worst case for a prefix cache, and for speculation."""
    source = random.Random(f"{seed} random")
    for index in range(count):
        tokens = maker.tokens(source, shape.input_of(source))
        yield _request(shape, maker.prompt(tokens), len(tokens), shape.output_of(source), index=index)


def prefix_tree(shape: Shape, maker: PromptMaker, count: int, seed: int) -> Iterator[PlannedRequest]:
    """Each prompt walks the tree from the root, a branch drawn at every level, and ends in tokens of its own."""
    source = random.Random(f"{seed} tree")
    for index in range(count):
        path, tokens = f"{seed}", list[int]()
        for size, branches in shape.levels:
            path = f"{path}/{source.randrange(branches)}"
            tokens += maker.block(path, size)
        tokens += maker.tokens(source, shape.input_of(source))
        yield _request(shape, maker.prompt(tokens), len(tokens), shape.output_of(source), index=index)


def conversations(shape: Shape, maker: PromptMaker, count: int, seed: int) -> Iterator[PlannedRequest]:
    """`count` requests in conversations of `turns`, each after the answer to the one before and a time to think."""
    source = random.Random(f"{seed} conversations")
    length = 0
    for index in range(count):
        session, turn = divmod(index, shape.turns)
        tokens = maker.tokens(source, shape.input_of(source))
        output_len = shape.output_of(source)
        length = len(tokens) if turn == 0 else length + len(tokens)
        yield _request(
            shape, [maker.message(tokens)], length, output_len,
            index=index, session=f"{seed}-{session}", turn=turn, extends_session=True,
            think_s=source.expovariate(1 / shape.think_s) if turn and shape.think_s else 0.0,
        )  # fmt: skip
        length += output_len


def _request(shape: Shape, prompt: Prompt, prompt_tokens: int, output_len: int, **more: Any) -> PlannedRequest:
    return PlannedRequest(prompt, prompt_tokens, output_len, parameters=shape.parameters, **more)


def count_by_characters(text: str) -> int:
    """About how many tokens a text has."""
    return max(1, len(text) // CHARACTERS_PER_TOKEN)


def counter_of(tokenizer: Path | None) -> Callable[[str], int]:
    """Counts tokens with a tokenizer.json, or about. Raises ConfigError."""
    if tokenizer is None:
        return count_by_characters
    encode = token_ids_of(tokenizer)
    return lambda text: len(encode(text))


def token_ids_of(tokenizer: Path) -> Callable[[str], list[int]]:
    """Encodes with a tokenizer.json, or one in that directory. Raises ConfigError."""
    from tokenizers import Tokenizer

    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path} is no tokenizer: {error}.", remedy="Name a tokenizer.json.") from None
    return lambda text: list(loaded.encode(text).ids)


def sharegpt(path: Path, count_tokens: Callable[[str], int], shape: Shape, seed: int) -> Iterator[PlannedRequest]:
    """ShareGPT's JSON, whole conversations in an order of the seed: [{"conversations": [{"from", "value"}]}].

    Every turn is kept: cutting to the first pair, and to certain lengths, is another distribution. An answer's length
    is that of the recorded one. Raises ConfigError.
    """
    entries = _load_json(path)
    if not isinstance(entries, list):
        raise ConfigError(f"{path} is not ShareGPT's format.", remedy="It is a list of conversations.")
    random.Random(f"{seed} sharegpt").shuffle(entries)
    index = 0
    for number, entry in enumerate(entries):
        said = entry.get("conversations") if isinstance(entry, dict) else None
        asked, length, turn = [], 0, 0
        for part in said if isinstance(said, list) else ():
            if not isinstance(part, dict) or not isinstance(part.get("value"), str):
                continue
            text, speaker = part["value"], part.get("from")
            if speaker in ("human", "user", "system"):
                asked.append({"role": "system" if speaker == "system" else "user", "content": text})
                length += count_tokens(text)
            elif speaker in ("gpt", "assistant", "chatgpt") and asked:
                output_len = count_tokens(text)
                yield _request(
                    shape, list(asked), length, output_len,
                    index=index, session=f"sharegpt-{number}", turn=turn, extends_session=True, think_s=shape.think_s,
                )  # fmt: skip
                asked, length, turn, index = [], length + output_len, turn + 1, index + 1


class _Line(msgspec.Struct):
    """A line of a custom file; also vLLM's ({"prompt", "output_tokens"}) and OpenAI's batch lines ({"body"})."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None
    body: dict[str, Any] | None = None


def custom_lines(path: Path, count_tokens: Callable[[str], int], shape: Shape) -> Iterator[PlannedRequest]:
    """A JSON object a line: prompt (text or token ids) or messages, and output_tokens. Raises ConfigError."""
    for number, line in numbered_lines(path):
        entry = decode_line(line, _Line, path, number)
        if entry.body is not None:
            entry = msgspec.convert(entry.body, _Line)
        prompt: Prompt | None = entry.messages or entry.prompt
        if not prompt:
            raise ConfigError(f"{path}, line {number}, has neither prompt nor messages.")
        wanted = entry.output_tokens or entry.max_tokens or shape.output_len
        yield _request(shape, prompt, prompt_length(prompt, count_tokens), wanted, index=number - 1)


def prompt_length(prompt: Prompt, count_tokens: Callable[[str], int]) -> int:
    """Tokens, exactly for token ids."""
    if isinstance(prompt, str):
        return count_tokens(prompt)
    return sum(1 if isinstance(part, int) else count_tokens(str(part.get("content") or "")) for part in prompt)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, from 1. Raises ConfigError when the file cannot be read."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Check the path.") from None


def decode_line(line: bytes, kind: type[T], path: Path, number: int) -> T:
    """One JSON line as a struct. Raises ConfigError naming the line."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}: {error}.", remedy="Write one object a line.") from None


def _load_json(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Check the path.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None
