"""Results for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from penstock.bench.capacity_search import SearchResult
from penstock.bench.measure import Comparison, paired_ratio
from penstock.bench.metrics import DEFINITIONS, Summary, summarise
from penstock.bench.sample_size import SHARES, Quantile, mean_interval
from penstock.bench.slo import Slo

_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL per chunk", "itl_token": "ITL per token", "e2e": "E2E"}


def summary_table(name: str, summary: Summary) -> RenderableType:
    """Everything of one run that fits a terminal."""
    latencies = Table(title=f"{name}: milliseconds, failures as infinitely late", title_justify="left")
    latencies.add_column("")
    for heading in ("mean", *(f"p{share * 100:g}" for share in SHARES)):
        latencies.add_column(heading, justify="right")
    for key, shown in _LATENCIES.items():
        values = summary.latency[key]
        mean = "-" if values.mean is None else "inf" if values.num_infinite else _ms(values.mean)
        latencies.add_row(shown, mean, *(_quantile(quantile) for quantile in values.quantiles))
    lag = summary.send_lag
    if lag.count:
        latencies.add_row("client send lag", _ms(lag.mean or 0.0), *(_quantile(quantile) for quantile in lag.quantiles))
    return Group(latencies, Text("\n".join(summary_lines(summary))))


def summary_lines(summary: Summary) -> list[str]:
    """Counts, rates, verdicts and warnings."""
    failures = ", ".join(f"{count} x {what}" for what, count in summary.failures.items())
    steady = summary.steady_output_token_rate
    lines = [
        f"{summary.num_succeeded} of {summary.num_attempted} requests succeeded, {summary.num_failed} failed"
        + (f" ({failures})" if failures else "")
        + (f", {summary.num_cancelled} were cancelled as planned" if summary.num_cancelled else ""),
        f"{summary.duration_s:.2f} s; requests/s: offered {_rate(summary.offered_rate)}, done "
        f"{summary.request_rate:.2f}; "
        f"output tokens/s: {summary.output_token_rate:.1f} full, {'-' if steady is None else f'{steady:.1f}'} steady",
        f"tokens: {summary.prompt_tokens} prompt"
        + (f" ({summary.cached_tokens} cached)" if summary.cached_tokens is not None else "")
        + f", {summary.output_tokens} output"
        + (f", {summary.tokens_per_chunk:.2f} a chunk" if summary.tokens_per_chunk else ""),
    ]
    lines[1:1] = [f"the first {what}: {said}" for what, said in summary.refusals.items()]
    for verdict in summary.slo:
        shown = ", proven at 99 %" if verdict.is_shown else ""
        lines.append(f"{verdict.limit}: {'kept' if verdict.is_kept else 'BROKEN'} at {_ms(verdict.value_s)} ms{shown}")
    if summary.goodput_share is not None and summary.goodput_rate is not None:
        lines.append(f"goodput: {summary.goodput_rate:.2f} requests/s, {summary.goodput_share:.1%} of all attempted")
    lines += [f"warning: {warning}" for warning in summary.warnings]
    lines += [f"VOID: {reason}" for reason in summary.void]
    return lines


def definition_lines() -> list[str]:
    return [f"{name}: {text}" for name, text in DEFINITIONS.items()]


def comparison_table(comparison: Comparison, slo: Slo) -> Table:
    """Means over rounds with 95 % intervals, and ratios to the first target, paired by rounds."""
    names = [target.url for target in comparison.targets]
    table = Table(title=f"{len(comparison.records)} rounds, interleaved; mean [95 %], and the ratio to the first")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    summaries = [[summarise(record, slo) for record in row] for row in comparison.records]
    for label, values in _figures(summaries).items():
        columns = list(zip(*values, strict=True))
        cells = []
        for index, column in enumerate(columns):
            finite = all(math.isfinite(value) for value in column)
            cell = _interval(column) if finite else "inf"
            if index and finite and all(0 < value < math.inf for value in columns[0]):
                ratio = paired_ratio(column, columns[0])
                cell += f"\nx {ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]{' *' if ratio.differs else ''}"
            cells.append(cell)
        table.add_row(label, *cells)
    return table


def _figures(summaries: Sequence[Sequence[Summary]]) -> dict[str, list[list[float]]]:
    """By label: values[round][target]."""

    def rows(of: str, share: float) -> list[list[float]]:
        return [
            [summary.latency[of].at(share).value * 1e3 if summary.latency[of].count else math.inf for summary in row]
            for row in summaries
        ]

    return {
        "TTFT p50 ms": rows("ttft", 0.5), "TTFT p99 ms": rows("ttft", 0.99), "TPOT p50 ms": rows("tpot", 0.5),
        "ITL p50 ms": rows("itl", 0.5), "ITL p99 ms": rows("itl", 0.99), "E2E p50 ms": rows("e2e", 0.5),
        "output tokens/s": [[summary.output_token_rate for summary in row] for row in summaries],
        "failed": [[float(summary.num_failed) for summary in row] for row in summaries],
    }  # fmt: skip


def search_table(result: SearchResult) -> Table:
    """The trials, by rate."""
    broken = "" if math.isinf(result.broken) else f", broken at {result.broken:.3g}"
    table = Table(title=f"SLO kept up to {result.kept:.4g} requests/s{broken}. {result.stopped}", title_justify="left")
    for heading in ("requests/s", "requests", "failed", "TTFT p99 ms", "TPOT p99 ms", "verdict"):
        table.add_column(heading, justify="right")
    for trial in sorted(result.trials, key=lambda trial: trial.rate):
        latency = trial.summary.latency
        cells = [_quantile(latency[name].at(0.99)) if latency[name].count else "-" for name in ("ttft", "tpot")]
        verdict = "void" if trial.summary.void else "kept" if trial.is_kept else "broken"
        table.add_row(
            f"{trial.rate:.4g}", str(trial.summary.num_attempted), str(trial.summary.num_failed), *cells, verdict
        )
    return table


def _interval(values: Sequence[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.4g}" if math.isinf(low) else f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def _quantile(quantile: Quantile) -> str:
    return _ms(quantile.value) + ("" if quantile.is_supported else "?")


def _ms(seconds: float) -> str:
    return "inf" if math.isinf(seconds) else f"{seconds * 1e3:.2f}"


def _rate(rate: float) -> str:
    return "all at once" if math.isinf(rate) else f"{rate:.2f}"
