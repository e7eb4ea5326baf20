"""`penstock bench sim`: measures an engine's steps, and plays workloads on them in simulated time."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from penstock.base.errors import ConfigError
from penstock.bench.environment import manifest
from penstock.bench.gpu_cards import CARDS
from penstock.bench.metrics import summarise
from penstock.bench.report import Report, ReportedRun
from penstock.bench.results import run_json
from penstock.bench.simulator import SimulatedEngine, run_simulation
from penstock.bench.slo import parse_slo
from penstock.bench.step_time import USUAL_FRONTEND, HardwareStepTime, Profile, StepTime, load_profile
from penstock.bench.tables import summary_table
from penstock.cli.bench import check_bounds, check_workload, make_workload
from penstock.config.resolve import BLOCK_SIZE, EngineOptions

_DEFAULT_BLOCKS = 8192


def bench_sim(options: argparse.Namespace) -> int:
    """The exit status: 0 when every simulated request succeeded."""
    check_bounds(options, {
        "seconds": (1, 86_400), "max_num_seqs": (1, 4096), "max_num_batched_tokens": (16, 1 << 20),
    })  # fmt: skip
    if options.measure is not None:
        return _measure(options)
    check_workload(options)
    step_time, engine = platform_of(options, load_profile(options.profile) if options.profile else None)
    slo = parse_slo(options.slo)
    seed = options.seed if options.seed is not None else secrets.randbits(31)
    found = run_simulation(engine, step_time, make_workload(options), seed)
    summary = summarise(found.record, slo)
    console = Console()
    console.print(summary_table("simulated", summary))
    console.print(
        f"{found.num_steps} steps, device busy {found.busy_share:.0%}, {found.speedup:,.0f} times faster than real "
        f"time; median error of the step model {step_time.error:.1%}",
        highlight=False,
    )
    facts = manifest(simulated=True, seed=seed)
    if engine.cache.num_host_blocks:
        shown = (
            f"{found.num_host_hit_tokens:,} prompt tokens came back from {engine.cache.num_host_blocks:,} host blocks"
        )
        console.print(shown, highlight=False)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.encode(run_json(found.record, summary, facts)))
    if options.html is not None:
        report = Report("penstock bench sim", [ReportedRun("simulated", found.record, summary)], facts, slo)
        options.html.write_text(report.html(), encoding="utf-8")
    return 1 if summary.num_failed else 0


def platform_of(options: argparse.Namespace, profile: Profile | None) -> tuple[StepTime, SimulatedEngine]:
    """Steps and engine of a profile, else of the options. Raises ConfigError."""
    check_bounds(options, {
        "bandwidth": (0.1, 1e6), "tflops": (1e-3, 1e6), "weight_bits": (1, 32), "num_blocks": (1, 1 << 31),
        "host_kv_gb": (0, 1e6),
    })  # fmt: skip
    wanted = EngineOptions(
        max_num_seqs=getattr(options, "max_num_seqs", 64),
        max_num_batched_tokens=getattr(options, "max_num_batched_tokens", 512),
        enable_prefix_caching=not getattr(options, "no_prefix_caching", False),
    )
    if options.host_kv_gb and options.gpu is None:
        raise ConfigError("Nothing says how fast the link to the host tier is.", remedy="Give --gpu.")
    if profile is not None:
        num_blocks = options.num_blocks or profile.num_blocks
        engine = SimulatedEngine.of(wanted, num_blocks, profile.block_size, profile.max_model_len)
        return profile.step_time, engine
    card = CARDS.get(options.gpu or "")
    if options.model is None or (card is None and not (options.bandwidth and options.tflops)):
        raise ConfigError(
            "Nothing says how long a step takes.",
            remedy="Give --profile, or --model with --gpu, or with --bandwidth and --tflops of a machine"
            + (", or --cpu to measure this one." if hasattr(options, "cpu") else "."),
        )
    from penstock.loader.checkpoint import read_model_config

    model = read_model_config(Path(options.model))
    if card is not None:
        num_blocks = options.num_blocks or card.num_blocks(model, options.weight_bits, BLOCK_SIZE)
        engine = SimulatedEngine.of(wanted, num_blocks, BLOCK_SIZE, model.max_context_len)
        host_blocks = card.num_host_blocks(model, BLOCK_SIZE, options.host_kv_gb * 1e9)
        engine = engine.with_host_tier(host_blocks, card.block_copy_s(model, BLOCK_SIZE))
        return card.step_time(model, options.weight_bits), engine
    step_time = HardwareStepTime.of_model(model, options.bandwidth * 1e9, options.tflops * 1e12, options.weight_bits)
    num_blocks = options.num_blocks or _DEFAULT_BLOCKS
    return step_time, SimulatedEngine.of(wanted, num_blocks, BLOCK_SIZE, model.max_context_len)


def _measure(options: argparse.Namespace) -> int:
    """The profile of a model's server under load, or of a recording, written to --profile."""
    if options.profile is None:
        raise ConfigError("--measure needs a file for what it finds.", remedy="Give --profile.")
    from penstock.bench.calibration import measure_profile, profile_of_recording

    if options.measure and any(Path(options.measure).glob("steps-*.jsonl")):
        profile = profile_of_recording(Path(options.measure), USUAL_FRONTEND)
    else:
        progress = Console(stderr=True)
        more = shlex.split(options.serve)
        profile = measure_profile(options.measure, more, options.seconds, progress.print)
    options.profile.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    fitted = profile.step_time
    print(
        f"{fitted.num_steps} steps measured, median error of the model {fitted.error:.1%}; wrote {options.profile}",
        file=sys.stderr,
    )
    return 0
