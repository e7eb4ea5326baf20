"""The reader's view of a response does not depend on where the network cuts it, and no byte breaks it."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bench.metrics import conclude
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.response_reader import BrokenResponseError, ResponseReader


def observation() -> Observation:
    return Observation(PlannedRequest([1], 1, 3), 0.0)


def chunked(*events: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%X\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


EVENTS = (
    b": a comment\n\n",
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"delta":{"reasoning_content":"b"}}]}\n\n',
    b'event: x\r\ndata: {"choices":[{"delta":{"tool_calls":[{"index":0}]},\r\n'
    b'data: "finish_reason":"tool_calls"}]}\r\n\r\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":2}}}\n\n',
    b"data: [DONE]\n\n",
)


@given(st.lists(st.integers(1, 700), max_size=30))
def test_cuts_do_not_matter(places: list[int]) -> None:
    wire = chunked(*EVENTS)
    edges = [0, *sorted({place for place in places if place < len(wire)}), len(wire)]
    seen = observation()
    reader = ResponseReader(seen, keeps_answer=True)
    ends = [reader.feed(wire[start:end], 1.0) for start, end in itertools.pairwise(edges)]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert (seen.failure, seen.finish_reason, seen.is_done) == ("", "tool_calls", True)
    assert len(seen.chunk_s) == 3
    assert seen.num_choice_events == 4
    assert (seen.prompt_tokens, seen.output_tokens, seen.cached_tokens) == (7, 3, 2)
    assert seen.text == "ab"
    assert reader.can_reuse


def test_tokens_that_make_no_text_count_where_they_arrive() -> None:
    """Halves of a character in the middle belong to the text that completes them; at the end, to the last event."""
    seen = observation()
    reader = ResponseReader(seen)
    events = [("a", 1, None), ("", 2, None), ("é", 3, None), ("", 5, "length")]
    reader.feed(chunked()[: -len(b"0\r\n\r\n")], 0.0)
    for now_s, (text, total, reason) in enumerate(events, 1):
        choice = {"delta": {"content": text}, "finish_reason": reason}
        usage = {"prompt_tokens": 1, "completion_tokens": total}
        event = b"data: " + json.dumps({"choices": [choice], "usage": usage}).encode() + b"\n\n"
        reader.feed(b"%X\r\n%s\r\n" % (len(event), event), float(now_s))
    reader.feed(b"E\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", 9.0)
    assert (list(seen.chunk_s), list(seen.chunk_tokens)) == ([1.0, 3.0], [1, 2])
    assert (seen.output_tokens, seen.last_token_s, seen.failure) == (5, 4.0, "")
    assert conclude(seen).tpot == (4.0 - 1.0) / 4


@given(st.binary(max_size=400))
def test_no_bytes_break_it(data: bytes) -> None:
    for wire in (data, b"HTTP/1.1 200 OK\r\n\r\n" + data, chunked(data)):
        reader = ResponseReader(observation())
        try:
            if not reader.feed(wire, 1.0):
                reader.feed_eof(2.0)
        except BrokenResponseError:
            continue
        assert reader.seen.failure  # whatever it was, no good answer


def test_a_body_of_known_length() -> None:
    body = json.dumps({
        "choices": [{"text": "hello", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }).encode()  # fmt: skip
    seen = observation()
    wire = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n" % len(body) + body
    assert ResponseReader(seen).feed(wire, 3.0)
    assert (seen.failure, list(seen.chunk_s), seen.ended_s, seen.output_tokens) == ("", [3.0], 3.0, 2)


def test_a_body_until_the_close() -> None:
    seen = observation()
    reader = ResponseReader(seen)
    events = b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    assert not reader.feed(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + events, 1.0)
    reader.feed_eof(2.0)
    assert seen.is_success
    assert not reader.can_reuse


@pytest.mark.parametrize("end", [60, 150, -10, -3])
def test_a_cut_response_is_broken(end: int) -> None:
    reader = ResponseReader(observation())
    assert not reader.feed(chunked(*EVENTS)[:end], 1.0)
    with pytest.raises(BrokenResponseError):
        reader.feed_eof(2.0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too long", "type": "x"}}', "too long"),
        (b'{"error": "busy"}', "busy"),
        (b'{"object": "error", "message": "no such model"}', "no such model"),
        (b'{"detail": [{"loc": ["prompt"]}]}', "[{'loc': ['prompt']}]"),
        (b"<h1>Bad\n gateway</h1>", "<h1>Bad gateway</h1>"),
        (b"\xff" + b" word" * 200, "\ufffd" + " word" * 59 + " ..."),
        (b"[1]", "[1]"),
        (b"", ""),
    ],
)
def test_refusals_are_kept_in_the_servers_words(body: bytes, said: str) -> None:
    seen = observation()
    assert ResponseReader(seen).feed(b"HTTP/1.1 400 Bad\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body), 1.0)
    assert (seen.failure, seen.refusal) == ("status 400", said)


def test_an_error_event_is_kept_in_the_servers_words() -> None:
    seen = observation()
    ResponseReader(seen).feed(chunked(b'data: {"error": {"code": "engine", "message": "it died"}}\n\n'), 1.0)
    assert (seen.failure, seen.refusal) == ("error event: engine", "it died")
