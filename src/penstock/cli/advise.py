"""`penstock advise`: settings, replicas and cost for a workload, from measured steps and simulations."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path

from rich.console import Console
from rich.table import Table

from penstock.advisor.advice import Advice, Platform, Prediction, cost_lines, worst_ratio
from penstock.advisor.advice import advise as find_advice
from penstock.advisor.elsewhere import WorkloadShape, other_systems, recorded
from penstock.base.errors import ConfigError
from penstock.bench.slo import parse_slo
from penstock.bench.step_time import load_profile
from penstock.cli.bench import check_workload, make_workload
from penstock.cli.bench_sim import platform_of

MAX_REPLICAS = 256


def advise(options: argparse.Namespace) -> int:
    """The exit status: 0 when something keeps the SLO."""
    check_workload(options)
    slo = parse_slo(options.slo)
    if not slo:
        raise ConfigError("Advice needs an objective.", remedy="Give --slo, such as ttft:p99=500ms.")
    if not 1 <= options.max_replicas <= MAX_REPLICAS:
        raise ConfigError(f"--max-replicas must be 1 to {MAX_REPLICAS}.")
    platforms = [_platform(options, profile) for profile in options.profile or [None]]
    workload = make_workload(options)
    if workload.concurrency is not None:
        raise ConfigError("Advice needs arrivals.", remedy="Give --rate, or a trace.")
    seed = options.seed if options.seed is not None else secrets.randbits(31)
    advice = find_advice(platforms, workload, slo, seed, options.max_replicas)
    show(advice, Console())
    return 0 if advice.best is not None else 1


def _platform(options: argparse.Namespace, profile: Path | None) -> Platform:
    """Raises ConfigError."""
    step_time, engine = platform_of(options, profile)
    name, quantization = f"{options.config.name} at {options.weight_bits:g} bits" if options.config else "", ""
    if profile is not None:
        name, quantization = profile.stem, load_profile(profile).quantization
    return Platform(
        name, step_time, engine.cache.num_blocks, engine.cache.block_size, engine.scheduler.max_model_len,
        options.price, quantization,
    )  # fmt: skip


def show(advice: Advice, console: Console) -> None:
    """The answer, its reasons, what others did, and what it was chosen from."""
    lines = []
    if advice.best is not None:
        lines.append(f"Use {advice.best.candidate}")
        lines += _expectations(advice.best) + _replica_lines(advice, advice.best) + cost_lines(advice.best)
    lines += advice.reasons
    closest = advice.best or min(advice.tried, key=worst_ratio)
    shape = WorkloadShape.of(closest.summary, closest.candidate.num_replicas)
    lines += other_systems(shape, closest.candidate.platform.quantization, recorded())
    lines.append("To know, and not to believe: record the traffic, and `penstock bench replay TRACE URL URL` both.")
    for line in lines:
        console.print(line, highlight=False, markup=False)
    table = Table(title="Tried, in the simulator", title_justify="left")
    for heading in ("candidate", "TTFT p99 ms", "ITL p99 ms", "in the SLO", "verdict"):
        table.add_column(heading)
    for found in advice.tried:
        cells = [f"{found.summary.latency[name].at(0.99).value * 1e3:.0f}" for name in ("ttft", "itl")]
        share = "-" if found.summary.goodput_share is None else f"{found.summary.goodput_share:.1%}"
        table.add_row(str(found.candidate), *cells, share, "kept" if found.keeps_slo else "broken")
    console.print(table)


def _replica_lines(advice: Advice, best: Prediction) -> list[str]:
    low, high = advice.replicas
    price = best.candidate.platform.price_per_hour
    error = f"{best.candidate.platform.step_time.error:.0%}"
    high_text = str(high) if high is not None else "more than --max-replicas"
    line = f"Replicas: {best.candidate.num_replicas} [{low}, {high_text}] for steps {error} quicker or slower"
    if price:
        dear = f"${price * high:g}" if high is not None else "more"
        line += f"; ${price * best.candidate.num_replicas:g} [${price * low:g}, {dear}] an hour"
    return [line]


def _expectations(best: Prediction) -> list[str]:
    lines = []
    for name in ("TTFT", "ITL", "E2E"):
        parts = []
        for share in (0.5, 0.99):
            value, low, high = best.interval_ms(name, share)
            parts.append(f"p{share * 100:g} {value:.0f} ms [{low:.0f}, {high:.0f}]")
        lines.append(f"Expect {name}: {', '.join(parts)}")
    return lines
