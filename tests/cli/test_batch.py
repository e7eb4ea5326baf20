"""`penstock run`: each result exactly once, whatever interrupts it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from penstock.base.errors import ConfigError
from penstock.cli import batch
from penstock.cli.main import main


class FakeApi(ThreadingHTTPServer):
    """Answers a completion with its prompt; `failures` are statuses given first, by prompt."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failures: dict[str, list[int]] = {}
        self.asked: list[str] = []
        self.models: list[str] = []
        self.headers_seen: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": [{"id": "served"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body.get("prompt") or body["messages"][0]["content"]
        self.server.asked.append(prompt)
        self.server.models.append(body["model"])
        self.server.headers_seen.append(self.headers.get("authorization"))
        failures = self.server.failures.get(prompt, [])
        if failures:
            status = failures.pop(0)
            self._answer(status, {"error": {"message": "not now", "code": "x", "type": "x", "param": None}})
        else:
            self._answer(200, {"path": self.path, "choices": [{"text": prompt}]})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.send_header("x-request-id", "r1")
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    monkeypatch.setattr(batch, "FIRST_PAUSE_S", 0.001)
    server = FakeApi()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def results(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines), "each result once"
    return {line["custom_id"]: line for line in lines}


def run(api: FakeApi, source: Path, target: Path, *more: str) -> int:
    return main(["run", str(source), str(target), "--url", api.url, *more])


def test_every_kind_of_line(api: FakeApi, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        [
            {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "one"}},
            {"custom_id": "b", "body": {"messages": [{"role": "user", "content": "two"}]}},
            {"id": "c", "prompt": "three"},
            {"prompt": "four"},
            {"id": 7, "prompt": "five"},
        ],
    )
    target = tmp_path / "deep" / "out.jsonl"
    assert run(api, source, target, "--api-key", "k") == 0
    found = results(target)
    assert set(found) == {"a", "b", "c", "line-4", "7"}
    assert found["a"]["response"]["body"]["choices"][0]["text"] == "one"
    assert found["b"]["response"]["body"]["path"] == "/v1/chat/completions"
    assert found["c"]["response"] == {
        "status_code": 200, "request_id": "r1", "body": {"path": "/v1/completions", "choices": [{"text": "three"}]},
    }  # fmt: skip
    assert sorted(set(api.models)) == ["m", "served"]
    assert set(api.headers_seen) == {"Bearer k"}


def test_what_is_answered_is_not_asked_again(api: FakeApi, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"id": str(i), "prompt": f"p{i}"} for i in range(50)])
    target = tmp_path / "out.jsonl"
    assert run(api, source, target, "--concurrency", "4") == 0
    assert sorted(api.asked) == sorted(f"p{i}" for i in range(50))
    api.asked.clear()
    assert run(api, source, target) == 0
    assert api.asked == []
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:20]) + lines[20][:30])  # as a crash would leave it
    assert run(api, source, target) == 0
    assert len(api.asked) == 30
    assert set(results(target)) == {str(i) for i in range(50)}


def test_refusals_are_results(api: FakeApi, tmp_path: Path) -> None:
    api.failures["bad"] = [400]
    source = write(tmp_path / "in.jsonl", [{"id": "x", "prompt": "bad"}])
    assert run(api, source, tmp_path / "out.jsonl") == 0
    response = results(tmp_path / "out.jsonl")["x"]["response"]
    assert (response["status_code"], response["body"]["error"]["message"]) == (400, "not now")
    assert api.asked == ["bad"]


def test_a_full_queue_is_asked_again(api: FakeApi, tmp_path: Path) -> None:
    api.failures["p"] = [429, 503, 429]
    source = write(tmp_path / "in.jsonl", [{"id": "x", "prompt": "p"}])
    assert run(api, source, tmp_path / "out.jsonl") == 0
    assert len(api.asked) == 4
    assert results(tmp_path / "out.jsonl")["x"]["response"]["status_code"] == 200


def test_what_stays_unanswered_is_missing_and_said(
    api: FakeApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.failures["p"] = [503] * batch.MAX_ATTEMPTS
    source = write(tmp_path / "in.jsonl", [{"id": "x", "prompt": "p"}, {"id": "y", "prompt": "q"}])
    target = tmp_path / "out.jsonl"
    assert run(api, source, target) == 1
    assert set(results(target)) == {"y"}
    error = capsys.readouterr().err
    assert "1 of 2 requests stayed unanswered; the last: x: status 503" in error
    assert run(api, source, target) == 0
    assert set(results(target)) == {"x", "y"}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ('{"prompt": "a"}\nnonsense\n', "line 2, is not JSON"),
        ("[1]\n", "line 1, is not an object"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', "the id 'a' twice"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}\n', "/v1/embeddings"),
        ('{"prompt": "x", "stream": true}\n', "cannot stream"),
        ('{"id": [1], "prompt": "x"}\n', "neither text nor a number"),
    ],
)
def test_malformed_input_is_refused_before_anything_is_asked(
    api: FakeApi, tmp_path: Path, content: str, cause: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    with pytest.raises(ConfigError, match=cause):
        batch.check_input(source)
    assert run(api, source, tmp_path / "out.jsonl") == 2
    assert api.asked == []
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_of_something_else_is_not_overwritten(api: FakeApi, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    target = tmp_path / "out.jsonl"
    target.write_text('{"precious": true}\n')
    assert run(api, source, target) == 2
    assert target.read_text() == '{"precious": true}\n'


def test_an_unreachable_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FIRST_PAUSE_S", 0.001)
    source = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    arguments = ["run", str(source), str(tmp_path / "out.jsonl"), "--url", "http://127.0.0.1:1", "--model", "m"]
    assert main(arguments) == 1
