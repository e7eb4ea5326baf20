"""Recorded traffic as a plan: traces of Mooncake, BurstGPT, Azure, Qwen (Bailian), and our own. Read line by line.

Where a trace has block hashes, prompts are rebuilt from them so that two prompts share exactly the blocks they shared;
where it has none, every prompt is its own.
"""

from __future__ import annotations

import csv
import datetime as dt
import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from penstock.base.errors import ConfigError
from penstock.bench.datasets import FIXED_LENGTH, decode_line, numbered_lines
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.observability.traffic import TRACE_FORMAT, TraceHeader, TraceRecord

MOONCAKE_BLOCK: Final = 512
QWEN_BLOCK: Final = 16
MAX_OPEN_CHATS: Final = 200_000
MAX_OUT_OF_ORDER: Final = 2000  # requests in flight at once, when it was recorded
# Of recorded parameters, those that decide the work; what only shapes the text stays out of a replay.
_REPLAYED: Final = ("temperature", "top_p", "top_k", "seed", "priority", "min_tokens")


def read_trace(kind: str, path: Path, maker: PromptMaker, limit: int | None = None) -> Iterator[PlannedRequest]:
    """kind: a key of READERS, or "auto". Times count from the trace's first request. Raises ConfigError."""
    if kind == "auto":
        kind = detect(path)
    first_s: float | None = None
    for index, request in enumerate(READERS[kind](path, maker)):
        if limit is not None and index >= limit:
            return
        assert request.at_s is not None
        first_s = request.at_s if first_s is None else first_s
        request.index, request.at_s = index, max(0.0, request.at_s - first_s)
        yield request


def detect(path: Path) -> str:
    """Which format a file is in, by its first line. Raises ConfigError."""
    _, line = next(numbered_lines(path), (0, b""))
    if line.startswith(b"{"):
        keys = msgspec.convert(decode_line(line, dict[str, Any], path, 1), dict[str, Any])
        if keys.get("format") == TRACE_FORMAT:
            return "penstock"
        if "chat_id" in keys:
            return "qwen"
        if {"timestamp", "input_length"} <= keys.keys():
            return "mooncake"
    columns = {name.strip() for name in line.decode(errors="replace").split(",")}
    if {"Request tokens", "Response tokens"} <= columns:
        return "burstgpt"
    if {"ContextTokens", "GeneratedTokens"} <= columns:
        return "azure"
    raise ConfigError(f"{path} is none of the known trace formats.", remedy=f"Known: {', '.join(READERS)}.")


def rebuild_tokens(hash_ids: list[int], block_size: int, length: int, maker: PromptMaker, own: str) -> list[int]:
    """A prompt of `length` tokens that shares what its hashes share. own: what the unhashed rest is drawn from."""
    tokens: list[int] = []
    for hash_id in hash_ids:
        tokens += maker.block(hash_id, block_size)
    if len(tokens) < length:
        tokens += maker.tokens(random.Random(f"{maker.seed} {own}"), length - len(tokens))
    return tokens[:length]


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def _mooncake(path: Path, maker: PromptMaker) -> Iterator[PlannedRequest]:
    for number, line in numbered_lines(path):
        row = decode_line(line, _Mooncake, path, number)
        tokens = rebuild_tokens(row.hash_ids, MOONCAKE_BLOCK, row.input_length, maker, f"{path.name}/{number}")
        yield _request(tokens, row.output_length, row.timestamp / 1e3, maker)


class _Qwen(msgspec.Struct):
    chat_id: int
    parent_chat_id: int
    timestamp: float
    input_length: int
    output_length: int
    turn: int = 1
    hash_ids: list[int] = []


def _qwen(path: Path, maker: PromptMaker) -> Iterator[PlannedRequest]:
    roots: OrderedDict[int, int] = OrderedDict()
    for number, line in numbered_lines(path):
        row = decode_line(line, _Qwen, path, number)
        root = roots.pop(row.parent_chat_id, row.chat_id)
        roots[row.chat_id] = root
        if len(roots) > MAX_OPEN_CHATS:
            roots.popitem(last=False)
        tokens = rebuild_tokens(row.hash_ids, QWEN_BLOCK, row.input_length, maker, f"{path.name}/{number}")
        turn = 0 if root == row.chat_id else max(1, row.turn - 1)
        yield _request(tokens, row.output_length, row.timestamp, maker, session=f"chat-{root}", turn=turn)


def _burstgpt(path: Path, maker: PromptMaker) -> Iterator[PlannedRequest]:
    """Rows without a response are failures of the recorded service; they are left out."""
    for number, row in _rows(path):
        output_len = _whole(row, "Response tokens", path, number)
        if output_len > 0:
            at_s = _decimal(row, "Timestamp", path, number)
            yield _unshared(_whole(row, "Request tokens", path, number), output_len, at_s, maker, number)


def _azure(path: Path, maker: PromptMaker) -> Iterator[PlannedRequest]:
    for number, row in _rows(path):
        text = (row.get("TIMESTAMP") or "").strip()
        try:
            moment = dt.datetime.fromisoformat(text)
        except ValueError:
            _bad_row(path, number, f"TIMESTAMP is {text[:40]!r}")
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.UTC)
        output_len = _whole(row, "GeneratedTokens", path, number)
        if output_len > 0:
            input_len = _whole(row, "ContextTokens", path, number)
            yield _unshared(input_len, output_len, moment.timestamp(), maker, number)


def read_own(path: Path) -> tuple[TraceHeader, Iterator[TraceRecord]]:
    """Our own trace. Raises ConfigError."""
    lines = numbered_lines(path)
    number, line = next(lines, (1, b"{}"))
    header = decode_line(line, TraceHeader, path, number)
    if header.format != TRACE_FORMAT or not 1 <= header.block_size <= 1 << 16:
        raise ConfigError(f"{path} is no trace of `serve --record`.", remedy="Its first line is a header.")
    return header, (decode_line(line, TraceRecord, path, number) for number, line in lines)


def recorded_hit_share(path: Path, limit: int | None = None) -> float | None:
    """Cached over all prompt tokens of the requests that were answered; None when the server did not tell."""
    cached = total = 0
    _, records = read_own(path)
    for record in itertools.islice(records, limit):
        if record.cached_tokens is not None and record.status == 200:
            cached += record.cached_tokens
            total += record.input_length
    return cached / total if total else None


def _by_arrival(records: Iterator[TraceRecord]) -> Iterator[TraceRecord]:
    """A recording has its requests in the order of their ends: a long one comes behind later, shorter ones."""
    waiting: list[tuple[float, int, TraceRecord]] = []
    for number, record in enumerate(records):
        heapq.heappush(waiting, (record.timestamp, number, record))
        if len(waiting) > MAX_OUT_OF_ORDER:
            yield heapq.heappop(waiting)[2]
    while waiting:
        yield heapq.heappop(waiting)[2]


def _own(path: Path, maker: PromptMaker) -> Iterator[PlannedRequest]:
    header, records = read_own(path)
    lengths: OrderedDict[str, tuple[int, int]] = OrderedDict()
    for record in _by_arrival(records):
        if record.status != 200 and record.cancelled_after_ms is None:
            continue  # it was refused: what it would have done is not known
        tokens = rebuild_tokens(record.hash_ids, header.block_size, record.input_length, maker, f"own {record.id}")
        lengths[record.id] = record.input_length, record.output_length
        if len(lengths) > MAX_OPEN_CHATS:
            lengths.popitem(last=False)
        before = lengths.get(record.parent_id)
        span = (before[0], before[0] + before[1]) if before and not maker.as_chat else None
        request = _request(
            tokens,
            max(1, record.output_length),
            record.timestamp / 1e3,
            maker,
            session=record.session_id,
            turn=1 if record.parent_id else 0,
            think_s=record.think_ms / 1e3 if record.think_ms is not None else None,
            cancel_after_s=record.cancelled_after_ms / 1e3 if record.cancelled_after_ms is not None else None,
            tenant=record.tenant,
            answer_span=span if span and span[1] <= len(tokens) else None,
        )
        kept = {name: record.parameters[name] for name in _REPLAYED if name in record.parameters}
        request.parameters = FIXED_LENGTH | kept
        yield request


def _request(tokens: list[int], output_len: int, at_s: float, maker: PromptMaker, **more: Any) -> PlannedRequest:
    prompt = maker.prompt(tokens)
    return PlannedRequest(prompt, len(tokens), max(1, output_len), at_s=at_s, parameters=FIXED_LENGTH, **more)


def _unshared(input_len: int, output_len: int, at_s: float, maker: PromptMaker, number: int) -> PlannedRequest:
    tokens = maker.tokens(random.Random(f"{maker.seed} row {number}"), max(1, input_len))
    return _request(tokens, output_len, at_s, maker)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from enumerate(csv.DictReader(file), 2)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="Check the path.") from None


def _whole(row: dict[str, str], column: str, path: Path, number: int) -> int:
    return int(_decimal(row, column, path, number))


def _decimal(row: dict[str, str], column: str, path: Path, number: int) -> float:
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError):
        _bad_row(path, number, f"{column} is {str(row.get(column))[:40]!r}")


def _bad_row(path: Path, number: int, what: str) -> NoReturn:
    raise ConfigError(f"{path}, line {number}: {what}.", remedy="Check the file against its format.")


READERS: Final[dict[str, Callable[[Path, PromptMaker], Iterator[PlannedRequest]]]] = {
    "mooncake": _mooncake, "qwen": _qwen, "burstgpt": _burstgpt, "azure": _azure, "penstock": _own,
}  # fmt: skip
