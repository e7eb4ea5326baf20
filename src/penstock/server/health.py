"""Three questions with three answers: is this process alive, will it serve now, and does work move?

A pure state machine: the engine's signs of life go in, with the time; a verdict comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.messages import EngineStats

# An idle engine reports every second, so silence this long without work means that it does not run.
SILENCE_S: Final = 8.0


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What is known of the engine at one moment.

    last_message_s: monotonic time of its last message. stalled_s: seconds that work has existed without a word.
    cpu_s: processor seconds it has used so far; None where the system does not tell.
    """

    now_s: float
    is_alive: bool
    last_message_s: float
    stalled_s: float
    cpu_s: float | None


@dataclass(frozen=True)
class Verdict:
    """is_ok: whether to answer 200. reason: one line for people."""

    is_ok: bool
    reason: str


class Watchdog:
    """Tells a busy engine from a stuck one.

    A long step is silence with processor time: it may last `stall_timeout_s`. A stopped or deadlocked process is
    silence without: `SILENCE_S` of that is enough. `observe` is called about once a second.
    """

    def __init__(self, stall_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._cpu_s = -1.0
        self._cpu_moved_s = 0.0
        self._verdict = Verdict(False, "the engine is starting")

    @property
    def verdict(self) -> Verdict:
        """The state of the engine at the last observation."""
        return self._verdict

    def observe(self, signs: Signs) -> Verdict:
        if signs.cpu_s is None or signs.cpu_s > self._cpu_s:
            self._cpu_s = signs.cpu_s if signs.cpu_s is not None else self._cpu_s
            self._cpu_moved_s = signs.now_s
        self._verdict = self._judge(signs)
        return self._verdict

    def _judge(self, signs: Signs) -> Verdict:
        silent_s = signs.now_s - max(signs.last_message_s, self._cpu_moved_s)
        if not signs.is_alive:
            return Verdict(False, "the engine process has ended")
        if silent_s > SILENCE_S:
            return Verdict(False, f"the engine process has not run for {silent_s:.0f} s")
        if signs.stalled_s > self._stall_timeout_s:
            return Verdict(False, f"no step has finished for {signs.stalled_s:.0f} s although requests are open")
        return Verdict(True, "ok")


def progress_report(stats: EngineStats, stalled_s: float, now_s: float) -> dict[str, float | int]:
    """The numbers behind /health/progress. step_running_s: age of the step in flight, 0 when none is."""
    running_s = now_s - stats.step_started_s if stats.step_started_s else 0.0
    return {
        "steps_finished": stats.num_steps,
        "step_in_flight": stats.num_steps + 1 if stats.step_started_s else 0,
        "step_running_s": round(max(0.0, running_s), 3),
        "seconds_without_progress": round(stalled_s, 3),
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "output_tokens": stats.num_output_tokens,
    }
