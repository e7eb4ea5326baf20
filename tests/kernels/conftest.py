"""Every kernel test that asks for `native` runs once per instruction set that works on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock import _native
from penstock.kernels import ops

WORKING = [name for name, works, _ in _native.isa_statuses() if works]


@pytest.fixture(params=[name for name, _, _ in _native.isa_statuses()])
def native(request: pytest.FixtureRequest) -> ops.Ops:
    """The native op table of one instruction set, with two threads."""
    if request.param not in WORKING:
        pytest.skip(f"{request.param} does not run here")
    return ops.load("native", 2, isa=request.param)


@pytest.fixture
def tuning_restored() -> Iterator[None]:
    before = _native.tune(True)
    yield
    _native.tune(before)


@pytest.fixture(params=[True, False], ids=["halved vectors", "whole vectors"])
def tuned(tuning_restored: None, request: pytest.FixtureRequest) -> None:
    """For each of the processors that kernels are tuned for."""
    _native.tune(request.param)
