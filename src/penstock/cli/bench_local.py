"""`penstock bench start`, `offline` and `ops`: what is measured on this machine without a server to talk to."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import cast

import msgspec
from rich.console import Console
from rich.table import Table

from penstock.base.errors import ConfigError
from penstock.bench import startup
from penstock.bench.datasets import Shape, random_prompts
from penstock.bench.environment import manifest
from penstock.bench.prompts import DEFAULT_TOKEN_LIMIT, PromptMaker
from penstock.bench.sample_size import mean_interval


def bench_start(options: argparse.Namespace) -> int:
    """Start-up times, warm and cold."""
    model = Path(options.model) if options.model else None
    if model is not None and not startup.weight_files(model):
        raise ConfigError(f"{model} holds no weights.", remedy="Name a directory with *.safetensors.")
    found = startup.measure(model, _bounded(options.rounds), with_cold=model is not None)
    table = Table(title=f"{options.rounds} rounds: seconds until /health/ready answers 200", title_justify="left")
    for heading in ("what", "median", "least", "most"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, seconds in found["seconds"].items():
        table.add_row(name, *(f"{pick(seconds):.2f}" for pick in (statistics.median, min, max)))
    console = Console()
    console.print(table)
    if found["phases"]:
        console.print(found["phases"], highlight=False, markup=False)
    _write(options.json, {**found, "manifest": manifest()})
    return 0


def bench_offline(options: argparse.Namespace) -> int:
    """Tokens a second of the LLM class, without a server: rounds of new random prompts."""
    from penstock.llm import LLM
    from penstock.messages import SamplingParams

    rounds = _bounded(options.rounds)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=options.output_len)
    shape = Shape(options.input_len, options.output_len)
    seconds = []
    with LLM(options.model) as llm:
        maker = PromptMaker(as_chat=False, token_limit=min(DEFAULT_TOKEN_LIMIT, llm.ready.vocab_size))
        for number in range(rounds + 1):  # the first is the warm-up
            drawn = random_prompts(shape, maker, options.requests, options.seed + number)
            prompts = [cast(list[int], request.prompt) for request in drawn]
            start_s = time.perf_counter()
            done = llm.generate(prompts, sampling)
            if number:
                seconds.append(time.perf_counter() - start_s)
            if any(len(generation.outputs[0].token_ids) != options.output_len for generation in done):
                raise RuntimeError("an answer had another length than asked for")
    num_output = options.requests * options.output_len
    table = Table(title=f"{options.requests} x ({options.input_len} + {options.output_len}) tokens, {rounds} rounds")
    for heading in ("", "mean", "95 % interval"):
        table.add_column(heading, justify="right")
    rates = {
        "requests/s": [options.requests / taken for taken in seconds],
        "output tokens/s": [num_output / taken for taken in seconds],
        "all tokens/s": [(num_output + options.requests * options.input_len) / taken for taken in seconds],
    }
    for name, values in rates.items():
        mean, low, high = mean_interval(values)
        table.add_row(name, f"{mean:.2f}", f"{low:.2f} to {high:.2f}" if rounds > 1 else "one round shows none")
    Console().print(table)
    _write(options.json, {"seconds": seconds, "rates": rates, "manifest": manifest(model=options.model)})
    return 0


def bench_ops(options: argparse.Namespace) -> int:
    """Every native op beside torch and the machine's limits."""
    from penstock.bench.roofline import roofline_page, run_ops

    found = run_ops(options.threads, options.isa, options.only, options.seconds, lambda line: print(line, flush=True))
    _write(options.json, found)
    if options.html is not None:
        options.html.write_text(roofline_page(found), encoding="utf-8")
    return 0


def _bounded(rounds: int) -> int:
    if not 1 <= rounds <= 1000:
        raise ConfigError("--rounds must be 1 to 1000.", param="rounds")
    return rounds


def _write(path: Path | None, content: object) -> None:
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))
