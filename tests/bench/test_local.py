"""What is measured without a server: steps for the simulator, the offline class, ops; on a tiny model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from checkpoints import write_checkpoint
from penstock.bench import op_cases, roofline, startup
from penstock.bench.step_time import load_profile
from penstock.cli.main import main
from penstock.engine.step_log import LoggedStep, StepLogHeader, StepWork


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, vocab_size=320, tokenizer=True, max_position_embeddings=512)
    return path


def test_steps_are_measured_and_simulated(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.json"
    assert main(["bench", "sim", "--measure", str(model), "--profile", str(profile), "--seconds", "8"]) == 0
    found = load_profile(profile)
    assert found.step_time.num_steps > 30
    assert found.max_model_len == 512
    assert min(found.step_time.coefficients) >= 0
    load = ("--requests", "50", "--rate", "5", "--input-len", "64", "--output-len", "8")
    assert main(["bench", "sim", "--profile", str(profile), *load]) == 0
    assert "50 of 50 requests succeeded" in capsys.readouterr().out


def test_a_profile_of_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 5 ms and 1 ms a token, as an engine logs them; the last line was cut."""
    header = StepLogHeader(model="m", num_blocks=99, block_size=16, max_model_len=2048)
    steps = [
        LoggedStep(index * 0.02, 0.005 + 0.001 * (index % 7), StepWork(1 + index % 7, 1, 0, 0)) for index in range(90)
    ]
    lines = [msgspec.json.encode(line) for line in (header, *steps)]
    (tmp_path / "steps-1.jsonl").write_bytes(b"\n".join(lines) + b"\n[1.0,")
    profile = tmp_path / "profile.json"
    assert main(["bench", "sim", "--measure", str(tmp_path), "--profile", str(profile)]) == 0
    found = load_profile(profile)
    assert (found.num_blocks, found.max_model_len, found.step_time.num_steps) == (99, 2048, 90)
    assert found.step_time.seconds(StepWork(4, 1, 0, 0)) == pytest.approx(0.008, rel=0.01)
    (tmp_path / "steps-1.jsonl").write_text('{"format": "another"}')
    assert main(["bench", "sim", "--measure", str(tmp_path), "--profile", str(profile)]) == 2
    assert "no log of steps" in capsys.readouterr().err


def test_offline(model: Path, tmp_path: Path) -> None:
    result = tmp_path / "offline.json"
    arguments = ("--requests", "4", "--input-len", "8", "--output-len", "4", "--rounds", "2", "--json", str(result))
    assert main(["bench", "offline", str(model), *arguments]) == 0
    found = msgspec.json.decode(result.read_bytes())
    assert found["rates"]["output tokens/s"] == [16 / seconds for seconds in found["seconds"]]
    assert len(found["seconds"]) == 2


def test_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case: the real ones fill gigabytes with weights."""
    monkeypatch.setattr(roofline, "MEMORY_BYTES", 1 << 24)
    monkeypatch.setattr(
        roofline, "all_cases", lambda native, _: op_cases.linear_cases(native, "tiny", 64, 64, (1, 3), op_cases.BF16)
    )
    html = tmp_path / "ops.html"
    only = ("--only", "linear tiny 1 x", "--seconds", "0.01", "--threads", "1", "--html", str(html))
    assert main(["bench", "ops", *only]) == 0
    assert "| linear | tiny 1 x" in capsys.readouterr().out
    assert html.read_text().count("<circle") == 1


def test_reading_and_forgetting_weights(model: Path) -> None:
    assert startup.weight_files(model)
    assert startup.read_seconds(model) > 0
    startup.drop_from_page_cache(model)
    assert startup.read_seconds(model) > 0
