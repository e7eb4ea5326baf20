"""The chat endpoint through the official client: whole and streamed answers say the same."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from .fakes import REPLY, RunningServer

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo 🙂"}]
ANSWER = REPLY + "héllo 🙂"


@pytest.fixture
def client(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=10)


async def test_a_whole_answer(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    answer = await client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.model == "demo"
    assert answer.system_fingerprint == "fp_fake"
    usage = answer.usage
    assert usage is not None
    num_prompt = len("Be brief.\nhéllo 🙂")
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, len(ANSWER) + 1)  # the stop token counts
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2
    await server.settled()
    record = server.records[0]
    assert (record.endpoint, record.outcome, record.status, record.is_stream) == ("chat", "stop", 200, False)
    assert (record.num_prompt_tokens, record.num_output_tokens) == (num_prompt, len(ANSWER) + 1)
    assert record.queue_s is not None
    assert record.time_to_first_token_s is not None


async def test_a_streamed_answer_equals_the_whole_one(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    finishes = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert finishes == [None] * (len(finishes) - 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ANSWER) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_no_usage_event_without_asking(server: RunningServer) -> None:
    body = {"model": "demo", "messages": MESSAGES, "stream": True}
    async with server.client() as http:
        text = (await http.post("/v1/chat/completions", json=body)).text
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in event for event in events)
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_the_synchronous_client_streams_too() -> None:
    async def run() -> list[str]:
        from penstock.config.settings import Settings

        from .fakes import start_server

        async with start_server(Settings(port=0)) as server:
            return await asyncio.to_thread(ask, server.url)

    def ask(url: str) -> list[str]:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        whole = client.chat.completions.create(model="alias", messages=MESSAGES).choices[0].message.content
        stream = client.chat.completions.create(model="alias", messages=MESSAGES, stream=True)
        return [whole or "", "".join(chunk.choices[0].delta.content or "" for chunk in stream)]

    assert asyncio.run(run()) == [ANSWER, ANSWER]


async def test_n_choices_share_the_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="demo", messages=MESSAGES, n=3, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {ANSWER[:5]}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("Be brief.\nhéllo 🙂"), 15)


async def test_n_choices_stream_side_by_side(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="demo", messages=MESSAGES, n=3, stream=True)
    texts, finishes, roles = {0: "", 1: "", 2: ""}, [], []
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        finishes += [choice.finish_reason] if choice.finish_reason else []
        roles += [choice.delta.role] if choice.delta.role else []
    assert texts == {0: ANSWER, 1: ANSWER, 2: ANSWER}
    assert (finishes, roles) == (["stop"] * 3, ["assistant"] * 3)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_stop_string_cuts_the_answer_and_ends_the_sequence(
    client: openai.AsyncOpenAI, server: RunningServer, is_stream: bool
) -> None:
    arguments: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "stop": ["said"]}
    if is_stream:
        stream = await client.chat.completions.create(**arguments, stream=True)
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        answer = await client.chat.completions.create(**arguments)
        text = answer.choices[0].message.content or ""
        assert answer.choices[0].model_extra == {"stop_reason": "said"}
    assert text == "You "
    await server.settled()
    assert [reason.value for _, reason in server.engine.aborted] == ["stop"]
    assert server.records[0].outcome == "stop"
    assert server.records[0].queue_s is not None, "the engine's last word was heard"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_logprobs(client: openai.AsyncOpenAI, is_stream: bool) -> None:
    arguments: dict[str, Any] = {
        "model": "demo", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 4,
    }  # fmt: skip
    if is_stream:
        stream = await client.chat.completions.create(**arguments, stream=True)
        entries = []
        async for chunk in stream:
            logprobs = chunk.choices[0].logprobs
            entries += logprobs.content if logprobs is not None and logprobs.content else []
    else:
        answer = await client.chat.completions.create(**arguments)
        assert answer.choices[0].logprobs is not None
        entries = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries) == "You "
    assert entries[0].bytes == [ord("Y")]
    assert entries[0].logprob == -0.5
    assert [(top.token, top.logprob) for top in entries[0].top_logprobs] == [("Y", -0.5), ("Z", -1.5)]


async def test_logprobs_without_alternatives(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="demo", messages=MESSAGES, logprobs=True, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].top_logprobs == []


async def test_prompt_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "ab"}], max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    assert answer.model_extra is not None
    entries = answer.model_extra["prompt_logprobs"]
    assert entries == [None, {str(ord("b")): {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]


async def test_a_priority_that_would_be_ignored_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="priority"):
        await client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"priority": 4})
    await client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"priority": 0})


async def test_settings_reach_the_engine(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    object.__setattr__(server.state.settings, "scheduling_policy", "priority")
    await client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0.25, top_p=0.5, presence_penalty=1, frequency_penalty=-1, seed=7,
        logit_bias={"65": 2}, max_completion_tokens=3, stop=["x", "y"], user="someone",
        metadata={"team": "blue"},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True,
                    "stop_token_ids": [9], "bad_words": ["no"], "include_stop_str_in_output": True,
                    "skip_special_tokens": False, "priority": 4, "cache_salt": "tenant"},
    )  # fmt: skip
    request = server.engine.submitted[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.2)
    assert (sampling.seed, sampling.logit_bias, sampling.max_tokens, sampling.min_tokens) == (7, {65: 2.0}, 3, 2)
    assert (sampling.stop, sampling.stop_token_ids, sampling.bad_words) == (("x", "y"), (9,), ("no",))
    assert sampling.ignore_eos
    assert sampling.include_stop_str_in_output
    assert not sampling.skip_special_tokens
    assert (request.priority, request.namespace, request.max_tokens) == (4, "tenant", 3)
    await server.settled()
    assert (server.records[0].user, server.records[0].metadata) == ("someone", {"team": "blue"})


async def test_messages_reach_the_template_as_it_expects_them(
    client: openai.AsyncOpenAI, server: RunningServer
) -> None:
    messages: Any = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "bo"},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "So"},
    ]  # fmt: skip
    await client.chat.completions.create(
        model="demo", messages=messages, max_tokens=1,
        extra_body={"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}},
    )  # fmt: skip
    prompt = server.text.requests[0].prompts[0]
    assert not isinstance(prompt, (str, list))
    assert prompt.messages[0] == {"role": "system", "content": "rules"}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt.messages[1] == {"role": "user", "content": parts, "name": "bo"}
    assert prompt.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert prompt.messages[3] == {"role": "tool", "content": "2", "tool_call_id": "c1"}
    assert (prompt.continue_final_message, prompt.add_generation_prompt) == (True, False)
    assert prompt.variables == {"enable_thinking": False}


TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.mark.parametrize("is_stream", [False, True])
async def test_tool_calls(client: openai.AsyncOpenAI, server: RunningServer, is_stream: bool) -> None:
    """The fake model repeats what it is told, so it is told a call."""
    arguments: dict[str, Any] = {
        "model": "demo", "tools": TOOLS, "messages": [{"role": "user", "content": CALL.replace("\n", " ")}],
    }  # fmt: skip
    if is_stream:
        stream = await client.chat.completions.create(**arguments, stream=True)
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        first, *rest = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert len(rest) > 10, "arguments come as they are written"
        first.function.arguments = "".join(call.function.arguments for call in rest)
        calls = [first]
        finish_reason = chunks[-1].choices[0].finish_reason
    else:
        answer = await client.chat.completions.create(**arguments)
        text = answer.choices[0].message.content or ""
        calls = list(answer.choices[0].message.tool_calls or [])
        finish_reason = answer.choices[0].finish_reason
    assert text == REPLY.rstrip()
    assert len(calls) == 1
    assert calls[0].function.name == "add"
    assert json.loads(calls[0].function.arguments) == {"a": 1, "b": 2}
    assert calls[0].id.startswith("call_")
    assert finish_reason == "tool_calls"
    await server.settled()
    assert server.records[0].outcome == "tool_calls"
    prompt = server.text.requests[0].prompts[0]
    assert not isinstance(prompt, (str, list))
    assert prompt.tools == TOOLS


async def test_tool_choice_none_hides_the_tools(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    answer = await client.chat.completions.create(
        model="demo", tools=TOOLS, tool_choice="none", messages=[{"role": "user", "content": CALL.replace("\n", " ")}]
    )
    assert answer.choices[0].message.content == REPLY + CALL.replace("\n", " ")
    prompt = server.text.requests[0].prompts[0]
    assert not isinstance(prompt, (str, list))
    assert prompt.tools is None


async def test_the_openai_stream_helper_folds_the_stream(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="demo", messages=MESSAGES) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER


async def test_models(client: openai.AsyncOpenAI) -> None:
    listed = await client.models.list()
    assert [model.id for model in listed.data] == ["demo", "alias"]
    model = await client.models.retrieve("alias")
    assert (model.id, model.owned_by) == ("alias", "penstock")
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")
