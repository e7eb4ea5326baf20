"""`penstock chat` against a scripted server: streamed text, history, commands, errors."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.api_client import ApiClient, ApiError
from penstock.cli.chat import Conversation, converse


class ScriptedClient(ApiClient):
    """Streams `pieces`; remembers what was asked."""

    def __init__(self, pieces: list[str], error: str = "") -> None:
        super().__init__("http://127.0.0.1:1")
        self.pieces = pieces
        self.error = error
        self.bodies: list[dict[str, Any]] = []

    def stream(self, path: str, body: bytes) -> Iterator[dict[str, Any]]:
        assert path == "/v1/chat/completions"
        self.bodies.append(json.loads(body))
        if self.error:
            raise ApiError(self.error)
        for piece in self.pieces:
            yield {"choices": [{"delta": {"content": piece}}]}
        yield {"choices": [{"delta": {}}]}
        yield {"choices": [], "usage": {"completion_tokens": 7}}


def talk(client: ScriptedClient, text: str, **options: Any) -> tuple[int, str]:
    output = io.StringIO()
    status = converse(Conversation(client, "m", **options), io.StringIO(text), output)
    return status, output.getvalue()


def test_answers_are_printed_and_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    client = ScriptedClient(["Hel", "lo"])
    status, output = talk(client, "Hi\n\nAgain\n", temperature=0.0, max_tokens=9, system="Be kind.")
    assert (status, output) == (0, "Hello\nHello\n")
    first, second = client.bodies
    system = {"role": "system", "content": "Be kind."}
    assert first["messages"] == [system, {"role": "user", "content": "Hi"}]
    assert second["messages"] == [
        *first["messages"], {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Again"},
    ]  # fmt: skip
    assert (first["model"], first["temperature"], first["max_tokens"], first["stream"]) == ("m", 0.0, 9, True)
    assert capsys.readouterr().err.count("[7 tokens, first after ") == 2


def test_a_terminal_shows_reasoning_apart_from_the_answer() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class ThinkingClient(ScriptedClient):
        def stream(self, path: str, body: bytes) -> Iterator[dict[str, Any]]:
            yield {"choices": [{"delta": {"reasoning_content": "Hm."}}]}
            yield from super().stream(path, body)

    shown = Terminal()
    conversation = Conversation(ThinkingClient(["Hello"]), "m")
    conversation.say("Hi")
    conversation.answer(shown)
    assert shown.getvalue() == "\x1b[2mHm.\x1b[0m\n\nHello\n"
    assert conversation.turns[-1]["content"] == "Hello"
    piped = io.StringIO()
    again = Conversation(ThinkingClient(["Hello"]), "m")
    again.say("Hi")
    again.answer(piped)
    assert piped.getvalue() == "Hello\n"


def test_commands() -> None:
    client = ScriptedClient(["ok"])
    status, output = talk(client, "one\n/reset\ntwo\n/system New.\nthree\n/what\n/exit\nfour\n")
    assert status == 0
    assert "/reset begins anew" in output
    assert [body["messages"] for body in client.bodies] == [
        [{"role": "user", "content": "one"}],
        [{"role": "user", "content": "two"}],
        [{"role": "system", "content": "New."}, {"role": "user", "content": "three"}],
    ]


def test_calls_are_shown_and_their_results_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class CallingClient(ScriptedClient):
        def stream(self, path: str, body: bytes) -> Iterator[dict[str, Any]]:
            if json.loads(body)["messages"][-1]["role"] == "user":
                self.bodies.append(json.loads(body))
                for index, name in enumerate(("f", "g")):
                    start = {"index": index, "id": f"c{index}", "function": {"name": name, "arguments": ""}}
                    yield {"choices": [{"delta": {"tool_calls": [start]}}]}
                    for piece in ('{"x"', ": 1}"):
                        delta = {"index": index, "function": {"arguments": piece}}
                        yield {"choices": [{"delta": {"tool_calls": [delta]}}]}
            else:
                yield from super().stream(path, body)

    path = tmp_path / "tools.json"
    path.write_text('[{"type": "function", "function": {"name": "f"}}]')
    client = CallingClient(["Done."])
    status, output = talk(client, f"/tools {path}\nGo\nfirst\nsecond\n")
    assert (status, output) == (0, '-> f({"x": 1})\n-> g({"x": 1})\nDone.\n')
    first, second = client.bodies
    assert first["tools"][0]["function"] == {"name": "f"}
    _, called, *results = second["messages"]
    assert [call["function"]["arguments"] for call in called["tool_calls"]] == ['{"x": 1}', '{"x": 1}']
    assert results == [
        {"role": "tool", "tool_call_id": "c0", "content": "first"},
        {"role": "tool", "tool_call_id": "c1", "content": "second"},
    ]
    assert talk(client, "/tools /nowhere\n")[0] == 1
    assert talk(client, "/image x.png\n")[0] == 1
    assert "text only" in capsys.readouterr().err


def test_in_a_terminal() -> None:
    """What a person sees: a prompt with line editing, the answer as it comes, its speed, history over turns."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "penstock.cli.main", "chat", "--temperature", "0", "--max-memory", "512MiB"]
    process = subprocess.Popen([*command, "--num-threads", "1"], stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)

    def read_until(text: str) -> str:
        seen = ""
        while text not in seen:
            assert select.select([leader], [], [], 60)[0], seen
            seen += os.read(leader, 4096).decode()
        return seen

    read_until("> ")
    os.write(leader, b"/system The wifi password is brolk42.\n")
    read_until("> ")
    os.write(leader, b"What is the wifi password?\n")
    answered = read_until("tokens/s]")
    assert "The wifi password is brolk42." in answered
    os.write(leader, b"/exit\n")
    assert process.wait(30) == 0
    os.close(leader)


def test_an_error_leaves_the_conversation_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    client = ScriptedClient([], error="The prompt is too long.")
    conversation = Conversation(client, "m")
    assert converse(conversation, io.StringIO("long\n"), io.StringIO()) == 1
    assert conversation.turns == []
    assert "The prompt is too long." in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://x:1", "http://x:1/", "http://x:1/v1", "http://x:1/v1/", "x:1"])
def test_addresses_with_and_without_v1_are_the_same(url: str) -> None:
    client = ApiClient(url)
    assert (client._host, client._port, client._prefix) == ("x", 1, "")
