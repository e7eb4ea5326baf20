"""Recorded traffic: what is kept, what is not, and that a replay brings the same load."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.base.errors import ConfigError
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.recording_proxy import RecordingProxy, prompt_tokens, tokens_of_bytes
from penstock.bench.target import Target
from penstock.bench.traces import MAX_OUT_OF_ORDER, read_own, read_trace, recorded_hit_share
from penstock.observability.traffic import BlockHasher, TraceHeader, TraceRecord, TrafficRecorder, redacted

from .fake_server import Behaviour, FakeServer


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def shared(left: list[int], right: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


token_lists = st.lists(st.integers(0, 3), max_size=200)


@given(token_lists, token_lists, st.integers(0, 12))
def test_hashes_share_what_blocks_share(left: list[int], right: list[int], num_common: int) -> None:
    common = list(range(num_common * 7))
    left, right = common + left, common + right
    hasher = BlockHasher(b"salt")
    a, b = hasher.hash_blocks(left), hasher.hash_blocks(right)
    assert (len(a), len(b)) == (len(left) // 16, len(right) // 16)
    assert shared(a, b) == shared(left, right) // 16
    assert hasher.hash_blocks(left + right, a) == hasher.hash_blocks(left + right)[len(a) :]


def test_another_salt_gives_other_hashes() -> None:
    """Or whoever guesses a prompt could find it in the trace."""
    tokens = list(range(64))
    assert not set(BlockHasher(b"a").hash_blocks(tokens)) & set(BlockHasher(b"b").hash_blocks(tokens))
    assert BlockHasher(b"a").name("key") != BlockHasher(b"b").name("key") != ""
    assert max(BlockHasher(b"a").hash_blocks(tokens)) < 2**53


def test_contents_are_redacted() -> None:
    text = "mail a.b@example.com, call +49 170 1234567, card 4111 1111 1111 1111, sk-abcdefghijklmnop1234; 12 apples"
    [found] = redacted({"messages": [text]})["messages"]
    assert found == "mail [redacted], call [redacted], card [redacted], [redacted]; 12 apples"


def conversation(path: Path) -> Path:
    """Two conversations with one system prompt, recorded on a clock of our own."""
    clock = Clock()
    recorder = TrafficRecorder(path, TraceHeader(model="m"), clock)
    system, first, second = list(range(100, 148)), list(range(20)), list(range(50, 70))
    answer = list(range(200, 240))
    turns = [
        ("a", 0.0, system + first, answer),
        ("b", 1.0, system + second, answer[:3]),
        ("c", 9.0, system + first + answer + [7, 8, 9], answer[:5]),
    ]
    for name, at_s, prompt, output in turns:
        record = TraceRecord(
            timestamp=recorder.milliseconds(100.0 + at_s), input_length=len(prompt), output_length=len(output), id=name,
            cached_tokens=48 if at_s else 0, finish_reason="length",
        )  # fmt: skip
        recorder.record(record, prompt, output, 100.0 + at_s + 2.0)
    recorder.close()
    return recorder.path


def test_a_recording_knows_its_conversations(tmp_path: Path) -> None:
    header, records = read_own(conversation(tmp_path / "deep" / "dir"))
    a, b, c = records
    assert (header.model, header.block_size, header.has_contents) == ("m", 16, False)
    assert (a.parent_id, b.parent_id, c.parent_id) == ("", "", "a")
    assert (c.session_id, c.think_ms) == ("a", 7000.0)
    assert shared(a.hash_ids, b.hash_ids) == 3
    assert shared(a.hash_ids + a.answer_hash_ids, c.hash_ids) == 6


def test_a_replay_rebuilds_the_prefix_tree(tmp_path: Path) -> None:
    path = conversation(tmp_path)
    a, b, c = read_trace("auto", path, PromptMaker(as_chat=False, seed=1))
    assert isinstance(a.prompt, list)
    assert isinstance(c.prompt, list)
    assert [request.at_s for request in (a, b, c)] == [0.0, 1.0, 9.0]
    assert [request.prompt_tokens for request in (a, b, c)] == [68, 68, 111]
    assert 48 <= shared(a.prompt, b.prompt) < 52  # type: ignore[arg-type]
    assert shared(a.prompt, c.prompt) == 64
    assert (c.session, c.turn, c.think_s, c.answer_span) == (a.session, 1, 7.0, (68, 108))
    other = next(read_trace("auto", path, PromptMaker(as_chat=False, seed=2)))
    assert shared(a.prompt, other.prompt) < 4  # type: ignore[arg-type]  # the next run finds no warm cache
    assert recorded_hit_share(path) == pytest.approx(96 / (68 + 68 + 111))


def test_a_long_trace_is_streamed(tmp_path: Path) -> None:
    path = conversation(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"timestamp": 10000, "input_length": 5, "output_length": 1}\n' * MAX_OUT_OF_ORDER + b"not JSON\n")
    plan = read_trace("auto", path, PromptMaker(as_chat=False))
    assert len(list(itertools.islice(plan, 3))) == 3  # what comes later was not looked at
    with pytest.raises(ConfigError, match=f"line {MAX_OUT_OF_ORDER + 5}"):
        next(plan)


def test_a_recording_is_replayed_in_the_order_of_arrival(tmp_path: Path) -> None:
    """It is written in the order of the ends; a long request must not wait behind later, shorter ones."""
    recorder = TrafficRecorder(tmp_path, TraceHeader())
    for name, arrival_ms, end_s in (("b", 400.0, 0.5), ("c", 700.0, 0.8), ("a", 100.0, 3.0)):
        recorder.record(TraceRecord(timestamp=arrival_ms, input_length=4, output_length=2, id=name), [1] * 4, [], end_s)
    recorder.close()
    plan = read_trace("auto", recorder.path, PromptMaker(as_chat=False))
    assert [request.at_s for request in plan] == pytest.approx([0.0, 0.3, 0.6])


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be recorded"):
        TrafficRecorder(tmp_path / "file", TraceHeader())


def test_what_the_proxy_takes_for_tokens() -> None:
    assert prompt_tokens({"prompt": [1, 2]}, tokens_of_bytes) == [1, 2]
    assert len(prompt_tokens({"prompt": "abcdefgh"}, tokens_of_bytes)) == 2
    first = {"messages": [{"role": "user", "content": "x" * 100}]}
    second = {"messages": [*first["messages"], {"role": "assistant", "content": [{"type": "text", "text": "y"}]}]}
    assert shared(*(prompt_tokens(body, tokens_of_bytes) for body in (first, second))) == 26
    assert prompt_tokens({"messages": 3}, tokens_of_bytes) == []


async def test_the_proxy_passes_everything_and_records_it(tmp_path: Path) -> None:
    fake = FakeServer(lambda body, _number: Behaviour(0.0, 0.05 if body["max_tokens"] == 99 else 0.0, cached_tokens=2))
    loop = asyncio.get_running_loop()
    upstream = await loop.create_server(fake.protocol, "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    recorder = TrafficRecorder(tmp_path, TraceHeader(source="proxy"))
    proxy = RecordingProxy(Target.of(f"http://127.0.0.1:{port}", ""), recorder)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    direct = f"http://127.0.0.1:{port}"
    through = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    secret = "my secret question " * 5
    bodies: list[dict[str, Any]] = [
        {"model": "m", "prompt": secret, "max_tokens": 4, "stream": True},
        {"model": "m", "messages": [{"role": "user", "content": secret}], "max_tokens": 3},
    ]
    async with httpx.AsyncClient(headers={"authorization": "Bearer secret-key"}) as client:
        for body, path in zip(bodies, ("/v1/completions", "/v1/chat/completions"), strict=True):
            answers = [(await client.post(f"{url}{path}", json=body)).text for url in (direct, through)]
            assert answers[0] == answers[1]
        assert (await client.get(f"{through}/v1/models")).json()["data"][0]["id"] == "fake"
        async with client.stream(
            "POST", f"{through}/v1/completions", json={"prompt": "x", "max_tokens": 99, "stream": True}
        ) as response:
            async for _ in response.aiter_bytes():
                break  # a client that leaves in the middle
    async with asyncio.timeout(10):
        while len(recorder.path.read_bytes().splitlines()) < 4:
            await asyncio.sleep(0.02)
            recorder.flush()
    server.close()
    upstream.close()
    recorder.close()
    text = recorder.path.read_text()
    assert "secret" not in text
    _, *rows = map(json.loads, text.splitlines())
    assert [row["endpoint"] for row in rows] == ["completions", "chat/completions", "completions"]
    assert [row["output_length"] for row in rows[:2]] == [4, 3]
    assert rows[0]["cached_tokens"] == 2
    assert rows[0]["tenant"] == rows[1]["tenant"]
    assert rows[0]["parameters"] == {"max_tokens": 4, "stream": True}
    assert rows[2]["cancelled_after_ms"] > 0


def test_refused_requests_are_not_replayed(tmp_path: Path) -> None:
    recorder = TrafficRecorder(tmp_path, TraceHeader())
    for status, cancelled in ((200, None), (429, None), (499, 12.0)):
        record = TraceRecord(timestamp=1, input_length=9, output_length=3, status=status, cancelled_after_ms=cancelled)
        recorder.record(record, list(range(9)), [], 1.0)
    recorder.close()
    plan: list[PlannedRequest] = list(read_trace("auto", recorder.path, PromptMaker(as_chat=False)))
    assert [request.cancel_after_s for request in plan] == [None, 0.012]
