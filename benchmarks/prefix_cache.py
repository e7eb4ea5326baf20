"""What the prefix tree costs: match, insert and evict against the tokens they touch, in trees of up to a million.

    python benchmarks/prefix_cache.py [--short]

A pool of 100,000 blocks of 16 tokens. Each tree is filled with conversations of 1,024 tokens, of which the first 256
are shared by groups of 64, and as many prompts of a single block as make an eighth of it (so its root has thousands of
children). If the cost is O(tokens touched), the lines of all tree sizes fall together.
Prints a table and writes benchmarks/results/prefix_cache.png. Microseconds are processor time, medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from penstock.config.engine import CacheConfig
from penstock.kvcache import KVCacheManager, PrefixMatch, encode_tokens

RESULTS = Path(__file__).parent / "results"
BLOCK_SIZE = 16
NUM_BLOCKS = 100_000
CONVERSATION = 1024
SHARED = 256
OPERATIONS = ("match", "insert", "evict", "match inside a block")


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(128_000) for _ in range(count)]


def put(kv: KVCacheManager, tokens: list[int]) -> None:
    """A request that computes these tokens and ends."""
    table = kv.allocate(kv.match_prefix(encode_tokens(tokens)), len(tokens))
    assert table is not None
    kv.take_copies()
    kv.free(table, tokens, len(tokens))


def filled(num_tokens: int, rng: random.Random) -> KVCacheManager:
    """A manager whose tree holds about that many tokens."""
    kv = KVCacheManager(CacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS))
    for _ in range(num_tokens // 8 // BLOCK_SIZE):
        put(kv, random_tokens(rng, BLOCK_SIZE))
    prefix: list[int] = []
    for number in range(num_tokens):
        if kv.stats().num_cached_blocks * BLOCK_SIZE >= num_tokens:
            break
        if number % 64 == 0:
            prefix = random_tokens(rng, SHARED)
        put(kv, prefix + random_tokens(rng, CONVERSATION - SHARED))
    return kv


def timed_us(action: Callable[[], object]) -> float:
    started = time.thread_time()
    action()
    return (time.thread_time() - started) * 1e6


def measure(kv: KVCacheManager, count: int, repeats: int) -> dict[str, float]:
    """Median microseconds of each operation on `count` tokens. The tree is as large afterwards as before."""
    rng = random.Random(count)
    times: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    known = random_tokens(rng, count)
    put(kv, known)
    for _ in range(repeats):
        fresh = random_tokens(rng, count)
        table = kv.allocate(kv.match_prefix(encode_tokens(fresh)), count)
        assert table is not None
        kv.take_copies()
        times["insert"].append(timed_us(lambda table=table, fresh=fresh: kv.free(table, fresh, count)))

        matches: list[PrefixMatch] = []
        tokens = encode_tokens([*known, 1])
        times["match"].append(timed_us(lambda tokens=tokens, matches=matches: matches.append(kv.match_prefix(tokens))))
        assert matches[0].num_tokens == count
        kv.release(matches[0])

        # Shares some tokens of a first block with the tree: one search among all of the root's children.
        tokens = encode_tokens([*known[:8], *random_tokens(rng, 8)])
        times["match inside a block"].append(
            timed_us(lambda tokens=tokens, matches=matches: matches.append(kv.match_prefix(tokens)))
        )
        assert matches[1].num_tokens == 8
        kv.release(matches[1])

        times["evict"].append(timed_us(lambda: kv.evict(count // BLOCK_SIZE)))
    return {name: statistics.median(values) for name, values in times.items()}


def plot(results: dict[int, dict[int, dict[str, float]]], path: Path) -> None:
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.6), sharey=True)
    for panel, name in zip(panels, OPERATIONS, strict=True):
        for size, by_count in results.items():
            panel.plot(list(by_count), [row[name] for row in by_count.values()], "o-", ms=3, label=f"{size:,} cached")
        panel.set(title=name, xlabel="tokens touched", xscale="log", yscale="log")
    panels[0].set(ylabel="microseconds")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer points and repeats")
    short = parser.parse_args().short
    sizes = [10_000, 1_000_000] if short else [10_000, 100_000, 1_000_000]
    counts = [16, 256, 4096] if short else [16, 64, 256, 1024, 4096, 16_384]
    results: dict[int, dict[int, dict[str, float]]] = {}
    print(f"{'cached tokens':>14} {'touched':>8}" + "".join(f"{name + ', us':>26}" for name in OPERATIONS))
    for size in sizes:
        kv = filled(size, random.Random(size))
        results[size] = {}
        for count in counts:
            row = results[size][count] = measure(kv, count, 30 if short else 100)
            print(f"{size:14,} {count:8,}" + "".join(f"{row[name]:26.1f}" for name in OPERATIONS), flush=True)
    RESULTS.mkdir(exist_ok=True)
    plot(results, RESULTS / "prefix_cache.png")
    smallest, largest = results[sizes[0]], results[sizes[-1]]
    for name in OPERATIONS:
        worst = max(largest[count][name] / smallest[count][name] for count in counts)
        print(f"{name}: a tree {sizes[-1] // sizes[0]} times as large costs at most {worst:.2f} times as much")


if __name__ == "__main__":
    main()
