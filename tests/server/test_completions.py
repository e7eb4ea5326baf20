"""The completions endpoint: prompts of four kinds, echo, and the older log-probability format."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from penstock.frontend.fill_in_middle import Gap

from .fakes import REPLY, RunningServer


@pytest.fixture
def client(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=10)


async def test_a_whole_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt="hé", max_tokens=100)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == REPLY + "hé"
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, len(REPLY) + 3)


async def test_sixteen_tokens_without_max_tokens(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt="abcdefghij")
    assert answer.choices[0].text == (REPLY + "abcdefghij")[:16]
    assert answer.choices[0].finish_reason == "length"


async def test_a_streamed_answer_equals_the_whole_one(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="demo", prompt="hé", max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == REPLY + "hé"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(REPLY) + 3


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ],
)
async def test_prompts_of_every_kind(client: openai.AsyncOpenAI, prompt: Any, texts: list[str]) -> None:
    answer = await client.completions.create(model="demo", prompt=prompt, max_tokens=50)
    assert [choice.text for choice in answer.choices] == [REPLY + text for text in texts]
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, texts))


async def test_choices_are_numbered_prompt_by_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt=["a", "b"], n=2, max_tokens=50)
    assert [(choice.index, choice.text[-1]) for choice in answer.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2


@pytest.mark.parametrize("is_stream", [False, True])
async def test_echo_with_logprobs(client: openai.AsyncOpenAI, is_stream: bool) -> None:
    arguments: dict[str, Any] = {"model": "demo", "prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 3}
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[Any] = []
    offsets: list[int] = []
    if is_stream:
        stream = await client.completions.create(**arguments, stream=True)
        choices = [chunk.choices[0] async for chunk in stream]
    else:
        choices = (await client.completions.create(**arguments)).choices
    for choice in choices:
        assert choice.logprobs is not None
        tokens += choice.logprobs.tokens or []
        values += choice.logprobs.token_logprobs or []
        tops += choice.logprobs.top_logprobs or []
        offsets += choice.logprobs.text_offset or []
    assert "".join(choice.text for choice in choices) == "abc" + "You"
    assert tokens == list("abcYou")
    assert values == [None, -0.5, -0.5, -0.5, -0.5, -0.5]
    assert tops[:2] == [None, {"b": -0.5}]
    assert offsets == [0, 1, 2, 3, 4, 5]


async def test_echo_without_new_tokens_scores_the_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt="abc", echo=True, logprobs=2, max_tokens=0)
    choice = answer.choices[0]
    assert choice.text == "abc"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[1] == {"b": -0.5, "c": -1.5}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("is_stream", [False, True])
async def test_echo_alone(client: openai.AsyncOpenAI, is_stream: bool) -> None:
    arguments: dict[str, Any] = {"model": "demo", "prompt": "abc", "echo": True, "max_tokens": 3}
    if is_stream:
        text = "".join(
            [chunk.choices[0].text async for chunk in await client.completions.create(**arguments, stream=True)]
        )
    else:
        text = (await client.completions.create(**arguments)).choices[0].text
    assert text == "abcYou"


async def test_prompt_logprobs_by_token_id(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt="ab", max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert answer.choices[0].model_extra is not None
    entries = answer.choices[0].model_extra["prompt_logprobs"]
    assert entries == [None, {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]


async def test_special_tokens_can_be_left_out(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    await client.completions.create(model="demo", prompt="a", max_tokens=1, extra_body={"add_special_tokens": False})
    await client.completions.create(model="demo", prompt="a", max_tokens=1)
    assert [request.add_special_tokens for request in server.text.requests] == [False, True]


async def test_a_suffix_asks_for_what_stands_between(server: RunningServer) -> None:
    body = {"model": "demo", "prompt": ["a", "b"], "suffix": "z", "max_tokens": 2}
    async with server.client() as http:
        answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert server.text.requests[-1].prompts == [Gap("a", "z"), Gap("b", "z")]
