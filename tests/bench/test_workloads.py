"""Datasets, traces and arrivals: what is sent, and when."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.base.errors import ConfigError
from penstock.bench import arrivals, datasets, traces
from penstock.bench.datasets import Shape, count_by_characters
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import WORDS, PromptMaker
from penstock.bench.slo import PRESETS, parse_slo
from penstock.bench.target import Target

TOKENS = PromptMaker(as_chat=False)


def prompts(plan: Any) -> list[Any]:
    return [request.prompt for request in plan]


def shared(left: list[int], right: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def times(rate: str, count: int, process: str = "poisson", burstiness: float = 1.0) -> list[float]:
    gaps = arrivals.unit_gaps(process, burstiness, seed=1)
    return list(itertools.islice(arrivals.arrival_times(arrivals.parse_rate(rate), gaps), count))


def test_poisson_arrivals_are_not_rescaled() -> None:
    """Of a true Poisson process, n arrivals take n / rate give or take a sqrt(n)-th; vLLM's take exactly that."""
    found = times("10", 20_000)
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.1, rel=0.03)
    ends = []
    for seed in range(200):
        sums = itertools.accumulate(arrivals.unit_gaps("poisson", 1.0, seed))
        ends.append(next(itertools.islice(sums, 99, None)))
    assert statistics.pstdev(ends) == pytest.approx(10.0, rel=0.2)


def test_constant_is_constant() -> None:
    """inference-perf's `constant` draws exponential gaps."""
    assert times("4", 5, "constant") == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


def test_burstiness_is_the_shape_of_gamma() -> None:
    gaps = [after - before for before, after in itertools.pairwise(times("10", 40_000, "gamma", 0.25))]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(2.0, rel=0.05)


def test_stages_and_ramps() -> None:
    found = times("2:10,2-8:10,8:10", 10_000, "constant")
    counts = [sum(start <= at_s < start + 10 for at_s in found) for start in (0, 10, 20)]
    assert counts == pytest.approx([20, 50, 80], abs=1)
    assert len(found) == pytest.approx(150, abs=1)  # the last stage ends the run
    assert sum(10 <= at_s < 15 for at_s in found) == pytest.approx(17.5, abs=1)  # 2 to 5 a second
    down = times("8-0:10", 10_000, "constant")
    assert len(down) == pytest.approx(40, abs=1)
    assert sorted(down) == down


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "5:0", "5,6", "2-8", "1e3", "999999"])
def test_bad_rates(text: str) -> None:
    with pytest.raises(ConfigError, match="no request rate"):
        arrivals.parse_rate(text)


def test_later_turns_have_no_time_of_their_own() -> None:
    plan = list(arrivals.dated(datasets.conversations(Shape(turns=3), TOKENS, 9, 1), iter([1.0, 2.0])))
    assert [request.at_s for request in plan] == [1.0, None, None, 2.0, None, None]


def test_what_is_drawn_follows_from_the_seed() -> None:
    shape = Shape(input_len=40, output_len=9, spread=0.5, levels=((8, 2),))
    for dataset in (datasets.random_prompts, datasets.prefix_tree, datasets.conversations):
        first, again, other = (list(dataset(shape, TOKENS, 20, seed)) for seed in (1, 1, 2))
        assert first == again
        assert prompts(first) != prompts(other)
        assert [request.index for request in first] == list(range(20))
        assert {request.output_tokens for request in first} <= set(range(4, 15))


def test_random_prompts_share_nothing() -> None:
    plan = prompts(datasets.random_prompts(Shape(input_len=200), TOKENS, 10, 3))
    assert all(len(prompt) == 200 for prompt in plan)
    assert max(shared(a, b) for a, b in itertools.combinations(plan, 2)) < 4


def test_the_prefix_tree_is_a_tree() -> None:
    shape = Shape(input_len=5, levels=((64, 2), (32, 3)))
    plan = prompts(datasets.prefix_tree(shape, TOKENS, 200, 1))
    assert {len(prompt) for prompt in plan} == {101}
    assert len({tuple(prompt[:64]) for prompt in plan}) == 2
    assert len({tuple(prompt[:96]) for prompt in plan}) == 6


def test_conversations_extend_their_session() -> None:
    plan = list(datasets.conversations(Shape(input_len=10, output_len=5, turns=3, think_s=2.0), TOKENS, 7, 1))
    assert [request.turn for request in plan] == [0, 1, 2, 0, 1, 2, 0]
    assert [request.prompt_tokens for request in plan[:3]] == [10, 25, 40]
    assert plan[0].think_s == 0.0
    assert all(request.extends_session and request.is_chat for request in plan)


def test_words_are_words() -> None:
    maker = PromptMaker(as_chat=True)
    [message] = next(datasets.random_prompts(Shape(input_len=30), maker, 1, 1)).prompt
    assert isinstance(message, dict)
    assert len(message["content"].split()) == 30
    assert len(set(WORDS)) == len(WORDS)


def test_sharegpt_keeps_every_turn(tmp_path: Path) -> None:
    """Tools that keep the first pair, and drop what is long, measure another distribution."""
    said = [
        ("system", "s" * 8),
        ("human", "a" * 40),
        ("gpt", "b" * 80),
        ("human", "c" * 4),
        ("gpt", "d" * 4000),
        ("gpt", "e"),
    ]
    path = tmp_path / "share.json"
    path.write_text(
        json.dumps([{"id": "x", "conversations": [{"from": who, "value": text} for who, text in said]}, {}])
    )
    plan = list(datasets.sharegpt(path, count_by_characters, Shape(), 1))
    assert [(request.prompt_tokens, request.output_tokens, request.turn) for request in plan] == [
        (12, 20, 0),
        (33, 1000, 1),
    ]
    assert [message["role"] for message in plan[0].prompt] == ["system", "user"]  # type: ignore[index]


def test_custom_lines(tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl"
    lines: list[Any] = [
        {"prompt": "x" * 40, "output_tokens": 7}, {"messages": [{"role": "user", "content": "hello you"}]},
        {"prompt": [1, 2, 3], "max_tokens": 4}, {"custom_id": "1", "body": {"prompt": "abcd", "max_tokens": 2}},
    ]  # fmt: skip
    path.write_text("\n\n".join(map(json.dumps, lines)))
    plan = list(datasets.custom_lines(path, count_by_characters, Shape(output_len=99)))
    assert [(request.prompt_tokens, request.output_tokens) for request in plan] == [(10, 7), (2, 99), (3, 4), (1, 2)]
    path.write_text('{"prompt": "a"}\nnonsense')
    with pytest.raises(ConfigError, match="line 2"):
        list(datasets.custom_lines(path, count_by_characters, Shape()))


def read(path: Path, text: str, kind: str = "auto", maker: PromptMaker = TOKENS) -> list[PlannedRequest]:
    path.write_text(text)
    return list(traces.read_trace(kind, path, maker))


def test_mooncake_blocks_are_of_512_tokens(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000, "input_length": 1300, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 3500, "input_length": 1100, "output_length": 6, "hash_ids": [7, 8, 10]},
    ]
    first, second = read(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))
    assert (first.at_s, second.at_s) == (0.0, 2.5)
    assert (first.prompt_tokens, second.output_tokens) == (1300, 6)
    assert shared(first.prompt, second.prompt) in range(1024, 1028)  # type: ignore[arg-type]


def test_qwen_chats_are_sessions(tmp_path: Path) -> None:
    rows = [
        {"chat_id": 1, "parent_chat_id": -1, "timestamp": 5.0, "input_length": 20, "output_length": 5, "type": "text",
         "turn": 1, "hash_ids": [1, 2]},
        {"chat_id": 2, "parent_chat_id": 1, "timestamp": 9.0, "input_length": 40, "output_length": 5, "type": "text",
         "turn": 2, "hash_ids": [1, 3, 4]},
    ]  # fmt: skip
    first, second = read(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows)))
    assert first.session == second.session != ""
    assert (first.turn, second.turn, second.at_s, second.think_s) == (0, 1, 4.0, None)
    assert shared(first.prompt, second.prompt) in range(16, 20)  # type: ignore[arg-type]


def test_burstgpt_failures_are_left_out(tmp_path: Path) -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118.5,GPT-4,417,276,693,API log\n"
    )
    found = read(tmp_path / "b.csv", text)
    assert [(request.at_s, request.prompt_tokens, request.output_tokens) for request in found] == [
        (0.0, 472, 18),
        (113.5, 417, 276),
    ]


@pytest.mark.parametrize("moment", ["2023-11-16 18:17:03.9799600", "2024-05-10 00:00:00.009930+00:00"])
def test_azure(tmp_path: Path, moment: str) -> None:
    [found] = read(tmp_path / "a.csv", f"TIMESTAMP,ContextTokens,GeneratedTokens\n{moment},4808,10\n")
    assert (found.at_s, found.prompt_tokens, found.output_tokens) == (0.0, 4808, 10)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a,b\n1,2\n", "none of the known"),
        ("", "none of the known"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,2\n", "line 2"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3}\n{}\n', "line 2"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        read(tmp_path / "t", text)


def test_objectives() -> None:
    found = parse_slo(["ttft:p95=0.5s, itl=40", "mlperf-llama3.1-8b-interactive"])
    assert [str(limit) for limit in found] == [
        "ttft p95 <= 500 ms", "itl p99 <= 40 ms", "ttft p99 <= 500 ms", "tpot p99 <= 30 ms",
    ]  # fmt: skip
    assert len(PRESETS) == 10
    with pytest.raises(ConfigError):
        parse_slo(["ttft:p100=3"])


@given(st.text(max_size=60))
def test_no_url_breaks_the_target(text: str) -> None:
    try:
        target = Target.of(text, "m")
    except ConfigError:
        return
    except ValueError:
        pytest.fail("an error of urllib")
    assert target.host
    assert math.isfinite(target.port)


def test_the_request_on_the_wire() -> None:
    target = Target.of("https://host:1/api/v1/", "m", api_key="k", parameters={"a": 1})
    wire = target.write(PlannedRequest([{"role": "user", "content": "b"}], 1, 5), [{"role": "user", "content": "a"}])
    head, _, body = wire.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /api/v1/chat/completions HTTP/1.1\r\nHost: host:1\r\nAuthorization: Bearer k\r\n")
    assert int(head.rsplit(b" ", 1)[1]) == len(body)
    assert json.loads(body) == {
        "model": "m", "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}, "a": 1,
    }  # fmt: skip
    of_a_tenant = target.write(PlannedRequest([1], 1, 5, tenant="t"))
    assert json.loads(of_a_tenant.partition(b"\r\n\r\n")[2])["user"] == "t"
