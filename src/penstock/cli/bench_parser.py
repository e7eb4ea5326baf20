"""The command line of `penstock bench`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATASETS = ("random", "prefix-tree", "conversations", "sharegpt", "custom", "trace")
TRACE_FORMATS = ("auto", "penstock", "mooncake", "qwen", "burstgpt", "azure")
CARD_NAMES = ("h200",)
AddCommand = Callable[[Any, str, str, Any], Any]


def add_bench(commands: Any, add_command: AddCommand, parser_class: Any) -> None:
    """add_command: makes a subparser of (commands, name, text, run)."""
    bench = commands.add_parser("bench", help="measure servers, honestly: load, replay, compare, report")
    inner = bench.add_subparsers(dest="bench_command", metavar="COMMAND", parser_class=parser_class, required=True)
    serve = add_command(
        inner, "serve", "load one server, or compare several", _run("penstock.cli.bench", "bench_serve")
    )
    bench.set_defaults(command_parser=serve)
    _add_targets(serve)
    _add_workload(serve)
    _add_arrivals(serve)
    _add_measuring(serve)
    replay = add_command(inner, "replay", "replay recorded traffic", _run("penstock.cli.bench", "bench_replay"))
    replay.add_argument("path", type=Path, metavar="TRACE", help="of `serve --record`, `bench record`, or another tool")
    _add_targets(replay)
    _add_trace(replay)
    _add_measuring(replay)
    # What only `serve` offers stays at its default.
    known = {action.dest for action in replay._actions}
    replay.set_defaults(**{action.dest: action.default for action in serve._actions if action.dest not in known})
    replay.set_defaults(dataset="trace")
    _add_local(inner, add_command)
    simulate = add_command(
        inner,
        "sim",
        "simulate an engine: its real scheduler, on measured steps",
        _run("penstock.cli.bench_sim", "bench_sim"),
    )
    add_simulation(simulate)
    simulate.add_argument("--profile", type=Path, help="steps measured by `bench sim --measure MODEL --profile FILE`")
    simulate.add_argument(
        "--measure", metavar="MODEL|DIR", nargs="?", const="",
        help="serve this model [the bundled] here under load, or take the steps of a recording, and write --profile",
    )  # fmt: skip
    simulate.add_argument("--serve", default="", help="further options of the served model, in one word: '--seed 1'")
    simulate.add_argument("--seconds", type=float, default=30.0, help="of measuring [30]")
    simulate.add_argument("--max-num-seqs", type=int, default=64, help="[64]")
    simulate.add_argument("--max-num-batched-tokens", type=int, default=512, help="[512]")
    simulate.add_argument("--no-prefix-caching", action="store_true", help="keep no finished blocks")
    simulate.add_argument("--html", type=Path, help="write a report here")
    simulate.add_argument("--json", type=Path, help="write the results here")
    record = add_command(
        inner,
        "record",
        "record the traffic of any server, as a proxy before it",
        _run("penstock.cli.bench_record", "bench_record"),
    )
    record.add_argument("url", metavar="URL", help="the server to forward to")
    record.add_argument("directory", type=Path, metavar="DIR", help="where the trace is written")
    record.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    record.add_argument("--port", type=int, default=8001, help="[8001]")
    record.add_argument("--tokenizer", type=Path, help="the model's tokenizer.json [4 bytes are taken for a token]")
    record.add_argument("--contents", action="store_true", help="also record contents, redacted")


def _add_local(inner: Any, add_command: AddCommand) -> None:
    start = add_command(
        inner,
        "start",
        "how long a server takes to start, warm and cold",
        _run("penstock.cli.bench_local", "bench_start"),
    )
    offline = add_command(
        inner, "offline", "tokens a second of the LLM class", _run("penstock.cli.bench_local", "bench_offline")
    )
    ops = add_command(
        inner, "ops", "every kernel against this machine's limits", _run("penstock.cli.bench_local", "bench_ops")
    )
    ops.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="[2]")
    ops.add_argument("--isa", help="instruction set [the best here]")
    ops.add_argument("--only", default="", help="ops and shapes that contain this")
    ops.add_argument("--seconds", type=float, default=0.4, help="a case [0.4]")
    ops.add_argument("--json", type=Path, help="write the results here")
    ops.add_argument("--html", type=Path, help="write a roofline plot and table here")
    for command in (start, offline):
        command.add_argument("model", nargs="?", default="", metavar="MODEL", help="directory [the bundled model]")
        command.add_argument("--rounds", type=int, default=3, help="[3]")
        command.add_argument("--json", type=Path, help="write the results here")
    offline.add_argument("--requests", type=int, default=32, help="in each round [32]")
    offline.add_argument("--input-len", type=int, default=128, help="[128]")
    offline.add_argument("--output-len", type=int, default=64, help="[64]")
    offline.add_argument("--seed", type=int, default=0, help="[0]")


def add_advise(commands: Any, add_command: AddCommand) -> None:
    """`penstock advise`."""
    advise = add_command(
        commands,
        "advise",
        "say which settings and how many replicas a workload needs",
        _run("penstock.cli.advise", "advise"),
    )
    add_simulation(advise)
    advise.add_argument(
        "--profile", type=Path, action="append",
        help="steps measured by `bench sim --measure`; several, such as of other --quantization, are compared",
    )  # fmt: skip
    advise.add_argument("--cpu", action="store_true", help="measure --model [the bundled] on this machine first")
    advise.add_argument(
        "--quantization", action="append",
        help="of the weights of --cpu, as `penstock serve` takes it; several are compared [none]",
    )  # fmt: skip
    advise.add_argument("--seconds", type=float, default=30.0, help="of measuring each of them [30]")
    advise.add_argument("--max-replicas", type=int, default=8, help="[8]")
    advise.add_argument("--price", type=float, default=0.0, help="dollars an hour of one replica")


def add_simulation(command: Any) -> None:
    """What a simulation needs: a platform, a workload, arrivals, an objective."""
    group = command.add_argument_group("Platform")
    group.add_argument("--model", metavar="DIR|FILE", help="of which a platform that is not here knows the shapes")
    group.add_argument("--gpu", choices=CARD_NAMES, help="--model on a card whose limits are known")
    group.add_argument("--bandwidth", type=float, help="--model on a machine with this memory, GB/s")
    group.add_argument("--tflops", type=float, help="of that machine, 10^12 operations a second")
    group.add_argument("--weight-bits", type=float, default=16, help="on such a machine, bits a weight [16]")
    group.add_argument("--num-blocks", type=int, help="of 16 tokens in the KV cache [of the profile; else 8192]")
    group.add_argument(
        "--host-kv-gb", type=float, default=0.0, help="of --gpu: host memory that keeps what its KV cache gives up [0]"
    )
    _add_workload(command)
    _add_arrivals(command)
    command.add_argument("--slo", action="append", default=[], help="ttft:p99=500ms, tpot=50ms, or an MLPerf class")


def _run(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        import importlib

        return int(getattr(importlib.import_module(module), name)(options))

    return run


def _add_targets(command: Any) -> None:
    command.add_argument("urls", nargs="+", metavar="URL", help="servers, such as http://127.0.0.1:8000")
    command.add_argument("--model", help="the model's name [the first that the server lists]")
    command.add_argument("--api-key", help="[variable OPENAI_API_KEY]")
    command.add_argument("--timeout", type=float, default=600.0, help="seconds after which a request failed [600]")
    command.add_argument("--no-stream", action="store_true", help="ask for whole answers")


def _add_workload(command: Any) -> None:
    group = command.add_argument_group("Requests")
    group.add_argument("--dataset", choices=DATASETS, default="random", help="[random]")
    group.add_argument("--path", type=Path, help="the file of sharegpt, custom and trace")
    group.add_argument("--trace", type=Path, help="short for --dataset trace --path TRACE")
    group.add_argument("--format", choices=TRACE_FORMATS, default="auto", help="of a trace [auto: by its first line]")
    group.add_argument("--requests", type=int, default=None, help="how many [200; of a file: all]")
    group.add_argument("--input-len", type=int, default=512, help="prompt tokens, shared prefixes not counted [512]")
    group.add_argument("--output-len", type=int, default=128, help="[128]")
    group.add_argument("--spread", type=float, default=0.0, help="lengths vary by this share of themselves [0]")
    group.add_argument("--levels", default="512x4,256x4", help="of prefix-tree: TOKENSxBRANCHES from the root on")
    group.add_argument("--turns", type=int, default=4, help="of conversations [4]")
    group.add_argument("--think", type=float, default=1.0, help="mean seconds between an answer and the next turn [1]")
    group.add_argument("--chat", action="store_true", help="send chat messages of words instead of token ids")
    group.add_argument("--token-limit", type=int, default=1000, help="token ids stay below this [1000]")
    group.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json to count a file's tokens with [4 characters each]"
    )
    group.add_argument("--keep-eos", action="store_true", help="let answers end where the model ends them")
    group.add_argument("--seed", type=int, default=None, help="[drawn, so that no prefix cache is warm]")


def _add_trace(command: Any) -> None:
    group = command.add_argument_group("Requests")
    group.add_argument("--format", choices=TRACE_FORMATS, default="auto", help="[auto: by the first line]")
    group.add_argument("--requests", type=int, default=None, help="at most this many [all]")
    group.add_argument("--speed", type=float, default=1.0, help="plays it this many times faster [1]")
    group.add_argument("--chat", action="store_true", help="send chat messages of words instead of token ids")
    group.add_argument("--token-limit", type=int, default=1000, help="token ids stay below this [1000]")
    group.add_argument("--seed", type=int, default=None, help="[drawn, so that no prefix cache is warm]")


def _add_arrivals(command: Any) -> None:
    group = command.add_argument_group("Arrivals")
    rates = "requests a second: 5, or stages RATE:SECONDS and ramps: 2:30,2-8:60,8:30; of a search, the first"
    group.add_argument("--rate", help=rates)
    group.add_argument("--process", choices=("poisson", "gamma", "constant"), default="poisson", help="[poisson]")
    group.add_argument("--burstiness", type=float, default=1.0, help="shape of gamma: below 1 is burstier [1]")
    group.add_argument("--concurrency", type=int, help="closed loop of this many users [16, if there is no --rate]")
    group.add_argument("--speed", type=float, default=1.0, help="plays a trace this many times faster [1]")


def _add_measuring(command: Any) -> None:
    group = command.add_argument_group("Measuring")
    group.add_argument("--slo", action="append", default=[], help="ttft:p99=500ms, tpot=50ms, or an MLPerf class")
    group.add_argument("--search", action="store_true", help="find the highest rate that keeps the SLO")
    group.add_argument("--trial-s", type=float, default=30.0, help="least seconds of sending in each trial [30]")
    group.add_argument("--tolerance", type=float, default=0.03, help="of the search [0.03]")
    group.add_argument("--rounds", type=int, default=None, help="[1; 3 with several servers]")
    group.add_argument("--warmup", type=int, default=2, help="requests before, with other prompts [2]")
    group.add_argument("--price", type=float, help="dollars an hour of the server, for the cost per million tokens")
    group.add_argument("--json", type=Path, help="write the results here")
    group.add_argument("--html", type=Path, help="write a report here: one page, for any browser, no network")
    group.add_argument("--requests-out", type=Path, help="write every request's observations here, as JSON lines")
    group.add_argument("--quiet", action="store_true", help="no live progress")
