"""What the tuners share: the card that is here, its file of configurations, and time on a card with tiles on trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import torch
import triton

from penstock.kernels.triton import aot, configs

DOES_NOT_FIT_US: Final = 1e12  # longer than anything that does


def card_here() -> tuple[torch.device, configs.Card]:
    """The GPU that is here, as its file will name it. Raises SystemExit where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("No GPU is here: nothing can be measured.")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    return device, msgspec.structs.replace(configs.of_device(device), card=name, measured=True)


def write_card(card: configs.Card, out: str) -> None:
    """out: the file; empty: the card's, in the package. Raises ConfigError where it could not be read again."""
    path = Path(out) if out else Path(configs.__file__).parent / "configs" / configs.file_name(card.card)
    path.write_bytes(aot.to_json(card))
    configs.parse(path.read_bytes(), str(path))


@contextmanager
def acting_as(card: configs.Card) -> Iterator[None]:
    """Kernels are launched as on `card`."""
    original, configs.of_device = configs.of_device, lambda _device: card  # type: ignore[assignment]
    try:
        yield
    finally:
        configs.of_device = original


def time_us(run: Callable[[], object], card: configs.Card) -> float:
    """Median microseconds on a card with such tiles; DOES_NOT_FIT_US where its shared memory or registers do not do."""
    with acting_as(card):
        try:
            return 1e3 * triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            return DOES_NOT_FIT_US
