"""`penstock advise`: settings, replicas and cost for a workload, from measured steps and simulations."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from penstock.advisor.advice import Advice, Platform, Prediction, cost_lines, worst_ratio
from penstock.advisor.advice import advise as find_advice
from penstock.advisor.elsewhere import WorkloadShape, not_measured, other_systems, recorded
from penstock.base.errors import ConfigError
from penstock.bench.slo import parse_slo
from penstock.bench.step_time import Profile, load_profile
from penstock.cli.bench import check_bounds, check_workload, make_workload
from penstock.cli.bench_sim import platform_of
from penstock.config.settings import SPECS, parse_value


def advise(options: argparse.Namespace) -> int:
    """The exit status: 0 when something keeps the SLO."""
    check_workload(options)
    slo = parse_slo(options.slo)
    if not slo:
        raise ConfigError("Advice needs an objective.", remedy="Give --slo, such as ttft:p99=500ms.")
    check_bounds(options, {"max_replicas": (1, 256), "price": (0, 1e6), "seconds": (1, 86_400)})
    workload = make_workload(options)
    if workload.concurrency is not None:
        raise ConfigError("Advice needs arrivals.", remedy="Give --rate, or a trace.")
    platforms = [_platform(options, name, profile) for name, profile in _profiles(options)]
    seed = options.seed if options.seed is not None else secrets.randbits(31)
    advice = find_advice(platforms, workload, slo, seed, options.max_replicas)
    show(advice, Console())
    return 0 if advice.best is not None else 1


def _profiles(options: argparse.Namespace) -> list[tuple[str, Profile | None]]:
    """Platforms by their names: measured earlier, measured now, or (None) known by its limits. Raises ConfigError."""
    if options.cpu and (options.profile or options.gpu or options.bandwidth):
        raise ConfigError("--cpu measures this machine: --profile, --gpu and --bandwidth are other platforms.")
    for quantization in options.quantization or ():
        parse_value(SPECS["quantization"], quantization, "--quantization")
    if options.quantization and not options.cpu:
        raise ConfigError("--quantization is what --cpu measures.", remedy="Give --cpu, or a --profile of each.")
    if options.profile:
        return [(path.stem, load_profile(path)) for path in options.profile]
    model = Path(options.model).name if options.model else "bundled model"
    if not options.cpu:
        machine = options.gpu or f"{options.bandwidth} GB/s and {options.tflops} TFLOP/s"
        return [(f"{model} at {options.weight_bits:g} bits on {machine}", None)]
    return [
        (f"{model} here" + (f", {quantization}" if quantization != "none" else ""), _measure(options, quantization))
        for quantization in dict.fromkeys(options.quantization or ["none"])
    ]


def _measure(options: argparse.Namespace, quantization: str) -> Profile:
    """The profile of --model's server under load on this machine."""
    from penstock.bench.calibration import measure_profile

    progress = Console(stderr=True)
    progress.print(f"Measuring --quantization {quantization} for about {options.seconds:g} s and the start.")
    return measure_profile(options.model or "", ["--quantization", quantization], options.seconds, progress.print)


def _platform(options: argparse.Namespace, name: str, profile: Profile | None) -> Platform:
    """Raises ConfigError."""
    step_time, engine = platform_of(options, profile)
    return Platform(
        name, step_time, engine.cache.num_blocks, engine.cache.block_size, engine.scheduler.max_model_len,
        options.price, profile.quantization if profile is not None else "", is_measured=profile is not None,
        num_host_blocks=engine.cache.num_host_blocks, block_copy_s=engine.block_copy_s,
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
    platform = closest.candidate.platform
    lines += other_systems(shape, platform.quantization, recorded()) if platform.is_measured else not_measured(shape)
    lines.append("To know, and not to believe: record the traffic, and `penstock bench replay TRACE URL URL` both.")
    for line in lines:
        console.print(line, highlight=False, markup=False)
    console.print(_tried_table(advice.tried))


def _tried_table(tried: Sequence[Prediction]) -> Table:
    """Numbers of sequences that came out alike share a row."""
    table = Table(title="Tried, in the simulator; milliseconds at p99", title_justify="left")
    for heading in ("replicas", "sequences", "tokens a step", "cache", "TTFT", "ITL", "in the SLO"):
        table.add_column(heading, justify="left" if heading == "replicas" else "right")
    rows: dict[tuple[str, ...], list[int]] = {}
    for found in tried:
        one, summary = found.candidate, found.summary
        times = (f"{summary.latency[name].at(0.99).value * 1e3:.0f}" for name in ("ttft", "itl"))
        share = "" if summary.goodput_share is None else f"{summary.goodput_share:.1%}, "
        row = (
            f"{one.num_replicas} x {one.platform.name}", str(one.max_num_batched_tokens),
            "on" if one.enable_prefix_caching else "off", *times, share + ("kept" if found.keeps_slo else "broken"),
        )  # fmt: skip
        rows.setdefault(row, []).append(one.max_num_seqs)
    for (replicas, *cells), counts in rows.items():
        table.add_row(replicas, ", ".join(map(str, sorted(counts))), *cells)
    return table


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
