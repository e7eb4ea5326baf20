"""The advisor picks what a simulation shows to be enough, and says why."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from checkpoints import write_checkpoint
from penstock.advisor.advice import Candidate, Platform, advise, cost_lines, predict
from penstock.advisor.elsewhere import Measurement, WorkloadShape, other_systems, recorded
from penstock.advisor.quality import LOSSES
from penstock.bench import calibration
from penstock.bench.arrivals import arrival_times, dated, parse_rate, unit_gaps
from penstock.bench.datasets import Shape, prefix_tree, random_prompts
from penstock.bench.measure import Workload
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.slo import parse_slo
from penstock.bench.step_time import FittedStepTime, Profile, ScaledStepTime
from penstock.cli.main import main

MAKER = PromptMaker(as_chat=False)
# 10 ms a step, 0.1 ms for each token beyond the first: about 10,000 prompt tokens a second at best.
STEPS = FittedStepTime(
    coefficients=[0.01, *[1e-4] * 6, 0, 0, 0, 0, 0], error=0.1, num_steps=99
)  # fmt: skip
PLATFORM = Platform("here", STEPS, 8192, 16, 8192, price_per_hour=2.0)


def workload(rate: float, input_len: int = 256, levels: tuple[tuple[int, int], ...] = ()) -> Workload:
    shape = Shape(input_len, 16, levels=levels)
    dataset = prefix_tree if levels else random_prompts

    def plan(seed: int):  # type: ignore[no-untyped-def]
        times = arrival_times(parse_rate(f"{rate}"), unit_gaps("poisson", 1.0, seed))
        return dated(dataset(shape, MAKER, 80, seed), times)

    return Workload(plan)


def test_an_easy_load_needs_one() -> None:
    found = advise([PLATFORM], workload(2.0), parse_slo(["ttft:p90=500ms"]), 1, 8)
    assert found.best is not None
    assert found.best.candidate.num_replicas == 1
    line, hosted = cost_lines(found.best)
    rate = found.best.summary.output_token_rate
    assert line.startswith(f"${2.0 / (rate * 3600) * 1e6:.3f} per million")
    assert "A hosted API of the same model is cheaper below that price" in hosted
    value, low, high = found.best.interval_ms("TTFT", 0.5)
    assert low < value < high


def test_a_heavy_load_needs_several() -> None:
    """256 prompt and 16 output tokens are 26 ms of tokens and some share of steps: one replica has no 60 a second."""
    slo = parse_slo(["ttft:p90=300ms"])
    found = advise([PLATFORM], workload(80.0), slo, 1, 8)
    assert found.best is not None
    assert found.best.candidate.num_replicas >= 2
    assert any("replicas the worst limit is missed" in reason for reason in found.reasons), found.reasons
    assert not predict(Candidate(PLATFORM, 1, 64, 512), workload(80.0), slo, 1).keeps_slo


def test_the_cache_is_a_reason() -> None:
    found = advise([PLATFORM], workload(5.0, 32, ((512, 2),)), parse_slo(["ttft:p90=500ms"]), 1, 2)
    assert any("prefix cache holds 9" in reason for reason in found.reasons)


def test_what_nothing_keeps() -> None:
    found = advise([PLATFORM], workload(5.0), parse_slo(["ttft:p90=1ms"]), 1, 2)
    assert found.best is None
    assert "Nothing that was tried keeps the SLO" in found.reasons[0]


def test_formats_are_compared() -> None:
    """Half the time a step at int8: where both need one replica the better answers win, else the fewer replicas."""
    half = ScaledStepTime(STEPS, 0.5)
    rounded = Platform("rounded", half, 8192, 16, 8192, price_per_hour=2.0, quantization="int8")
    slo = parse_slo(["ttft:p90=300ms"])
    easy = advise([PLATFORM, rounded], workload(2.0), slo, 1, 4)
    assert easy.best is not None
    assert easy.best.candidate.platform is PLATFORM
    assert any("rounded needs 1 replicas" in reason and "0.03% of perplexity" in reason for reason in easy.reasons)
    heavy = advise([PLATFORM, rounded], workload(45.0), slo, 1, 4)
    assert heavy.best is not None
    assert heavy.best.candidate.platform is rounded
    assert any(reason.startswith("int8 weights cost") for reason in heavy.reasons)


def test_the_number_of_replicas_has_an_interval() -> None:
    """Steps of half or of one and a half times the time: about half, or half more, of the replicas."""
    unsure = replace(PLATFORM, step_time=msgspec.structs.replace(STEPS, error=0.5))
    found = advise([unsure], workload(80.0), parse_slo(["ttft:p90=300ms"]), 1, 8)
    assert found.best is not None
    low, high = found.replicas
    assert high is not None
    assert low <= found.best.candidate.num_replicas <= high
    assert low < high


def test_how_fast_a_machine_would_have_to_be() -> None:
    """A prompt of 256 tokens takes 36 ms here."""
    found = advise([PLATFORM], workload(1.0), parse_slo(["ttft:p50=20ms"]), 1, 2)
    assert found.best is None
    assert any("2 times as fast would keep it" in reason for reason in found.reasons)


def test_the_tables_of_formats_agree_with_the_documentation() -> None:
    known = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for name in LOSSES:
        assert not name or f"--quantization {name} |" in known


def record(system: str, theirs: float, **more: object) -> Measurement:
    fields = {"format": "bf16", "case": "batch", "batch": 8, "unit": "output tokens/s", "machine": "a machine",
              "date": "2026-01-01", "source": "a file"} | more  # fmt: skip
    return msgspec.convert({"system": system, "ours": 100.0, "theirs": theirs, **fields}, Measurement)


def test_other_systems_by_what_was_measured() -> None:
    records = [
        record("Slower", 60.0), record("Faster", 130.0), record("Faster", 90.0, batch=64),
        record("Equal", 102.0), record("Faster", 50.0, case="prefill"), record("Rounded", 300.0, format="int8"),
    ]  # fmt: skip
    text = "\n".join(other_systems(WorkloadShape(6.0, 1.0, 0.0), "", records))
    assert "Faster would serve it better: 1.30 times Penstock's" in text
    assert "a machine, 2026-01-01, a file" in text
    assert "Slower would serve it worse: 0.60" in text
    assert "Equal serves it as well" in text
    assert "prompts alone" not in text
    assert "Rounded" not in text
    assert "Not measured beside Penstock, so not judged: SGLang, TensorRT-LLM" in text
    long_prompts = "\n".join(other_systems(WorkloadShape(100.0, 20.0, 0.0), "", records))
    assert "0.50 times Penstock's output tokens/s with prompts alone" in long_prompts
    assert "0.90 times" in long_prompts
    assert "Rounded would" in "\n".join(other_systems(WorkloadShape(6.0, 1.0, 0.0), "int8", records))


def test_the_shape_of_a_workload() -> None:
    """10 requests a second that stay for about 0.2 s are about two at once (Little)."""
    found = predict(Candidate(PLATFORM, 1, 64, 512), workload(10.0), (), 1)
    shape = WorkloadShape.of(found.summary, 1)
    mean_s = found.summary.latency["e2e"].mean
    assert mean_s is not None
    assert shape.running == pytest.approx(found.summary.request_rate * mean_s)
    assert shape.prompts == pytest.approx(16.0, rel=0.01)
    assert shape.shared == pytest.approx(0.0, abs=0.01)


def test_several_draws_are_one_long_run() -> None:
    one, four = (predict(Candidate(PLATFORM, 2, 64, 512), workload(20.0), (), 1, draws).summary for draws in (1, 4))
    assert four.num_succeeded == 4 * one.num_succeeded
    assert four.duration_s == pytest.approx(4 * one.duration_s, rel=0.3)
    assert four.request_rate == pytest.approx(one.request_rate, rel=0.3)
    assert four.offered_rate == pytest.approx(20, rel=0.3)


def test_an_interval_holds_every_draw() -> None:
    """One run of few requests may show what any draw shows: the interval of a prediction is no narrower."""
    found = predict(Candidate(PLATFORM, 1, 64, 512), workload(20.0), (), 1, 6)
    value, low, high = found.interval_ms("TTFT", 0.99)
    shown = [draw.latency["ttft"].at(0.99).value * 1e3 for draw in found.draws]
    assert len(shown) == 6
    assert low <= min(shown) < value <= max(shown) <= high


def test_what_is_shipped_has_sources() -> None:
    assert recorded()
    for one in recorded():
        assert one.source
        assert one.date
        assert one.ours > 0
        text = (Path(__file__).parents[2] / one.source).read_text()
        if one.source.endswith(".md"):  # a table; logs have each round, and these are medians
            assert f" {one.ours:.1f} " in text, one
            assert f" {one.theirs:.1f} " in text, one


def test_all_replicas_together_serve_everything() -> None:
    for count in (1, 3):
        found = predict(Candidate(PLATFORM, count, 64, 512), workload(20.0), (), 1)
        assert found.summary.num_succeeded == 80


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "here.json"
    path.write_bytes(msgspec.json.encode(Profile(step_time=STEPS, num_blocks=999, block_size=16, max_model_len=4096)))
    return path


def test_the_commands(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--profile", str(profile), "--rate", "3", "--requests", "60", "--input-len", "100", "--output-len", "8")
    assert main(["advise", *load, "--slo", "ttft:p50=1s", "--price", "1"]) == 0
    out = capsys.readouterr().out
    assert "Use 1 x here: --max-num-seqs" in out
    assert "Expect TTFT: p50" in out
    assert "per million output tokens" in out
    html, result = tmp_path / "sim.html", tmp_path / "sim.json"
    assert main(["bench", "sim", *load, "--html", str(html), "--json", str(result)]) == 0
    assert "times faster than real time" in " ".join(capsys.readouterr().out.split())
    assert msgspec.json.decode(result.read_bytes())["completed"] == 60
    assert html.read_text().startswith("<!doctype html>")


def test_a_trace_on_this_machine_and_on_a_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How measuring itself works: tests/bench/test_local.py."""
    asked: list[tuple[object, ...]] = []

    def measured(model: str, options: Sequence[str], seconds: float, _: object) -> Profile:
        asked.append((model, *options, seconds))
        quantization = options[1].replace("none", "")
        return Profile(step_time=STEPS, num_blocks=999, block_size=16, max_model_len=4096, quantization=quantization)

    monkeypatch.setattr(calibration, "measure_profile", measured)
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"timestamp": 500 * index, "input_length": 40, "output_length": 8,
                                         "hash_ids": [index]}) + "\n" for index in range(40)))  # fmt: skip
    question = ["advise", "--trace", str(trace), "--slo", "ttft:p50=1s"]
    both = ["--quantization", "none", "--quantization", "int8", "--seconds", "3"]
    assert main([*question, "--cpu", "--model", "org/m", *both]) == 0
    assert asked == [("org/m", "--quantization", "none", 3.0), ("org/m", "--quantization", "int8", 3.0)]
    found = capsys.readouterr()
    assert "Use 1 x m here: --max-num-seqs" in found.out
    assert "m here, int8" in " ".join(found.out.split())
    assert "Measuring --quantization int8 for about 3 s" in " ".join(found.err.split())
    model = tmp_path / "model"
    write_checkpoint(model)
    card = ["--gpu", "h200", "--num-blocks", "1000"]  # all that its memory has room for take a second to set up
    assert main([*question, "--model", str(model), *card]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Use 1 x model at 16 bits on h200: --max-num-seqs 64 --max-num-batched-tokens 512" in out
    assert "Nothing was measured on such a machine" in out
    assert "times Penstock's" not in out
    assert main([*question, "--model", str(model), "--host-kv-gb", "1"]) != 0
    assert "Give --gpu" in capsys.readouterr().err
    assert main([*question, "--model", str(model), *card, "--host-kv-gb", "0.001"]) == 0


def test_a_host_tier_keeps_what_the_device_gives_up() -> None:
    """Eight prefixes in turn, of which the device keeps three: the second round finds them in the host's memory."""
    maker = PromptMaker(as_chat=False)
    prefixes = [maker.tokens(random.Random(index), 480) for index in range(8)]
    plan = [
        PlannedRequest([*prefixes[index % 8], 100_000 + index], 481, 4, index, at_s=float(2 * index))
        for index in range(16)
    ]
    small = replace(PLATFORM, num_blocks=100)
    tiered = replace(small, num_host_blocks=400, block_copy_s=1e-4)
    without, found = (
        predict(Candidate(platform, 1, 64, 512), Workload(lambda _: plan), (), 1) for platform in (small, tiered)
    )
    assert (without.summary.cached_tokens, found.summary.cached_tokens) == (0, 8 * 480)
    assert found.summary.latency["ttft"].mean < 0.8 * without.summary.latency["ttft"].mean


def test_wrong_questions(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, what in (
        (["advise", "--rate", "3"], "needs an objective"),
        (["advise", "--rate", "3", "--slo", "ttft=1s"], "how long a step takes"),
        (["advise", "--profile", str(profile), "--slo", "ttft=1s"], "needs arrivals"),
        (["advise", "--trace", "nowhere", "--profile", str(profile), "--slo", "ttft=1s"], "nowhere"),
        (["advise", "--cpu", "--gpu", "h200", "--rate", "3", "--slo", "ttft=1s"], "other platforms"),
        (["advise", "--cpu", "--quantization", "q9", "--rate", "3", "--slo", "ttft=1s"], "q9"),
        (["advise", "--quantization", "int8", "--rate", "3", "--slo", "ttft=1s"], "Give --cpu"),
        (["advise", "--cpu", "--seconds", "nan", "--rate", "3", "--slo", "ttft=1s"], "out of its bounds"),
        (["bench", "sim", "--measure", "nowhere"], "Give --profile"),
    ):
        assert main(arguments) != 0
        assert what in capsys.readouterr().err
