"""The commands as users run them, with the bundled model: serve, chat, run, doctor."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import psutil
import pydantic
import pytest

from penstock.assets import BUNDLED_MODEL
from penstock.conversion import convert

SERVE = [
    sys.executable,
    "-m",
    "penstock.cli.main",
    "serve",
    "--port",
    "0",
    "--max-memory",
    "512MiB",
    "--num-threads",
    "1",
]
SMALL = ["--max-memory", "512MiB", "--num-threads", "1"]


def start(*more: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A server and what it printed until it was ready."""
    process = subprocess.Popen([*SERVE, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if "is served at" in line:
            return process, lines
    raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, list[str]]]:
    process, lines = start()
    match = re.search(r"is served at (\S+)", lines[-1])
    assert match is not None
    yield match[1], lines
    process.terminate()
    output, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert output == ""


def test_the_start_is_accounted_for_to_the_last_hundredth(served: tuple[str, list[str]]) -> None:
    _, lines = served
    table = lines[lines.index("start:") + 1 : -1]
    rows = [line.rsplit(None, 2) for line in table]
    seconds = {name.strip(): float(value) for name, value, _ in rows}
    total = seconds.pop("total")
    assert {"start Python", "start engine process", "plan memory", "load weights"} <= set(seconds)
    assert sum(seconds.values()) == pytest.approx(total, abs=0.005 * len(seconds) + 0.01)
    assert "  dtype = bfloat16" in lines
    assert any("KV cache" in line for line in lines)


def test_it_answers_streamed_and_whole_alike(served: tuple[str, list[str]]) -> None:
    client = openai.OpenAI(base_url=served[0], api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    assert model == "penstock-demo"
    arguments = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello!"}],
        "temperature": 0,
        "max_tokens": 30,
    }
    whole = client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**arguments, stream=True)  # type: ignore[call-overload]
    streamed = "".join(event.choices[0].delta.content or "" for event in stream)
    assert whole.choices[0].message.content == streamed
    assert streamed.strip()


def test_logprobs_echo_and_n_through_the_real_text_layer(served: tuple[str, list[str]]) -> None:
    client = openai.OpenAI(base_url=served[0], api_key="none", max_retries=0)
    answer = client.completions.create(
        model="penstock-demo", prompt="Hello there", echo=True, logprobs=2, max_tokens=4, temperature=0, n=2
    )
    for choice in answer.choices:
        assert choice.text.startswith("Hello there")
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.text_offset is not None
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            if offset or choice.text.startswith(token):
                assert choice.text[offset : offset + len(token)] == token
        assert logprobs.token_logprobs is not None
        assert logprobs.token_logprobs[0] is None
        assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    assert answer.choices[0].text == answer.choices[1].text


def test_chat_talks_to_a_server(served: tuple[str, list[str]]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", "chat", "--url", served[0], "--temperature", "0"],
        input="Hello!\n", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "tokens, first after" in done.stderr


def test_run_loads_the_model_itself_and_gives_what_a_server_gives(
    served: tuple[str, list[str]], tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    entries = [{"id": str(i), "prompt": f"Number {i} is", "max_tokens": 5, "temperature": 0} for i in range(20)]
    source.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    texts = []
    for name, more in (("local", SMALL), ("remote", ["--url", served[0]])):
        target = tmp_path / f"{name}.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", "penstock.cli.main", "run", str(source), str(target), *more],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "20/20" in done.stderr
        answers = [json.loads(line) for line in target.read_text().splitlines()]
        texts.append({answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in answers})
    assert len(texts[0]) == 20
    assert texts[0] == texts[1]


def test_a_gguf_of_the_model_is_served_and_answers_alike(served: tuple[str, list[str]], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    convert(BUNDLED_MODEL, file, "bf16", lambda _share: None)
    process, lines = start(str(file))
    match = re.search(r"is served at (\S+)", lines[-1])
    assert match is not None
    answers = []
    for url in (served[0], match[1]):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        done = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "Hello! Who are you?"}],
            temperature=0,
        )
        answers.append((done.choices[0].message.content, done.usage.prompt_tokens, done.choices[0].finish_reason))
    process.terminate()
    process.communicate(timeout=30)
    assert answers[0] == answers[1]


def test_killing_the_server_kills_the_engine() -> None:
    process, _ = start()
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, "the engine is a process of its own"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_killing_the_engine_brings_another() -> None:
    process, lines = start()
    match = re.search(r"is served at (\S+)", lines[-1])
    assert match is not None
    client = openai.OpenAI(base_url=match[1], api_key="none", max_retries=30)
    first = psutil.Process(process.pid).children()[0]
    first.kill()
    psutil.wait_procs([first], timeout=10)
    answer = client.chat.completions.create(
        model="penstock-demo", messages=[{"role": "user", "content": "Hello!"}], max_tokens=3
    )
    assert answer.choices[0].finish_reason in ("length", "stop")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    _, error = process.communicate()
    assert "starting it again" in error
    assert "Traceback" not in error


def test_doctor_finds_a_healthy_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", "doctor"], capture_output=True, text=True, timeout=180, check=False
    )
    assert "native core: chosen: " in done.stdout, done.stdout + done.stderr
    assert "bundled model: answers, twice alike" in done.stdout
    for line in done.stdout.splitlines():
        assert not line.startswith("PROBLEM") or "remedy" in done.stdout


def test_structured_output_and_forced_tools_with_the_official_client(served: tuple[str, list[str]]) -> None:
    client = openai.OpenAI(base_url=served[0], api_key="none", max_retries=0)
    arguments: dict[str, Any] = {
        "model": "penstock-demo", "max_tokens": 90, "temperature": 1.5, "seed": 4,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    }  # fmt: skip

    class Weather(pydantic.BaseModel):
        city: str
        degrees: int
        sky: Literal["clear", "cloudy"]

    parsed = client.chat.completions.parse(**arguments, response_format=Weather).choices[0]
    assert parsed.finish_reason == "stop"
    assert isinstance(parsed.message.parsed, Weather)

    parameters = Weather.model_json_schema()
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("look", "tell")]
    for choice in ("required", {"type": "function", "function": {"name": "tell"}}):
        whole = client.chat.completions.create(**arguments, tools=tools, tool_choice=choice).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.tool_calls
        for call in whole.message.tool_calls:
            assert call.function.name in (("look", "tell") if choice == "required" else ("tell",))
            Weather.model_validate_json(call.function.arguments)
        stream = client.chat.completions.create(**arguments, tools=tools, tool_choice=choice, stream=True)
        deltas = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
        streamed = [""] * len(whole.message.tool_calls)
        for delta in deltas:
            streamed[delta.index] += (delta.function and delta.function.arguments) or ""
        assert streamed == [call.function.arguments for call in whole.message.tool_calls]

    for stream_it in (False, True):
        schema = {"type": "array", "uniqueItems": True}
        with pytest.raises(openai.BadRequestError, match="'uniqueItems' cannot be enforced") as refusal:
            client.chat.completions.create(
                **arguments, stream=stream_it, extra_body={"structured_outputs": {"json": schema}}
            )
        assert refusal.value.param == "structured_outputs.json"
