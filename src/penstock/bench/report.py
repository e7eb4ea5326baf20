"""One HTML page of a measurement: no network, nothing to install, light and dark. Charts are drawn here, as SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final

import numpy as np

from penstock.bench.capacity_search import SearchResult
from penstock.bench.load_run import RunRecord
from penstock.bench.metrics import DEFINITIONS, Outcome, Summary, conclude, token_gaps
from penstock.bench.report_page import SCRIPT, STYLE
from penstock.bench.sample_size import SHARES, Distribution, Quantile
from penstock.bench.slo import Slo
from penstock.bench.svg_chart import Axis, Series, line_chart

_BINS: Final = 120
_COLUMNS: Final = (
    "request", "at s", "prompt tokens", "cached", "output tokens", "send lag ms", "TTFT ms", "TPOT ms", "E2E ms",
    "failure",
)  # fmt: skip
_LATENCIES: Final = {
    "ttft": "TTFT", "tpot": "TPOT", "itl": "ITL, per chunk", "itl_token": "ITL, per token", "e2e": "E2E",
}  # fmt: skip


@dataclass
class ReportedRun:
    """A run under its name."""

    name: str
    record: RunRecord
    summary: Summary


@dataclass
class Report:
    """What a page shows. price_per_hour: dollars, of one server."""

    title: str
    runs: Sequence[ReportedRun]
    manifest: dict[str, Any]
    slo: Slo = ()
    searches: Sequence[tuple[str, SearchResult]] = ()
    price_per_hour: float | None = None
    notes: list[str] = field(default_factory=list)

    def html(self) -> str:
        """The whole page."""
        parts = [f"<h1>{escape(self.title)}</h1>", f'<p class="dim">{escape(str(self.manifest.get("date", "")))}</p>']
        parts += [f"<p>{escape(note)}</p>" for note in self.notes]
        for name, result in self.searches:
            parts.append(_search_section(name, result, self.slo, self.price_per_hour))
        for index, run in enumerate(self.runs):
            parts.append(_run_section(run, self.slo, self.price_per_hour))
            if index == 0:
                parts.append(_table_section(run))
        parts.append(_definitions())
        parts.append(f"<h2>Environment</h2><pre>{escape(json.dumps(self.manifest, indent=1, default=str))}</pre>")
        page = "\n".join(parts)
        script = f"<script>{SCRIPT}</script>" if self.runs else ""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f"<body>{page}{script}</body></html>"
        )


def cost_per_million(price_per_hour: float, output_token_rate: float) -> float:
    """Dollars per million output tokens of a server kept busy at this rate; prompts are not billed apart."""
    return price_per_hour / (output_token_rate * 3600) * 1e6 if output_token_rate > 0 else math.inf


def _run_section(run: ReportedRun, slo: Slo, price: float | None) -> str:
    summary = run.summary
    outcomes = [conclude(seen) for seen in run.record.observations if not seen.is_cancelled]
    parts = [f"<h2>{escape(run.name)}</h2>"]
    parts += [f'<p class="banner void">VOID: {escape(reason)}</p>' for reason in summary.void]
    parts += [f'<p class="banner warning">{escape(warning)}</p>' for warning in summary.warnings]
    parts.append(_tiles(summary, price))
    parts.append(_failures_and_verdicts(summary))
    parts.append(_latency_table(summary))
    charts = [_distribution_chart(outcomes), _gap_chart(run, outcomes), _latency_timeline(run, slo)]
    charts += [_load_timeline(run), _rate_timeline(run), _kv_timeline(run)]
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    return "\n".join(parts)


def _tiles(summary: Summary, price: float | None) -> str:
    steady = summary.steady_output_token_rate
    tiles = [
        ("succeeded", f"{summary.num_succeeded} of {summary.num_attempted}"),
        ("requests/s done", f"{summary.request_rate:.2f}"),
        ("requests/s offered", "all at once" if math.isinf(summary.offered_rate) else f"{summary.offered_rate:.2f}"),
        ("output tokens/s, full", f"{summary.output_token_rate:.1f}"),
        ("output tokens/s, steady", "-" if steady is None else f"{steady:.1f}"),
        ("prompt tokens", f"{summary.prompt_tokens}"),
        ("cached", _share(summary.cached_tokens, summary.prompt_tokens)),
        ("most in flight", f"{summary.max_in_flight}"),
        ("duration", f"{summary.duration_s:.1f} s"),
    ]
    if summary.goodput_share is not None:
        tiles.append(("within the SLO, of all attempted", f"{summary.goodput_share:.1%}"))
    if price is not None:
        tiles.append(("$ per million output tokens", f"{cost_per_million(price, summary.output_token_rate):.3f}"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles
    )
    formula = ""
    if price is not None:
        formula = (
            f'<p class="dim">Cost: ${price:g} an hour / ({summary.output_token_rate:.1f} output tokens/s x 3600 s) x '
            "1e6. "
            "The whole price is laid on output tokens, at this load, around the clock.</p>"
        )
    return f'<div class="tiles">{cells}</div>{formula}'


def _share(part: int | None, whole: int) -> str:
    return "not told" if part is None else f"{part / whole:.1%}" if whole else "-"


def _failures_and_verdicts(summary: Summary) -> str:
    lines = []
    for failure, count in summary.failures.items():
        said = summary.refusals.get(failure)
        text = f"{count} failed: {failure}" + (f"; the server said of the first: {said}" if said else "")
        lines.append(f'<li class="broken">{escape(text)}</li>')
    for verdict in summary.slo:
        word = "kept" if verdict.is_kept else "broken"
        proof = ", proven at 99 % confidence" if verdict.is_shown else ""
        text = f"{verdict.limit}: {word}, {_ms(verdict.value_s)} ms{proof}"
        lines.append(f'<li class="{word}">{escape(text)}</li>')
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _latency_table(summary: Summary) -> str:
    heads = "".join(f"<th>p{share * 100:g}</th>" for share in SHARES)
    rows = [_latency_row(label, summary.latency[name]) for name, label in _LATENCIES.items()]
    rows += [_latency_row("client send lag", summary.send_lag), _latency_row("client loop lag", summary.loop_lag)]
    return (
        f'<h2>Latency, milliseconds</h2><div class="scroll"><table><tr><th></th><th>count</th><th>mean</th>{heads}</tr>'
        f'{"".join(rows)}</table></div><p class="dim">[95 % interval]; ? marks percentiles that the sample is too '
        "small for. Failures are infinitely late.</p>"
    )


def _latency_row(label: str, values: Distribution) -> str:
    mean = "-" if values.mean is None else "inf" if values.num_infinite else _ms(values.mean)
    cells = "".join(f"<td>{_cell(quantile)}</td>" for quantile in values.quantiles)
    return f"<tr><td>{label}</td><td>{values.count}</td><td>{mean}</td>{cells}</tr>"


def _cell(quantile: Quantile) -> str:
    interval = (
        f' <span class="dim">[{_ms(quantile.low)}, {_ms(quantile.high)}]</span>' if quantile.is_supported else "?"
    )
    return f"{_ms(quantile.value)}{interval}"


def _ms(seconds: float) -> str:
    return "inf" if math.isinf(seconds) else f"{seconds * 1e3:.2f}"


def _distribution_chart(outcomes: list[Outcome]) -> str:
    series = [
        _cumulative("TTFT", [outcome.ttft for outcome in outcomes]),
        _cumulative("E2E", [outcome.e2e for outcome in outcomes]),
    ]
    return line_chart("Share of requests within a time", Axis("ms", is_log=True), Axis("%"), series)


def _gap_chart(run: ReportedRun, outcomes: list[Outcome]) -> str:
    counted = [seen for seen in run.record.observations if not seen.is_cancelled]
    per_token = [gap for seen, outcome in zip(counted, outcomes, strict=True) for gap in token_gaps(seen, outcome)]
    series = [
        _cumulative("ITL per chunk", [gap for outcome in outcomes for gap in outcome.gaps]),
        _cumulative("ITL per token", per_token),
        _cumulative("TPOT per request", [outcome.tpot for outcome in outcomes if outcome.tpot is not None]),
    ]
    return line_chart("Share of gaps within a time", Axis("ms", is_log=True), Axis("%"), series)


def _cumulative(name: str, values: list[float]) -> Series:
    """At even shares, with the tail; failures keep the curve below 100 %."""
    if not values:
        return Series(name, [], [])
    ordered = np.sort(np.asarray(values))
    shares = np.unique(np.concatenate([np.linspace(0, 1, 201), 1 - np.geomspace(1e-5, 0.01, 40)]))
    ranks = np.minimum((shares * len(ordered)).astype(int), len(ordered) - 1)
    return Series(name, (ordered[ranks] * 1e3).tolist(), (shares * 100).tolist())


def _latency_timeline(run: ReportedRun, slo: Slo) -> str:
    """TTFT by the time of sending, in bins: single points of 100,000 requests would be a blot."""
    seen = [one for one in run.record.observations if not one.is_cancelled]
    at = np.asarray([one.intended_s - run.record.start_s for one in seen])
    ttft = np.asarray([conclude(one).ttft for one in seen]) * 1e3
    series = []
    if seen:
        bins = np.minimum((at / max(at.max(), 1e-9) * _BINS).astype(int), _BINS - 1)
        width = max(at.max(), 1e-9) / _BINS
        for name, share in (("p50", 50), ("p99", 99)):
            filled = [number for number in range(_BINS) if np.any(bins == number)]
            found = [float(np.percentile(ttft[bins == number], share, method="inverted_cdf")) for number in filled]
            series.append(Series(name, [(number + 0.5) * width for number in filled], found))
    limits = [(str(limit), limit.limit_s * 1e3) for limit in slo if limit.metric == "ttft"]
    return line_chart("TTFT by time of sending", Axis("s"), Axis("ms"), series, limits)


def _load_timeline(run: ReportedRun) -> str:
    record = run.record
    starts = np.sort([seen.started_s - record.start_s for seen in record.observations])
    ends = np.sort([seen.ended_s - record.start_s for seen in record.observations])
    series = []
    if len(starts):
        grid = np.linspace(0, max(ends.max(), 1e-9), 400)
        in_flight = np.searchsorted(starts, grid, side="right") - np.searchsorted(ends, grid, side="right")
        series.append(Series("in flight (client)", grid.tolist(), in_flight.tolist()))
    for name, label in (("running", "running (server)"), ("waiting", "waiting (server)")):
        series.append(_sampled(record, name, label))
    return line_chart("Requests at the same time", Axis("s"), Axis("requests"), series)


def _sampled(record: RunRecord, name: str, label: str, factor: float = 1.0) -> Series:
    samples = [(moment, values[name] * factor) for moment, values in record.server_samples if name in values]
    return Series(label, [moment for moment, _ in samples], [value for _, value in samples], is_stepped=True)


def _kv_timeline(run: ReportedRun) -> str:
    series = [_sampled(run.record, "kv_usage", "KV blocks in use", 100.0)]
    return line_chart("KV cache (server's metrics)", Axis("s"), Axis("%"), series)


def _rate_timeline(run: ReportedRun) -> str:
    record = run.record
    chunks = [np.frombuffer(seen.chunk_s) for seen in record.observations if len(seen.chunk_s)]
    series = []
    if chunks:
        moments = np.concatenate(chunks) - record.start_s
        counts, edges = np.histogram(moments, bins=_BINS, range=(0.0, max(float(moments.max()), 1e-9)))
        width = edges[1] - edges[0]
        rate = counts / width * (run.summary.tokens_per_chunk or 1.0)
        series.append(Series("output tokens/s", ((edges[:-1] + edges[1:]) / 2).tolist(), rate.tolist()))
    return line_chart("Throughput", Axis("s"), Axis("tokens/s"), series)


def _search_section(name: str, result: SearchResult, slo: Slo, price: float | None) -> str:
    trials = sorted((trial for trial in result.trials if not trial.summary.void), key=lambda trial: trial.rate)
    lines = [f"<h2>Throughput against latency: {escape(name)}</h2>"]
    upper = "" if math.isinf(result.broken) else f"; broken at {result.broken:.4g}"
    lines.append(f"<p>SLO kept up to <b>{result.kept:.4g} requests/s</b>{upper}. {escape(result.stopped)}</p>")
    kept = [trial for trial in trials if trial.rate == result.kept]
    if price is not None and kept:
        rate = kept[0].summary.output_token_rate
        lines.append(
            f"<p>At the SLO: ${cost_per_million(price, rate):.3f} per million output tokens "
            f'<span class="dim">(${price:g} an hour / ({rate:.1f} output tokens/s x 3600 s) x 1e6)</span></p>'
        )
    charts = []
    for metric in dict.fromkeys(limit.metric for limit in slo):
        limits = [limit for limit in slo if limit.metric == metric]
        points = [trial for trial in trials if trial.summary.latency[metric].count]
        series = []
        for share in (0.5, 0.99):
            values = [trial.summary.latency[metric].at(share).value * 1e3 for trial in points]
            series.append(Series(f"p{share * 100:g}", [trial.rate for trial in points], values, has_markers=True))
        named = [(str(limit), limit.limit_s * 1e3) for limit in limits]
        charts.append(line_chart(_LATENCIES[metric], Axis("requests/s"), Axis("ms", is_log=True), series, named))
    rates = [trial.rate for trial in trials]
    done = [trial.summary.output_token_rate for trial in trials]
    throughput = [Series("output tokens/s", rates, done, has_markers=True)]
    charts.append(line_chart("Throughput by offered rate", Axis("requests/s"), Axis("tokens/s"), throughput))
    lines.append(f'<div class="charts">{"".join(charts)}</div>')
    return "\n".join(lines)


def _table_section(run: ReportedRun) -> str:
    heads = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    # "</" would end the script element early.
    data = json.dumps(_rows(run.record), separators=(",", ":")).replace("</", "<\\/")
    return (
        f"<h2>Requests of {escape(run.name)}</h2>"
        '<p><button id="back">Back</button> <button id="on">On</button> <span id="place"></span> '
        '<label><input type="checkbox" id="only"> failures only</label></p>'
        f'<div class="scroll"><table id="requests"><thead><tr>{heads}</tr></thead><tbody></tbody></table></div>'
        f'<script type="application/json" id="data">{data}</script>'
    )


def _rows(record: RunRecord) -> list[list[Any]]:
    def ms(seconds: float | None) -> float | None:
        return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1e3, 2)

    rows: list[list[Any]] = []
    for seen in record.observations:
        outcome = conclude(seen)
        rows.append([
            seen.request.index, round(seen.intended_s - record.start_s, 3), seen.prompt_tokens,
            seen.cached_tokens if seen.cached_tokens >= 0 else None, outcome.num_tokens,
            ms(seen.started_s - seen.intended_s), ms(outcome.ttft), ms(outcome.tpot), ms(outcome.e2e),
            "cancelled" if seen.is_cancelled else seen.failure,
        ])  # fmt: skip
    return rows


def _definitions() -> str:
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS.items())
    return f"<h2>What the figures mean</h2><dl>{items}</dl>"
