#!/usr/bin/env python3
"""Makes a trace of a working day: bursty, multi-turn, three tenants. 24 hours of timestamps; replay it faster.

    day_trace.py DAY.jsonl [--requests 400] [--seed 1]
    penstock bench replay DAY.jsonl URL --speed 480

    assistant   conversations of one to six turns behind one system prompt; people think between turns; busiest at 14:00
    search      single questions over twenty documents, few of them popular; office hours, arrivals in clumps
    nightly     a job at each hour from 0 to 5 that sends everything it has within a minute, with one template

The file is what `penstock serve --record` writes: lengths and block hashes, no contents.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from penstock.observability.traffic import BLOCK_SIZE, TraceHeader, TraceRecord

DAY_S = 86_400.0
HOUR_S = 3600.0
SYSTEM_BLOCKS = 12
TEMPLATE_BLOCKS = 8
MAX_TURNS = 6
THINK_S = 45.0
ANSWER_S = 5.0  # a guess: a replay counts think times from the end of the real answer


class Day:
    """Draws the requests of a day. Every block has a name of its own; equal names are equal contents."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(f"day {seed}")
        self._blocks: dict[str, int] = {}

    def records(self, num_requests: int) -> list[TraceRecord]:
        """About that many, in the order of their arrival."""
        kinds = (self._assistant(num_requests * 55 // 100), self._search(num_requests * 25 // 100))
        found = [record for kind in kinds for record in kind]
        found += self._nightly(max(0, num_requests - len(found)))
        return sorted(found, key=lambda record: record.timestamp)

    def _hashes(self, *names: str) -> list[int]:
        return [self._blocks.setdefault(name, len(self._blocks) + 1) for name in names]

    def _arrivals(self, count: int, peak_hour: float, width_hours: float, shape: float) -> Iterator[float]:
        """Seconds of the day: gamma gaps (shape below 1 comes in clumps), slow where the day is quiet."""
        gaps = [self._source.gammavariate(shape, 1 / shape) for _ in range(count)]
        total, place = sum(gaps), 0.0
        for gap in gaps:
            place += gap
            # The normal distribution's quantile, by bisection of its distribution function.
            low, high = -4.0, 4.0
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (middle, high) if _normal(middle) < place / (total * 1.001) else (low, middle)
            yield min(max(0.0, (peak_hour + width_hours * low) * HOUR_S), DAY_S - 600)

    def _assistant(self, count: int) -> Iterator[TraceRecord]:
        source = self._source
        system = self._hashes(*(f"system {index}" for index in range(SYSTEM_BLOCKS)))
        made, num_starts = 0, max(1, count * 2 // (1 + MAX_TURNS))
        for number, at_s in enumerate(self._arrivals(num_starts, 14.0, 3.0, 0.4)):
            hashes, before = list(system), ""
            for turn in range(min(source.randint(1, MAX_TURNS), count - made)):
                made += 1
                asked, answered = source.randint(1, 4), source.randint(1, 3)
                hashes = hashes + self._hashes(*(f"chat {number} {turn} asked {index}" for index in range(asked)))
                think_s = source.expovariate(1 / THINK_S)
                at_s += (think_s + ANSWER_S) if turn else 0.0
                name = f"chat-{number}-{turn}"
                yield TraceRecord(
                    timestamp=at_s * 1e3, input_length=len(hashes) * BLOCK_SIZE, output_length=answered * BLOCK_SIZE,
                    hash_ids=hashes, id=name, session_id=f"chat-{number}", parent_id=before,
                    think_ms=think_s * 1e3 if turn else None, tenant="assistant", endpoint="completions",
                    finish_reason="length",
                )  # fmt: skip
                before = name
                answer = self._hashes(*(f"chat {number} {turn} answered {index}" for index in range(answered)))
                hashes = hashes + answer

    def _search(self, count: int) -> Iterator[TraceRecord]:
        source = self._source
        for number, at_s in enumerate(self._arrivals(count, 11.5, 2.5, 0.25)):
            document = min(19, int(source.paretovariate(0.9)) - 1)
            size = 16 + document % 9
            hashes = self._hashes(*(f"document {document} {index}" for index in range(size)))
            own = source.randint(10, 40)
            yield TraceRecord(
                timestamp=at_s * 1e3, input_length=len(hashes) * BLOCK_SIZE + own, output_length=source.randint(8, 32),
                hash_ids=hashes, id=f"search-{number}", session_id=f"search-{number}", tenant="search",
                endpoint="completions", finish_reason="length",
            )  # fmt: skip

    def _nightly(self, count: int) -> Iterator[TraceRecord]:
        source = self._source
        template = self._hashes(*(f"template {index}" for index in range(TEMPLATE_BLOCKS)))
        for number in range(count):
            own = source.randint(40, 200)
            at_s = (number % 6) * HOUR_S + source.uniform(0, 60)
            yield TraceRecord(
                timestamp=at_s * 1e3, input_length=TEMPLATE_BLOCKS * BLOCK_SIZE + own, output_length=16,
                hash_ids=template, id=f"nightly-{number}", session_id=f"nightly-{number}", tenant="nightly",
                endpoint="completions", finish_reason="length",
            )  # fmt: skip


def _normal(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def write_day(path: Path, num_requests: int, seed: int) -> int:
    """Writes the trace; returns how many requests it has."""
    records = Day(seed).records(num_requests)
    encoder = msgspec.json.Encoder()
    header = TraceHeader(source="benchmarks/day_trace.py")
    with path.open("wb") as file:
        file.write(encoder.encode(header) + b"\n")
        file.writelines(encoder.encode(record) + b"\n" for record in records)
    return len(records)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"{write_day(options.path, options.requests, options.seed)} requests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
