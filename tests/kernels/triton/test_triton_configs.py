"""Stored configurations: what ships is valid, and what is not is refused."""

from __future__ import annotations

from importlib import resources
from types import SimpleNamespace

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.base.errors import ConfigError
from penstock.kernels import ops as op_table
from penstock.kernels.triton import configs

SHIPPED = sorted(
    path.name for path in (resources.files("penstock.kernels.triton") / "configs").iterdir() if path.name[0] != "_"
)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_whole_and_say_that_they_are_not_measured(name: str) -> None:
    card = configs.read(name)
    assert not card.measured
    assert name == configs.file_name(card.card)
    for tiles in card.tiles.values():
        assert [tile.max_tokens for tile in tiles] == sorted(tile.max_tokens for tile in tiles)


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 24}, {"block_n": 32}, {"num_stages": 0}, {"num_stages": 9}, {"num_warps": 64}, {"max_tokens": 0},
        {"block_m": "16"}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    card = msgspec.to_builtins(configs.read(SHIPPED[0]))
    card["tiles"]["fp8"][0].update(change)
    with pytest.raises(ConfigError, match=r"x\.json"):
        configs.parse(msgspec.json.encode(card), "x.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b" " * ((1 << 20) + 1)], ids=len)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        configs.parse(data, "x.json")


def test_a_missing_family_is_refused() -> None:
    card = msgspec.to_builtins(configs.read(SHIPPED[0]))
    del card["tiles"]["int8"]
    with pytest.raises(ConfigError, match="int8"):
        configs.parse(msgspec.json.encode(card), "x.json")


@given(st.integers(1, 1 << 18), st.integers(1, 1 << 16), st.sampled_from([64, 128, 256]), st.integers(1, 200))
def test_splits_fill_the_card_and_stay_worth_a_program(n: int, k: int, step: int, multiprocessors: int) -> None:
    splits = configs.num_splits(n, k, step, multiprocessors)
    steps = -(-k // step)
    assert 1 <= splits <= configs.MAX_SPLITS
    assert splits == 1 or steps // splits >= 4
    assert splits == 1 or -(-n // 128) * splits // 2 < 2 * multiprocessors


def test_the_first_tile_that_is_large_enough() -> None:
    card = configs.of_device(torch.device("cpu"))
    assert card.tile("codes4", 1) == card.tile("codes4", 16)
    assert card.tile("codes4", 17).block_m == 32
    assert card.tile("codes4", 1 << 20) == card.tiles["codes4"][-1]
    assert configs.file_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.json"


def test_an_amd_card_is_asked_for_nothing_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compute capability reads like a later NVIDIA's; its shared memory holds fewer tiles."""
    found = SimpleNamespace(name="AMD Instinct MI300X", major=9, minor=4, multi_processor_count=304)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: found)
    assert configs.of_device.__wrapped__(torch.device("cuda")).capability == 94
    assert configs.stages(5) == 5
    monkeypatch.setattr(torch.version, "hip", "6.4")
    card = configs.of_device.__wrapped__(torch.device("cuda"))
    assert (card.capability, card.multiprocessors, card.tensor_copies) == (80, 304, False)
    assert [configs.stages(count) for count in (1, 2, 5)] == [1, 2, 2]


def test_which_card_computes_with_8_bit_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = op_table.layouts("triton")
    assert layouts.has_fp8
    old = configs.read("NVIDIA_A100.json")
    monkeypatch.setattr(configs, "of_device", lambda _device: old)
    assert not layouts.has_fp8
