"""Fits a step-time model to a server of ours under load: its steps as it logged them, its answers as a client saw them.

Measured where they will be used: with the server's other processes beside the engine, which on a small machine take its
cores from it at every step.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from penstock.base.errors import ConfigError
from penstock.bench.datasets import FIXED_LENGTH, numbered_lines
from penstock.bench.measure import RunOptions, Workload, run_loop, run_once
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.server_metrics import served_model
from penstock.bench.startup import ServerProcess
from penstock.bench.step_time import MIN_OF_A_KIND, Frontend, Profile, fit_step_time, spread_of
from penstock.bench.target import Target
from penstock.engine.step_log import STEP_LOG_FORMAT, LoggedStep, StepLogHeader

# (users of a closed loop, share of one user's rate); neither: one user who rests. Slow machines come only to the first.
_PHASES: Final[tuple[tuple[int | None, float | None], ...]] = (
    (1, None), (None, None), (2, None), (None, 0.6), (8, None), (None, None), (4, None), (None, 0.3), (16, None),
    (None, None), (None, 0.9), (32, None), (None, 1.2),
)  # fmt: skip
_RESTS_S: Final = (0.02, 0.6)
_TURNS: Final = 8
LONGEST_PROMPT: Final = 600
_ANSWERS: Final = (4, 60)
_STRIDE: Final = 3  # phases by which each piece of a calibration begins later than the one before
MIN_ALONE: Final = 8
MAX_POINTS: Final = 200


@dataclass(frozen=True)
class StepLog:
    """A file of steps."""

    header: StepLogHeader
    steps: list[LoggedStep]


def read_step_log(path: Path) -> StepLog:
    """What `serve --record` wrote beside the traffic. A cut last line is left out. Raises ConfigError."""
    lines = numbered_lines(path)
    try:
        header = msgspec.json.decode(next(lines, (1, b"{}"))[1], type=StepLogHeader)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no log of steps: {error}.", remedy="`serve --record DIR` writes one.") from None
    if header.format != STEP_LOG_FORMAT:
        raise ConfigError(f"{path} is no log of steps.", remedy="`serve --record DIR` writes one.")
    steps = []
    decode = msgspec.json.Decoder(LoggedStep).decode
    for _, line in lines:
        try:
            steps.append(decode(line))
        except msgspec.DecodeError:
            break
    return StepLog(header, steps)


def latest_step_log(directory: Path) -> StepLog:
    """The newest in the directory of a recording. Raises ConfigError."""
    paths = sorted(directory.glob("steps-*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ConfigError(f"{directory} holds no steps-*.jsonl.", remedy="`penstock serve --record DIR` writes one.")
    return read_step_log(paths[-1])


def profile_of_recording(directory: Path, frontend: Frontend) -> Profile:
    """From a server's own traffic: no load is made. frontend: of another profile, as no client's times are here."""
    return profile_of(latest_step_log(directory), frontend)


def measure_profile(model: str, options: Sequence[str], seconds: float, on_progress: Callable[[str], None]) -> Profile:
    """Starts `penstock serve MODEL OPTIONS` and loads it for about so long: one to 32 users, prompts of all lengths.

    Raises ConfigError when too few steps were measured, RuntimeError when the server does not start.
    """
    with tempfile.TemporaryDirectory() as directory:
        arguments = [*([model] if model else []), *options, "--record", directory, "--log-level", "warning"]
        with ServerProcess(arguments) as server:
            server.wait_until_ready()
            target = Target.of(server.url, "")
            target = Target.of(server.url, served_model(target))
            load = CalibrationLoad(target, longest_prompt(latest_step_log(Path(directory))))
            run_loop(lambda: load.run(seconds, on_progress))
        log = latest_step_log(Path(directory))
    if failed := sum(not seen.is_success for seens in load.observations for seen in seens):
        raise RuntimeError(f"{failed} requests of the measurement failed")
    return profile_of(log, fit_frontend(log.steps, list(itertools.chain(*load.observations))))


def profile_of(log: StepLog, frontend: Frontend) -> Profile:
    header = log.header
    source = f"{header.model} {header.quantization}".strip()
    return Profile(
        step_time=fit_step_time(log.steps, frontend, source), num_blocks=header.num_blocks,
        block_size=header.block_size, max_model_len=header.max_model_len, quantization=header.quantization,
    )  # fmt: skip


def longest_prompt(log: StepLog) -> int:
    """That leaves room for the answer."""
    return log.header.max_model_len - _ANSWERS[1] - 1


class CalibrationLoad:
    """Phases of load, as different as a server sees. observations: of each, a second run's last."""

    def __init__(self, target: Target, longest_prompt: int) -> None:
        self.observations: list[list[Observation]] = []
        self._target = target
        self._longest_prompt = max(16, min(LONGEST_PROMPT, longest_prompt))
        self._maker = PromptMaker(as_chat=False, token_limit=256)
        self._num_runs = 0
        self._alone_rate = 0.0  # of one user, requests a second

    async def run(self, seconds: float, on_progress: Callable[[str], None]) -> None:
        """Each phase gets the same time; what was begun is finished, so slow machines take longer.

        Closed loops keep a server busy; arrivals by chance, at shares of what one user got through, leave it idle in
        between, and so does one who rests between short answers. That is another server: its threads sleep, its caches
        hold other things. Further runs begin with other phases, so that slow machines come to these as well.
        """
        first, shift = len(self.observations), _STRIDE * self._num_runs % len(_PHASES)
        self._num_runs += 1
        await self._run(-1, 1, None, time.monotonic() + 0.5)  # warm
        end_s = time.monotonic() + seconds
        for number, (users, share) in enumerate(_PHASES[shift:] + _PHASES[:shift]):
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return
            on_progress(f"{users} users" if users else f"{share} of one user's rate" if share else "one user who rests")
            rate = share * self._alone_rate if share else None
            until_s = time.monotonic() + left_s / (len(_PHASES) - number)
            least = 2 * MIN_ALONE if number == first == 0 else 0  # a busy machine disturbs some of them
            found = await self._run(first + number, users, rate, until_s, least)
            self.observations.append(found)
            if users == 1 and found:
                self._alone_rate = len(found) / (found[-1].ended_s - found[0].intended_s)

    async def _run(
        self, number: int, users: int | None, rate: float | None, until_s: float, least: int = 0
    ) -> list[Observation]:
        """number: of the phase, which seeds its prompts. least: so many requests of a closed loop, however long."""

        def plan(_: int) -> Iterator[PlannedRequest]:
            source = random.Random(f"calibration {number}")
            at_s, length_s, count = 0.0, until_s - time.monotonic(), 0
            while at_s < length_s if rate else time.monotonic() < until_s or count < least:
                count += 1
                request = self._request(source, number)
                if rate:
                    at_s += source.expovariate(rate)
                    request.at_s = at_s
                yield request

        def rests(_: int) -> Iterator[PlannedRequest]:
            source = random.Random(f"calibration {number}")
            count = 0
            while time.monotonic() < until_s:
                request = self._request(source, number)
                request.output_tokens = _ANSWERS[0]
                conversation, request.turn = divmod(count, _TURNS)
                request.session = str(conversation)
                request.think_s = math.exp(source.uniform(*map(math.log, _RESTS_S)))
                count += 1
                yield request

        workload = Workload(plan, users) if users or rate else Workload(rests, 1)
        run = await run_once(self._target, workload, number, RunOptions(sample_server=False))
        return run.observations

    def _request(self, source: random.Random, number: int) -> PlannedRequest:
        """Of any length; every other one begins as many others do, so that short chunks meet long contexts."""
        length = round(math.exp(source.uniform(math.log(8), math.log(self._longest_prompt))))
        tokens = self._maker.tokens(source, length)
        if source.random() < 0.5:
            shared = source.randrange(max(1, self._longest_prompt - length))
            tokens = [*self._maker.block(f"{number} {source.randrange(4)}", self._longest_prompt)[:shared], *tokens]
        return PlannedRequest(tokens, len(tokens), source.randint(*_ANSWERS), parameters=FIXED_LENGTH)


def fit_frontend(steps: Sequence[LoggedStep], observations: Sequence[Observation]) -> Frontend:
    """What a client waits for beside the steps.

    Steps and observations are on the machine's one monotonic clock. Raises ConfigError when too few requests found the
    engine idle.
    """
    starts = [step.started_s for step in steps]
    ends = [step.started_s + step.seconds for step in steps]
    output_s, next_output_s, output_spread = _fit_outputs(ends, steps, observations)
    ways, first_outputs = [], []
    for seen in _alone(observations):
        first = bisect_left(starts, seen.started_s)
        if first < len(starts) and starts[first] < seen.chunk_s[0]:
            ways.append((seen.prompt_tokens, starts[first] - seen.started_s))
            while first < len(steps) - 1 and not steps[first].work.num_sampled:
                first += 1
            if ends[first] < seen.chunk_s[0]:
                first_outputs.append(seen.chunk_s[0] - ends[first])
    if len(ways) < MIN_ALONE:
        raise ConfigError(f"Only {len(ways)} requests were alone on the server.", remedy="Measure for longer.")
    request_s, prompt_token_s = _robust_line(ways)
    lone_s = [max(1e-9, request_s + prompt_token_s * length) for length, _ in ways]
    return Frontend(
        request_s=request_s, prompt_token_s=prompt_token_s,
        request_spread=spread_of([way_s / usual_s for (_, way_s), usual_s in zip(ways, lone_s, strict=True)]),
        output_s=output_s, next_output_s=next_output_s, output_spread=output_spread,
        first_output_s=max(0.0, statistics.median(first_outputs) - output_s) if first_outputs else 0.0,
    )  # fmt: skip


def _alone(observations: Sequence[Observation]) -> Iterator[Observation]:
    """Those that were sent when all before them had ended, and whose first answer came before the next was sent."""
    seens = sorted(observations, key=lambda seen: seen.intended_s)
    ended_s = -math.inf
    for seen, after in zip(seens, [*seens[1:], None], strict=True):
        is_first = seen.intended_s >= ended_s
        if is_first and (after is None or after.intended_s > seen.chunk_s[0]):
            yield seen
        ended_s = max(ended_s, seen.ended_s)


def _fit_outputs(
    ends: Sequence[float], steps: Sequence[LoggedStep], observations: Sequence[Observation]
) -> tuple[float, float, list[float]]:
    """(from a step's end to its first output's arrival, to each further one's, how the first varies as factors)."""
    arrivals: dict[int, list[float]] = {}
    for seen in observations:
        for chunk_s in seen.chunk_s[1:]:  # a request's first is another matter
            step = bisect_right(ends, chunk_s) - 1
            if step >= 0:
                arrivals.setdefault(step, []).append(chunk_s - ends[step])
    # Later than the next step's end, an output would be taken for that step's: only whole steps count.
    means: dict[int, list[float]] = {}
    for step, delays in arrivals.items():
        if len(delays) == steps[step].work.num_sampled:
            means.setdefault(len(delays), []).append(statistics.fmean(delays))
    usual = [
        ((count - 1) / 2, statistics.median(found)) for count, found in means.items() if len(found) >= MIN_OF_A_KIND
    ]
    output_s, next_output_s = _robust_line(usual) if usual else (0.0, 0.0)
    single = means.get(1, [])
    spread = spread_of([delay_s / output_s for delay_s in single]) if output_s and len(single) >= MIN_OF_A_KIND else []
    return output_s, next_output_s, spread


def _robust_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope, neither below 0: the median of all pairs' slopes (Theil and Sen), at most of MAX_POINTS."""
    chosen = points[:: 1 + len(points) // MAX_POINTS]
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.combinations(chosen, 2) if x0 != x1]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    return max(0.0, statistics.median(y - slope * x for x, y in points)), slope
