"""`penstock quantize` and `penstock eval perplexity` from the command line, on the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools.bundled_model import corpus

from penstock.assets import BUNDLED_MODEL
from penstock.cli.main import main
from penstock.config.quantization import quantization_of
from penstock.loader import read_model_config


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(conversation.text() for conversation in corpus.held_out(0, 1)), encoding="utf-8")
    return path


def test_calibrated_and_scored(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    options = ["--to", "gptq", "--calibration", str(text), "--calibration-tokens", "1024", "--bits", "8"]
    assert main(["quantize", str(BUNDLED_MODEL), str(output), *options]) == 0
    assert f"penstock serve {output}" in capsys.readouterr().out
    found = read_model_config(output).quantization
    assert found == quantization_of({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 128}})
    scoring = ["--text", str(text), "--max-tokens", "512", "--reference", str(BUNDLED_MODEL)]
    assert main(["eval", "perplexity", str(output), *scoring]) == 0
    divergence = re.search(r"divergence ([\d.]+) nats", capsys.readouterr().out)
    assert divergence is not None
    assert 0 < float(divergence[1]) < 0.01


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--to", "q9"], "q9"),
        (["--to", "awq"], "--calibration FILE"),
        (["--to", "gptq", "--calibration", "/nowhere"], "/nowhere"),
        (["--to", "gptq", "--calibration", "TEXT", "--bits", "5"], "2, 3, 4 or 8"),
        (["--to", "gptq", "--calibration", "TEXT", "--calibration-tokens", "0"], "--calibration-tokens"),
    ],
)
def test_what_cannot_be_done_is_said(
    options: list[str], named: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(text) if option == "TEXT" else option for option in options]
    assert main(["quantize", str(BUNDLED_MODEL), str(tmp_path / "out"), *given]) != 0
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
