"""`penstock bench serve` on real sockets. Wall-clock bounds are wide: what is exact is tested on simulated time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.results import read_requests
from penstock.cli.main import main

# With this limit a client that a busy machine delays is still no reason to void a run.
PATIENT = ("--slo", "ttft:p99=60s")
FAKE = Path(__file__).with_name("fake_server.py")


@contextlib.contextmanager
def fake_server(*arguments: str) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, str(FAKE), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().split()[1]}"
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with fake_server() as address:
        yield address


def bench(*arguments: str) -> int:
    return main(["bench", "serve", *arguments, "--quiet"])


def run(url: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    target = tmp_path / "result.json"
    assert bench(url, "--json", str(target), *PATIENT, *arguments) == 0
    return json.loads(target.read_text())  # type: ignore[no-any-return]


def test_an_open_loop(url: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    found = run(url, tmp_path, "--rate", "200", "--requests", "100", "--output-len", "5", "--requests-out", str(rows))
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (100, 0, 500)
    assert found["summary"]["void"] == []
    assert 20 <= found["median_ttft_ms"] < 2000
    assert 20 <= found["summary"]["latency"]["ttft"]["p50"]["ms"] < 2000
    assert found["summary"]["slo"][0]["kept"]
    assert found["definitions"]["ttft"].startswith("per request: intended send")
    assert found["manifest"]["options"]["rate"] == "200"
    again = read_requests(rows)
    assert [len(seen.chunk_s) for seen in again.observations] == [5] * 100


def test_conversations_in_a_closed_loop(url: str, tmp_path: Path) -> None:
    found = run(
        url, tmp_path, "--dataset", "conversations", "--requests", "40", "--turns", "4", "--think", "0.01",
        "--concurrency", "4", "--output-len", "3",
    )  # fmt: skip
    assert found["completed"] == 40


def test_several_servers_in_turns(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "result.json"
    arguments = ("--rounds", "3", "--requests", "20", "--output-len", "3", "--no-stream", "--json", str(target))
    assert bench(url, url, *arguments, *PATIENT) == 0
    runs = json.loads(target.read_text())["runs"]
    assert [found["completed"] for found in runs] == [20] * 6
    assert "3 rounds, interleaved" in capsys.readouterr().out


def test_a_search_starts_near_what_the_server_does(tmp_path: Path) -> None:
    """Two at a time of 0.1 s each, 20 a second; from 1 a second the first trial alone would take half a minute."""
    arguments = ("--search", "--slo", "ttft:p90=1s", "--requests", "30", "--trial-s", "1", "--tolerance", "1")
    with fake_server("--capacity", "2", "--first-s", "0.1") as url:
        bench(url, *arguments, "--output-len", "2", "--json", str(tmp_path / "result.json"))
    trials = json.loads((tmp_path / "result.json").read_text())["searches"][0]["trials"]
    assert 3 < trials[0]["rate"] < 11


def test_a_refusing_server_fails_the_command(url: str) -> None:
    assert bench(url, "--requests", "5", "--timeout", "0.01", "--warmup", "0") == 1


def test_a_refusal_is_told_in_the_servers_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the load, where the warm-up meets it already."""
    with fake_server("--status", "400") as url:
        assert bench(url) == 2
        assert "none of the 2 warm-up requests: status 400: as asked" in capsys.readouterr().err
        assert bench(url, "--requests", "3", "--warmup", "0") == 1
        assert "the first status 400: as asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--rate", "fast"], "no request rate"),
        (["--rate", "5", "--concurrency", "3"], "contradict"),
        (["--search"], "needs an objective"),
        (["--slo", "ttft"], "no service level objective"),
        (["--dataset", "trace"], "needs a file"),
        (["--levels", "12", "--dataset", "prefix-tree"], "no tree"),
        (["--requests", "0"], "out of its bounds"),
    ],
)
def test_wrong_options(url: str, arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(url, *arguments) != 0
    assert what in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("http://127.0.0.1:9") == 2
    assert "did not tell its models" in capsys.readouterr().err
