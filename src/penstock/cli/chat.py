"""`penstock chat`: a conversation in the terminal, streamed, with its speed after each answer."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import msgspec

from penstock.cli.api_client import ApiClient, ApiError
from penstock.cli.private_server import private_server
from penstock.config.settings import ResolvedSettings

HELP = (
    "/reset begins anew, /system TEXT sets a system prompt, /tools FILE lets the model call the tools of a JSON list "
    "(you say what they give), /exit (or Ctrl-D) ends; Ctrl-C stops an answer."
)
NO_IMAGES = "The models that are served here read text only: an image cannot be shown to them."


def chat(resolved: ResolvedSettings, options: argparse.Namespace) -> int:
    with open_server(resolved, options.url) as (client, model):
        conversation = Conversation(
            client, model, system=options.system or "", temperature=options.temperature, max_tokens=options.max_tokens
        )
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() line editing and history
            print(f"{model}. {HELP}")
        return converse(conversation, sys.stdin, sys.stdout)


@contextlib.contextmanager
def open_server(resolved: ResolvedSettings, url: str | None) -> Iterator[tuple[ApiClient, str]]:
    """A client and a model name: of the server at `url`, or of one that is started for this process."""
    if url is None:
        with private_server(resolved) as opened:
            yield opened
        return
    client = ApiClient(url, resolved.values.api_key[0] if resolved.values.api_key else "")
    names = resolved.values.served_model_name or ((resolved.values.model,) if resolved.values.model else ())
    yield client, names[0] if names else client.first_model()


@dataclass
class Conversation:
    """The messages so far, and how to ask for the next."""

    client: ApiClient
    model: str
    system: str = ""
    temperature: float = 0.7
    max_tokens: int | None = None
    tools: list[Any] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)  # of the last answer, whose results are still to come

    def say(self, text: str) -> None:
        """What the user says next: the result of a call, where one waits for it."""
        if self.calls:
            self.turns.append({"role": "tool", "tool_call_id": self.calls.pop(0)["id"], "content": text})
        else:
            self.turns.append({"role": "user", "content": text})

    def answer(self, output: TextIO) -> str:
        """Prints the answer as it comes, and returns a line on its speed. Raises ApiError."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": system + self.turns,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.tools:
            body["tools"] = self.tools
        pieces: list[str] = []
        calls: list[dict[str, Any]] = []
        is_thinking = False
        usage: dict[str, Any] = {}
        start_s = first_s = time.perf_counter()
        events = self.client.stream("/v1/chat/completions", msgspec.json.encode(body))
        try:
            with contextlib.closing(events):  # type: ignore[type-var]
                for event in events:
                    usage = event.get("usage") or usage
                    thought, piece = _delta(event)
                    if (thought or piece) and first_s == start_s:
                        first_s = time.perf_counter()
                    if thought and output.isatty():
                        is_thinking = True
                        output.write(f"\x1b[2m{thought}\x1b[0m")
                    if piece:
                        output.write(f"\n\n{piece}" if is_thinking else piece)
                        is_thinking = False
                        pieces.append(piece)
                    output.writelines(_shown(call, calls) for call in _calls(event))
                    output.flush()
        except KeyboardInterrupt:
            output.write(" [stopped]")
        except ApiError:
            self.turns.pop()
            raise
        output.write(")\n" if calls else "\n")
        turn: dict[str, Any] = {"role": "assistant", "content": "".join(pieces)}
        self.turns.append({**turn, "tool_calls": calls} if calls else turn)
        self.calls = list(calls)
        return _speed(usage.get("completion_tokens", len(pieces)), first_s - start_s, time.perf_counter() - first_s)


def _delta(event: dict[str, Any]) -> tuple[str, str]:
    """(reasoning, content)."""
    choices = event.get("choices") or []
    delta = choices[0]["delta"] if choices else {}
    return delta.get("reasoning_content") or "", delta.get("content") or ""


def _calls(event: dict[str, Any]) -> list[dict[str, Any]]:
    choices = event.get("choices") or []
    return (choices[0]["delta"].get("tool_calls") or []) if choices else []


def _shown(delta: dict[str, Any], calls: list[dict[str, Any]]) -> str:
    """What to print for a piece of a call, which is added to `calls`."""
    written: str = delta["function"].get("arguments", "")
    if delta["index"] == len(calls):
        name = delta["function"]["name"]
        before = ")\n" if calls else ""
        calls.append({"id": delta["id"], "type": "function", "function": {"name": name, "arguments": written}})
        return f"{before}-> {name}({written}"
    calls[-1]["function"]["arguments"] += written
    return written


def _speed(num_tokens: int, first_s: float, rest_s: float) -> str:
    rate = f", {(num_tokens - 1) / rest_s:.1f} tokens/s" if num_tokens > 1 and rest_s > 0 else ""
    return f"[{num_tokens} tokens, first after {first_s:.2f} s{rate}]"


def converse(conversation: Conversation, source: TextIO, output: TextIO) -> int:
    """Reads turns until the input ends; the exit status."""
    status = 0
    while (line := _read_line(source, output, _prompt(conversation))) is not None:
        text = line.strip()
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            _begin_anew(conversation)
        elif text.startswith("/system"):
            conversation.system = text.removeprefix("/system").strip()
            _begin_anew(conversation)
        elif text.startswith("/tools"):
            status = _take_tools(conversation, text.removeprefix("/tools").strip())
        elif text.startswith("/image"):
            print(f"penstock: error: {NO_IMAGES}", file=sys.stderr)
            status = 1
        elif text.startswith("/"):
            output.write(HELP + "\n")
        elif text:
            status = _say(conversation, text, output)
    return status


def _prompt(conversation: Conversation) -> str:
    return f"{conversation.calls[0]['function']['name']} gives> " if conversation.calls else "> "


def _begin_anew(conversation: Conversation) -> None:
    conversation.turns.clear()
    conversation.calls.clear()


def _take_tools(conversation: Conversation, path: str) -> int:
    """The tools of a JSON file, in OpenAI's form; none without a path."""
    try:
        tools = msgspec.json.decode(Path(path).read_bytes()) if path else []
    except (OSError, msgspec.DecodeError) as error:
        print(f"penstock: error: The tools of {path!r} cannot be read: {error}", file=sys.stderr)
        return 1
    conversation.tools = tools if isinstance(tools, list) else [tools]
    return 0


def _say(conversation: Conversation, text: str, output: TextIO) -> int:
    conversation.say(text)
    if conversation.calls:
        return 0  # the results of the other calls come first
    try:
        speed = conversation.answer(output)
    except ApiError as error:
        print(f"penstock: error: {error}", file=sys.stderr)
        return 1
    print(speed, file=sys.stderr if not output.isatty() else output)
    return 0


def _read_line(source: TextIO, output: TextIO, prompt: str) -> str | None:
    if source.isatty():
        try:
            return input(prompt)
        except EOFError:
            output.write("\n")
            return None
        except KeyboardInterrupt:
            output.write("\n")
            return ""
    return source.readline() or None
