"""Tiles of attention: a card's own are launched, what may be tried on a card fits it, and the fastest is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from triton.runtime import interpreter
from tune_attention import REPORT, Case, Heads, attending, fitting_labels, tuned
from tuning import acting_as

from penstock.base.errors import ConfigError
from penstock.kernels.triton import aot, attention_tiles, configs

ROOT = Path(__file__).parents[3]
TILES = {
    "decode": configs.AttentionTile(0, 32, 8, 3),
    "prefill": configs.AttentionTile(64, 32, 4, 3),
}


@contextmanager
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int, int]]]:
    """(BLOCK_M, BLOCK_N, warps, stages) of each launch of attention."""
    run = interpreter.GridExecutor.__call__
    found = []

    def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if "BLOCK_N" in kwargs:
            found.append(tuple(kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")))
        return run(executor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", note)
        yield found


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_cards_own_tile_is_launched(kind: str, cache: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    card = configs.read("NVIDIA_H100.json")
    name = attention_tiles.tile_name(kind, 64, cache)
    own = msgspec.structs.replace(card, attention={name: TILES[kind]})
    run = attending(Heads(4, 2, 64), cache, Case(2, 80, 1 if kind == "decode" else 70), torch.device("cpu"))
    with launched(monkeypatch) as launches:
        default = run()
        with acting_as(own):
            got = run()
    tile = TILES[kind]
    assert launches[-1] == (tile.rows or 16, tile.slots, tile.num_warps, tile.num_stages)
    assert launches[-1] not in launches[: len(launches) // 2]
    torch.testing.assert_close(got, default, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_fastest_of_those_that_fit_is_kept(kind: str) -> None:
    card = configs.read("NVIDIA_H100.json")
    what = (kind, 128, torch.bfloat16)
    name = attention_tiles.tile_name(*what)
    tiles = list(attention_tiles.candidates(kind))
    fitting = {attention_tiles.label(name, tile) for tile in tiles[2:]}
    tried: list[configs.AttentionTile] = []

    def measure(trial: configs.Card) -> float:
        tried.append(trial.attention[name])
        return abs(tiles.index(tried[-1]) - 4.4)

    found = tuned(card, what, fitting, measure)
    assert tried == tiles[2:]
    assert found.attention == {name: tiles[4]}
    assert configs.parse(aot.to_json(found), "x.json") == found
    assert tuned(card, what, set(), measure) is card


def test_every_candidate_was_compiled_for_every_chip_and_enough_fit() -> None:
    """What ships is among them: the defaults, and what a card's file says."""
    report = REPORT.read_bytes()
    compiled = {(kernel["name"], kernel["capability"]) for kernel in json.loads(report)["kernels"]}
    wanted = {
        (each.name, capability)
        for each in aot.candidates()
        for capability in aot.CAPABILITIES
        if aot.is_for(each, capability)
    }
    assert compiled == wanted
    for capability in aot.CAPABILITIES:
        fitting = fitting_labels(report, capability)
        families = {label.split()[0] for label in fitting}
        assert len(families) == (8 if capability == 80 else 12)
        for path in (ROOT / "src/penstock/kernels/triton/configs").glob("*.json"):
            card = configs.read(path.name)
            own = {attention_tiles.label(name, tile) for name, tile in card.attention.items()}
            assert capability != card.capability or own <= fitting
    assert fitting_labels(report, 86) == fitting_labels(report, 80)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("decode_128_bf16", {"rows": 64}), ("prefill_128_bf16", {"rows": 0}), ("prefill_128_bf16", {"rows": 96}),
        ("decode_128_bf16", {"slots": 48}), ("decode_128_bf16", {"slots": 512}), ("decode_128_bf16", {"num_warps": 3}),
        ("decode_128_bf16", {"num_stages": 9}), ("decode_100_bf16", {}), ("verify_128_bf16", {}),
        ("decode_128_bf16", {"more": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_tiles_that_cannot_be_launched_are_refused(name: str, change: dict[str, int]) -> None:
    card = msgspec.to_builtins(configs.read("NVIDIA_H100.json"))
    kind = "prefill" if name.startswith("prefill") else "decode"
    card["attention"] = {name: msgspec.to_builtins(TILES[kind]) | change}
    with pytest.raises(ConfigError, match=r"x\.json"):
        configs.parse(msgspec.json.encode(card), "x.json")
