"""The report: one page without network, with what was measured in it, for small and large runs."""

from __future__ import annotations

import math
import re
import time
from array import array
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from penstock.bench.capacity_search import SearchResult, Trial
from penstock.bench.load_run import RunRecord
from penstock.bench.metrics import summarise
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.report import Report, ReportedRun, cost_per_million
from penstock.bench.slo import parse_slo
from penstock.bench.svg_chart import Axis, Series, line_chart, nice_step, show_number

SLO = parse_slo(["ttft:p99=400ms", "tpot=30ms"])


def made_up_run(count: int, rate: float = 50.0, num_chunks: int = 8) -> RunRecord:
    """A busy, uneven day: latencies rise in the middle, a hundredth fails."""
    observations = []
    for index in range(count):
        at_s = index / rate
        slow = 1 + math.sin(index / count * math.pi) * (1 + (index * 7919 % 101) / 50)
        seen = Observation(PlannedRequest([], 64, num_chunks, index), at_s, at_s, at_s, status=200, is_done=True)
        first_s, gap_s = at_s + 0.1 * slow, 0.01 * slow
        seen.chunk_s = array("d", [first_s + gap_s * number for number in range(num_chunks)])
        seen.chunk_tokens = array("l", [1] * num_chunks)
        seen.ended_s, seen.finish_reason = seen.chunk_s[-1], "length"
        seen.output_tokens, seen.prompt_tokens, seen.cached_tokens = num_chunks, 64, 32
        if index % 100 == 99:
            seen.failure, seen.refusal = "no [DONE]</script><b>", "a <reason>"
        observations.append(seen)
    end_s = max((seen.ended_s for seen in observations), default=0.0)
    samples = [(float(second), {"running": 5.0, "waiting": second % 7.0, "kv_usage": 0.4}) for second in range(20)]
    return RunRecord(observations, 0.0, end_s, array("d", [0.0001] * 100), 1.0, 0, samples)


def page(count: int) -> str:
    record = made_up_run(count)
    summary = summarise(record, SLO)
    trials = [Trial(rate, summarise(made_up_run(500, rate), SLO)) for rate in (10.0, 20.0, 40.0)]
    search = SearchResult(20.0, 40.0, trials)
    run = ReportedRun("http://here, a <model>", record, summary)
    return Report("A & B", [run], {"date": "today"}, SLO, [("http://here", search)], 2.5).html()


class _Balance(HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = {"meta", "input", "br", "hr", "link"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone() -> None:
    text = page(1000)
    parser = _Balance()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"(src|href)=|@import|url\(|https?://(?!here)", text)
    assert "prefers-color-scheme: dark" in text
    assert "A &amp; B" in text
    assert "a &lt;model&gt;" in text
    assert "10 failed: no [DONE]&lt;/script&gt;&lt;b&gt;; the server said of the first: a &lt;reason&gt;" in text
    assert text.count("</script>") == 2  # the data's own cannot end it
    assert text.count("<svg") == 6 + 3
    for shown in ("990 of 1000", "per million output tokens", "TTFT", "kept up to"):
        assert shown in text


def test_a_hundred_thousand_requests() -> None:
    start_s = time.process_time()
    text = page(100_000)
    assert len(text) < 20_000_000
    assert max(map(len, re.findall(r"<svg.*?</svg>", text, re.DOTALL))) < 100_000  # charts do not grow with the run
    assert time.process_time() - start_s < 120


def test_no_requests_at_all() -> None:
    record = made_up_run(0)
    text = Report("none", [ReportedRun("x", record, summarise(record))], {}).html()
    assert "No data." in text


def test_the_cost_formula() -> None:
    """3.6 $/h is 0.001 $ a second; at 1,000 tokens a second a million takes 1,000 s."""
    assert cost_per_million(3.6, 1000.0) == pytest.approx(1.0)
    assert cost_per_million(1.0, 0.0) == math.inf


def test_charts_are_well_formed_and_in_scale() -> None:
    found = line_chart("t<", Axis("x"), Axis("y"), [Series("a", [0, 10], [0, 100], has_markers=True)], [("limit", 50)])
    root = ET.fromstring(found)
    circles = root.findall(".//circle")
    assert len(circles) == 2
    limit = root.find(".//line[@class='limit']")
    assert limit is not None
    middle = (float(circles[0].get("cy", "")) + float(circles[1].get("cy", ""))) / 2
    assert float(limit.get("y1", "")) == pytest.approx(middle, abs=0.2)


def test_numbers_are_short() -> None:
    assert [show_number(value) for value in (0.25, 12, 34000, 2e6)] == ["0.25", "12", "34k", "2M"]
    assert [nice_step(rough) for rough in (0.3, 1, 7, 12)] == [0.5, 1, 10, 20]
