"""`penstock advise`: settings, replicas and cost for a workload, from measured steps and simulations."""

from __future__ import annotations

import argparse
import secrets

from rich.console import Console
from rich.table import Table

from penstock.advisor.advice import Advice, Platform, Prediction, cost_lines
from penstock.advisor.advice import advise as find_advice
from penstock.base.errors import ConfigError
from penstock.bench.slo import parse_slo
from penstock.cli.bench import check_workload, make_workload
from penstock.cli.bench_sim import platform_of

MAX_REPLICAS = 256
_ELSEWHERE = (
    "Other systems were not measured for this workload. To know, and not to believe: record it, then "
    "`penstock bench replay TRACE URL URL` against both, interleaved. Reasons to try: an accelerator here that this "
    "profile does not use; less than one replica busy (a hosted API bills tokens, not hours)."
)


def advise(options: argparse.Namespace) -> int:
    """The exit status: 0 when something keeps the SLO."""
    check_workload(options)
    slo = parse_slo(options.slo)
    if not slo:
        raise ConfigError("Advice needs an objective.", remedy="Give --slo, such as ttft:p99=500ms.")
    if not 1 <= options.max_replicas <= MAX_REPLICAS:
        raise ConfigError(f"--max-replicas must be 1 to {MAX_REPLICAS}.")
    step_time, engine = platform_of(options)
    name = (
        options.profile.stem
        if options.profile is not None
        else f"{options.config.name} at {options.weight_bits:g} bits"
    )
    platform = Platform(
        name, step_time, engine.cache.num_blocks, engine.cache.block_size, engine.scheduler.max_model_len, options.price
    )
    workload = make_workload(options)
    if workload.concurrency is not None:
        raise ConfigError("Advice needs arrivals.", remedy="Give --rate, or a trace.")
    seed = options.seed if options.seed is not None else secrets.randbits(31)
    advice = find_advice([platform], workload, slo, seed, options.max_replicas)
    show(advice, Console())
    return 0 if advice.best is not None else 1


def show(advice: Advice, console: Console) -> None:
    """The answer, its reasons, and what it was chosen from."""
    if advice.best is not None:
        console.print(f"Use {advice.best.candidate}", highlight=False, markup=False)
        for line in _expectations(advice.best) + cost_lines(advice.best):
            console.print(line, highlight=False, markup=False)
    for reason in advice.reasons:
        console.print(reason, highlight=False, markup=False)
    table = Table(title="Tried, in the simulator", title_justify="left")
    for heading in ("candidate", "TTFT p99 ms", "ITL p99 ms", "in the SLO", "verdict"):
        table.add_column(heading)
    for found in advice.tried:
        cells = [f"{found.summary.latency[name].at(0.99).value * 1e3:.0f}" for name in ("ttft", "itl")]
        share = "-" if found.summary.goodput_share is None else f"{found.summary.goodput_share:.1%}"
        table.add_row(str(found.candidate), *cells, share, "kept" if found.keeps_slo else "broken")
    console.print(table)
    console.print(_ELSEWHERE, highlight=False, markup=False)


def _expectations(best: Prediction) -> list[str]:
    lines = []
    for name in ("TTFT", "ITL", "E2E"):
        parts = []
        for share in (0.5, 0.99):
            value, low, high = best.interval_ms(name, share)
            parts.append(f"p{share * 100:g} {value:.0f} ms [{low:.0f}, {high:.0f}]")
        lines.append(f"Expect {name}: {', '.join(parts)}")
    return lines
