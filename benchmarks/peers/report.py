"""Turns raw results into tables, and writes both to benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cases import Case, Figures, Sample, figures

RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).resolve().parent.parent / "results"))
OURS = "penstock"
# Instruction sets that decide these figures.
NOTED_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


@dataclass
class Table:
    """A table for people: its cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", _line(self.columns), _line("---" for _ in self.columns)]
        lines += [_line(row) for row in self.rows]
        lines += ["", self.note] if self.note else []
        return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def machine_facts(model: Path, threads: int) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in info if ":" in line)
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    flags = facts.get("flags", "").split()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": commit.stdout.strip(),
        "cpu": facts.get("model name", platform.processor()),
        "instruction_sets": [flag for flag in NOTED_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "threads": threads,
        "model": model.name,
    }


def write_results(stem: str, result: dict[str, Any], tables: list[Table]) -> None:
    """<stem>.json with everything measured and <stem>.md with the tables."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    head = (
        f"# {result['kind']}: {result['model']}\n\n{result['date']}, {result['cpu']}, {result['cores']} cores "
        f"({', '.join(result['instruction_sets'])}), {result['memory_gb']} GB, {result['threads']} threads, "
        f"commit {result['commit']}. Medians of {result['rounds']} rounds.\n\n"
    )
    (RESULTS / f"{stem}.md").write_text(head + "\n".join(table.markdown() for table in tables))


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def offline_tables(result: dict[str, Any]) -> list[Table]:
    """The figures of every engine, Penstock's ratios, and its fractions of the machine's limits."""
    cases = [Case(**case) for case in result["cases"]]
    tables = [_figures_table(result, cases)]
    if any(record["name"] != OURS for record in result["engines"]):
        tables.append(_ratio_table(result, cases))
    if result["limits"]:
        tables.append(_limits_table(result, cases))
    return tables


def _case_figures(record: dict[str, Any], case: Case) -> Figures | None:
    samples = [Sample(**sample) for sample in record["samples"].get(case.name, [])]
    return figures(case, samples) if samples else None


def _figures_table(result: dict[str, Any], cases: list[Case]) -> Table:
    table = Table(
        f"Offline, tokens/s end to end (after the first token), {result['model']}",
        ("engine", *(_heading(case) for case in cases), "peak memory GB (private)", "load s"),
        note="Peak memory is the proportional set size of all processes, the key-value pool included; "
        "private leaves mapped files out. Prefill counts prompt tokens.",
    )
    for record in result["engines"]:
        cells = [
            f"{record['name']} {record['version']}" + (f" (group {record['group'] + 1})" if record["group"] else "")
        ]
        for case in cases:
            shown = _case_figures(record, case)
            if shown is None:
                cells.append("failed" if record["failure"] else "-")
            else:
                cells.append(number(shown.end_to_end) + (f" ({number(shown.decode)})" if shown.decode else ""))
        memory = f"{record['memory_total'] / 1e9:.2f} ({record['memory_private'] / 1e9:.2f})"
        table.rows.append((*cells, memory, f"{record['load_s']:.1f}"))
    return table


def _heading(case: Case) -> str:
    return f"{case.name} ({case.prompt_len}+{case.output_len})" if case.is_decode else f"{case.name}"


def _ratio_table(result: dict[str, Any], cases: list[Case]) -> Table:
    """Penstock against each peer, from the rounds of the group that they shared."""
    table = Table(
        "Penstock / peer, end to end (after the first token)",
        ("peer", *(case.name for case in cases)),
        note="Each ratio is of medians of rounds run in turn. The last line is the lowest of its column.",
    )
    ours = {record["group"]: record for record in result["engines"] if record["name"] == OURS}
    lowest: dict[str, tuple[float, float | None]] = {}
    for record in result["engines"]:
        if record["name"] == OURS or record["group"] not in ours:
            continue
        cells = [record["name"]]
        for case in cases:
            mine, theirs = _case_figures(ours[record["group"]], case), _case_figures(record, case)
            if mine is None or theirs is None:
                cells.append("-")
                continue
            ratio = mine.end_to_end / theirs.end_to_end
            decode = mine.decode / theirs.decode if mine.decode and theirs.decode else None
            cells.append(_ratio(ratio, decode))
            lowest[case.name] = min(lowest.get(case.name, (ratio, decode)), (ratio, decode), key=lambda pair: pair[0])
        table.rows.append(tuple(cells))
    best = [_ratio(*lowest[case.name]) if case.name in lowest else "-" for case in cases]
    table.rows.append(("**best peer**", *best))
    return table


def _ratio(ratio: float, decode: float | None) -> str:
    return f"{ratio:.2f}x" + (f" ({decode:.2f}x)" if decode else "")


def _limits_table(result: dict[str, Any], cases: list[Case]) -> Table:
    limits: list[dict[str, Any]] = result["limits"]

    def middle(read: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(read(limit) for limit in limits)

    plain = middle(lambda limit: limit["dram_read_gb_s"]["plain"])
    huge = middle(lambda limit: limit["dram_read_gb_s"]["huge"])
    rate = middle(lambda limit: limit["torch_512x2048x8192_gflops"])
    table = Table(
        "Penstock and the machine's limits",
        ("case", "limit", "limit tokens/s", "Penstock tokens/s", "fraction"),
        note=f"DRAM read {plain:.1f} GB/s ({huge:.1f} with huge pages); torch bf16 linear 512x2048x8192 {rate:.0f} "
        "GFLOP/s. torch linears: all linears of a step (for a prefill those of the blocks), with torch's bf16 kernels.",
    )
    ours = [record for record in result["engines"] if record["name"] == OURS]
    for case in cases:
        samples = [Sample(**sample) for record in ours for sample in record["samples"].get(case.name, [])]
        if not samples:
            continue
        shown = figures(case, samples)
        achieved = shown.decode or shown.end_to_end
        candidates = []
        if case.batch == 1 and case.is_decode:
            candidates.append(("DRAM read", middle(lambda limit: limit["one_stream_tokens_s"])))
        rows = str(case.batch if case.is_decode else case.prompt_len)
        if rows in limits[0]["torch_linears"]:
            key = "tokens_s" if case.is_decode else "linears_only_tokens_s"
            candidates.append(("torch linears", middle(lambda limit, r=rows, k=key: limit["torch_linears"][r][k])))  # type: ignore[misc]
        for name, limit in candidates:
            table.rows.append((case.name, name, number(limit), number(achieved), f"{achieved / limit:.2f}"))
    return table


SERVER_COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    # heading, field of server_load.py's summary, factor, digits
    ("output tokens/s", "output_tokens_per_s", 1, 1),
    ("requests/s", "requests_per_s", 1, 1),
    ("TTFT p50 ms", "ttft_p50", 1e3, 1),
    ("TTFT p99 ms", "ttft_p99", 1e3, 1),
    ("ITL p50 ms", "itl_p50", 1e3, 2),
    ("ITL p99 ms", "itl_p99", 1e3, 2),
    ("TPOT p50 ms", "tpot_p50", 1e3, 2),
    ("tokens/event", "tokens_per_event", 1, 2),
    ("client CPU, cores", "client_cpu_share_of_a_core", 1, 2),
)


def server_tables(result: dict[str, Any]) -> list[Table]:
    """One table a case with every server's medians, and one of the processes."""
    tables = []
    for case in result["cases"]:
        table = Table(
            f"{case['name']} ({case['requests']} requests, {result['model']})",
            ("server", *(heading for heading, *_ in SERVER_COLUMNS), "failures"),
        )
        for record in result["servers"]:
            rounds = record["rounds"].get(case["name"], [])
            if rounds:
                cells = [_middle(rounds, name, factor, digits) for _, name, factor, digits in SERVER_COLUMNS]
                failures = sum(sum(summary["failures"].values()) for summary in rounds)
                table.rows.append((record["name"], *cells, str(failures)))
        if len(table.rows) > 1:
            table.rows += _server_ratios(result, case["name"])
        tables.append(table)
    tables[-1].note = (
        "ITL: gaps between events with a choice, over all requests; TTFT: to the first such event. Tokens are those "
        "of `usage`; a stream without finish_reason, [DONE] and the right number of tokens is a failure. The client "
        "shares the cores."
    )
    processes = Table("The servers", ("server", "first answer s", "peak memory GB (private)", "failure"))
    for record in result["servers"]:
        memory = f"{record['memory_total'] / 1e9:.2f} ({record['memory_private'] / 1e9:.2f})"
        processes.rows.append((record["name"], f"{record['ready_s']:.1f}", memory, record["failure"]))
    return [*tables, processes]


def _values(rounds: list[dict[str, Any]], name: str) -> list[float]:
    return [summary[name] for summary in rounds if summary[name] is not None]


def _middle(rounds: list[dict[str, Any]], name: str, factor: float, digits: int) -> str:
    values = _values(rounds, name)
    return number(statistics.median(values) * factor, digits) if values else "-"


def _server_ratios(result: dict[str, Any], case: str) -> list[tuple[str, ...]]:
    """Penstock's medians over each other server's, column by column."""
    by_name = {record["name"]: record["rounds"].get(case, []) for record in result["servers"]}
    ours = by_name.get(OURS)
    lines = []
    for name, rounds in by_name.items():
        if not ours or not rounds or name == OURS:
            continue
        cells = []
        for _, column, _, _ in SERVER_COLUMNS:
            mine, theirs = _values(ours, column), _values(rounds, column)
            has_ratio = mine and theirs and statistics.median(theirs) > 0
            cells.append(f"{statistics.median(mine) / statistics.median(theirs):.2f}x" if has_ratio else "-")
        lines.append((f"penstock / {name}", *cells, ""))
    return lines
