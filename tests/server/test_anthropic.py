"""The messages endpoint through the official client: whole and streamed answers say the same."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from penstock.frontend.processor import Chat, Thinking

from .fakes import REPLY, RunningServer

MESSAGES: Any = [{"role": "user", "content": "héllo 🙂"}]
ANSWER = REPLY + "héllo 🙂"
TOOLS: Any = [{"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {}}}]
SCRIPT = '<think>\nHm.\n</think>\n\nLet me.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
def client(server: RunningServer) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0, timeout=10)


async def test_a_whole_answer(client: anthropic.AsyncAnthropic) -> None:
    answer = await client.messages.create(
        model="demo", max_tokens=100, messages=MESSAGES, system="Be brief.", metadata={"user_id": "someone"}
    )
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": ANSWER}]
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == (
        "assistant", "demo", "end_turn", None,
    )  # fmt: skip
    num_prompt = len("Be brief.\nhéllo 🙂")
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (num_prompt - 2, 2)
    assert answer.usage.output_tokens == len(ANSWER) + 1


async def test_a_streamed_answer_equals_the_whole_one(client: anthropic.AsyncAnthropic, server: RunningServer) -> None:
    server.engine.script = SCRIPT
    arguments: dict[str, Any] = {"model": "demo", "max_tokens": 100, "messages": MESSAGES, "tools": TOOLS}
    whole = await client.messages.create(**arguments)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert whole.stop_reason == "tool_use"
    async with client.messages.stream(**arguments) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    folded, expected = final.to_dict(), whole.to_dict()
    for message in (folded, expected):
        message.pop("id")
        for block in message["content"]:
            block.pop("id", None)
    assert folded == expected


async def test_cache_control_and_structured_output(client: anthropic.AsyncAnthropic, server: RunningServer) -> None:
    hour: Any = {"type": "ephemeral", "ttl": "1h"}
    short: Any = {"type": "ephemeral"}
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": hour}]
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "One.", "cache_control": short}]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [{"type": "text", "text": "Three.", "cache_control": short}]},
    ]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    answer = await client.messages.create(
        model="demo", max_tokens=2000, system=system, messages=messages,
        output_config={"format": {"type": "json_schema", "schema": schema}},
        thinking={"type": "enabled", "budget_tokens": 1024},
    )  # fmt: skip
    chat, sampling = server.text.requests[0].prompts[0], server.text.requests[0].sampling
    assert isinstance(chat, Chat)
    assert sorted(chat.breakpoints) == [(0, 3600.0), (4, 300.0)]
    assert chat.thinking == Thinking(1024, param="thinking.budget_tokens")
    assert sampling.grammar is not None
    assert json.loads(sampling.grammar.text) == schema
    used = answer.usage
    assert used.cache_creation is not None
    # The fake text layer pins 9 tokens for an hour and 15 for five minutes; the fake engine finds 2 cached.
    assert (used.cache_creation.ephemeral_1h_input_tokens, used.cache_creation.ephemeral_5m_input_tokens) == (7, 6)
    assert used.cache_creation_input_tokens == 13
    num_prompt = len("Be brief.\nOne.\nTwo.\nThree.")
    assert (used.input_tokens, used.cache_read_input_tokens) == (num_prompt - 15, 2)
    for wrong in ({"cache_control": short, "tools": [{**TOOLS[0], "cache_control": short}] * 4}, {}):
        marked: Any = [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": short}] * 5}]
        with pytest.raises(anthropic.BadRequestError, match="cache_control"):
            await client.messages.create(model="demo", max_tokens=10, messages=marked, **wrong)


async def test_tool_results_reach_the_template(client: anthropic.AsyncAnthropic, server: RunningServer) -> None:
    cached: Any = {"type": "ephemeral"}
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Add.", "cache_control": cached}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "text", "text": "Let me."},
            {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]},
            {"type": "text", "text": "Well?"},
        ]},
    ]  # fmt: skip
    await client.messages.create(
        model="demo", max_tokens=1000, messages=messages, tools=TOOLS,
        system=[{"type": "text", "text": "S", "cache_control": cached}],
        stop_sequences=["xyz"], thinking={"type": "disabled"},
        extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.9},
    )  # fmt: skip
    chat = server.text.requests[0].prompts[0]
    assert not isinstance(chat, (str, list))
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert chat.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "Let me.", "reasoning_content": "Hm.",
         "tool_calls": [{"id": "t1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "t1", "content": "2"},
        {"role": "user", "content": "Well?"},
    ]  # fmt: skip
    assert chat.variables == {"enable_thinking": False}
    assert chat.tools is not None
    assert chat.tools[0]["function"]["parameters"] == TOOLS[0]["input_schema"]
    sampling = server.engine.submitted[0].sampling
    assert (sampling.stop, sampling.temperature, sampling.top_k, sampling.top_p) == (("xyz",), 0.5, 3, 0.9)


async def test_stop_sequences_and_length(client: anthropic.AsyncAnthropic) -> None:
    stopped = await client.messages.create(model="demo", max_tokens=50, messages=MESSAGES, stop_sequences=["said"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "said")
    async with client.messages.stream(model="demo", max_tokens=3, messages=MESSAGES) as stream:
        final = await stream.get_final_message()
    assert (final.stop_reason, final.content[0].to_dict()["text"]) == ("max_tokens", ANSWER[:3])


async def test_counting_tokens(client: anthropic.AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(model="demo", messages=MESSAGES, system="Be brief.")
    assert counted.input_tokens == len("Be brief.\nhéllo 🙂")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("container", "c", "container"),
        ("tool_choice", {"type": "any"}, "tool_choice"),
        ("tool_choice", {"type": "tool"}, "tool_choice.name"),
        ("temperature", 1.5, "temperature"),
        ("max_tokens", 0, "max_tokens"),
        ("unheard", 1, "unheard"),
        ("thinking", {"type": "enabled", "budget_tokens": 10}, "thinking.budget_tokens"),
        ("messages", [{"role": "user", "content": [{"type": "image", "source": {}}]}], "messages[0].content[0].type"),
        ("messages", [], "messages"),
    ],
)
async def test_refusals_name_the_field(server: RunningServer, field: str, value: Any, named: str) -> None:
    body = {"model": "demo", "max_tokens": 10, "messages": MESSAGES, field: value}
    async with server.client() as http:
        answer = await http.post("/v1/messages", json=body)
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert named in answer.json()["error"]["message"]


async def test_errors_are_the_clients_own(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(model="other", max_tokens=10, messages=MESSAGES)


async def test_a_malformed_call_is_text_with_a_warning(client: anthropic.AsyncAnthropic, server: RunningServer) -> None:
    server.engine.script = "<tool_call>{nothing}</tool_call>"
    answer = await client.messages.create(model="demo", max_tokens=100, messages=MESSAGES, tools=TOOLS)
    assert answer.content[0].to_dict()["text"] == server.engine.script
    assert json.loads(answer.to_json())["warnings"][0]["code"] == "malformed_tool_call"
