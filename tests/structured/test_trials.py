"""Trials of grammars take what their credit allows, and beyond it only what nobody else wants."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest

from penstock.structured.trials import MAX_SAVED_S, TRIAL_CREDIT_S, Trials

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities by process are Linux's")


@pytest.fixture
def trials() -> Iterator[Trials]:
    trials = Trials(10.0, idle_s=lambda: time.monotonic() * (os.cpu_count() or 1))
    yield trials
    deadline = time.monotonic() + 10
    while trials and time.monotonic() < deadline:
        trials.look()
        time.sleep(0.005)
    assert not trials, "a child was not reaped"


def burn(cpu_s: float) -> int:
    """A child that uses so much processor time."""
    pid = os.fork()
    if pid == 0:
        while time.process_time() < cpu_s:
            pass
        os._exit(0)
    return pid


def watch(trials: Trials, pids: list[int]) -> set[int]:
    """Those of the children that were made idle before they ended."""
    idle: set[int] = set()
    while trials:
        trials.look()
        for pid in pids:
            try:
                if os.sched_getscheduler(pid) == os.SCHED_IDLE:
                    idle.add(pid)
            except ProcessLookupError:
                continue
        time.sleep(0.002)
    return idle


def test_what_uses_up_its_credit_goes_on_at_idle_priority(trials: Trials) -> None:
    short, long = burn(TRIAL_CREDIT_S / 4), burn(3 * TRIAL_CREDIT_S)
    trials.add(short)
    trials.add(long)
    assert watch(trials, [short, long]) == {long}


def test_a_flood_finds_no_credit_left_and_an_ordinary_one_later_does(trials: Trials) -> None:
    pids = [burn(0.9 * TRIAL_CREDIT_S) for _ in range(int(2 * MAX_SAVED_S / TRIAL_CREDIT_S))]
    for pid in pids:
        trials.add(pid)
    assert watch(trials, pids)
    trials._refilled -= 100  # a while later
    one = burn(TRIAL_CREDIT_S / 4)
    trials.add(one)
    assert watch(trials, [one]) == set()


def others_work() -> float:
    return -time.monotonic() * 2 * (os.cpu_count() or 1)  # whatever trials take, it is not all


def test_heavy_ones_take_a_small_share_of_a_busy_machine() -> None:
    trials = Trials(4.0, idle_s=others_work)
    trials._saved_s = -1.0
    for _ in range(3):
        trials.add(burn(100.0))
    while not trials._is_busy:
        trials.look()
        time.sleep(0.005)
    before_s, begun = total_s(trials), time.monotonic()
    while time.monotonic() - begun < 1.5:
        trials.look()
        time.sleep(0.005)
    assert 0 < total_s(trials) - before_s < 0.5
    watch(trials, [])  # until they are killed


def total_s(trials: Trials) -> float:
    return sum(trial.used_s for trial in trials._running.values())


def test_one_that_is_stopped_too_long_is_killed() -> None:
    trials = Trials(0.5, idle_s=others_work)
    begun = time.monotonic()
    trials.add(burn(100.0))
    watch(trials, [])
    assert 0.5 <= time.monotonic() - begun < 5
