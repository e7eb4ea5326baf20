"""What OpenAI's and vLLM's fields for structured output become, and which requests are refused before they run."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from penstock.frontend.processor import CallRule, Chat
from penstock.messages import GrammarKind, GrammarSpec

from .fakes import RunningServer

MESSAGES: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "put"}},
]


@pytest.fixture
def client(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(("fields", "expected"), [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, GrammarSpec(GrammarKind.JSON_OBJECT, param="response_format")),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}},
     GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA), param="response_format.json_schema.schema")),
    ({"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
     GrammarSpec(GrammarKind.STRUCTURAL_TAG, '{"format": {"type": "any_text"}}', param="response_format")),
    ({"structured_outputs": {"json": SCHEMA}},
     GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA), param="structured_outputs.json")),
    ({"structured_outputs": {"json": '{"type": "null"}'}},
     GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "null"}', param="structured_outputs.json")),
    ({"structured_outputs": {"regex": "a+"}}, GrammarSpec(GrammarKind.REGEX, "a+", param="structured_outputs.regex")),
    ({"structured_outputs": {"choice": ["a", "b"]}},
     GrammarSpec(GrammarKind.CHOICE, '["a", "b"]', param="structured_outputs.choice")),
    ({"structured_outputs": {"grammar": "start: X"}},
     GrammarSpec(GrammarKind.GRAMMAR, "start: X", param="structured_outputs.grammar")),
    ({"structured_outputs": {"json_object": True, "regex": None}},
     GrammarSpec(GrammarKind.JSON_OBJECT, param="structured_outputs.json_object")),
])  # fmt: skip
async def test_fields_become_a_grammar(
    client: openai.AsyncOpenAI, server: RunningServer, fields: dict[str, Any], expected: GrammarSpec | None
) -> None:
    await client.chat.completions.create(model="demo", messages=MESSAGES, extra_body=fields)
    await client.completions.create(model="demo", prompt="x", extra_body=fields)
    assert [request.sampling.grammar for request in server.text.requests] == [expected, expected]


@pytest.mark.parametrize(("fields", "expected"), [
    ({}, CallRule(strict_tools=frozenset({"get"}))),
    ({"tools": TOOLS[1:]}, None),
    ({"tools": TOOLS[1:], "parallel_tool_calls": False}, CallRule(max_calls=1)),
    ({"tools": TOOLS[1:], "response_format": {"type": "json_object"}}, CallRule()),
    ({"tool_choice": "auto"}, CallRule(strict_tools=frozenset({"get"}))),
    ({"tool_choice": "none"}, None),
    ({"tool_choice": "required"}, CallRule(is_required=True)),
    ({"tool_choice": "required", "parallel_tool_calls": False}, CallRule(is_required=True, max_calls=1)),
    ({"tool_choice": {"type": "function", "function": {"name": "put"}}},
     CallRule(is_required=True, only="put", max_calls=1)),
])  # fmt: skip
async def test_tool_choices_become_a_rule(
    client: openai.AsyncOpenAI, server: RunningServer, fields: dict[str, Any], expected: CallRule | None
) -> None:
    await client.chat.completions.create(**{"model": "demo", "messages": MESSAGES, "tools": TOOLS, **fields})
    [chat] = server.text.requests[0].prompts
    assert isinstance(chat, Chat)
    assert chat.call_rule == expected


@pytest.mark.parametrize(("fields", "param"), [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "n"}}}, "response_format.json_schema"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": {"type": "text", "mood": 1}}, "response_format.mood"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a" * 600_000}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "cut"}}}, "tool_choice"),
])  # fmt: skip
async def test_contradictions_are_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    async with httpx.AsyncClient() as http:
        body = {"model": "demo", "messages": MESSAGES, **fields}
        answer = await http.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


TEXT = json.dumps(SCHEMA)
CLAUDE_TOOLS = [{"name": "get", "input_schema": SCHEMA}]
RESPONSE_TOOLS = [{"type": "function", "name": "get", "parameters": SCHEMA, "strict": True}]
OLLAMA: Any = {"model": "demo", "messages": MESSAGES, "stream": False}
CLAUDE: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 9}
RESPONSE: Any = {"model": "demo", "input": "hi"}


@pytest.mark.parametrize(("path", "body", "expected"), [
    ("/api/chat", {**OLLAMA, "format": "json"}, GrammarSpec(GrammarKind.JSON_OBJECT, param="format")),
    ("/api/chat", {**OLLAMA, "format": SCHEMA}, GrammarSpec(GrammarKind.JSON_SCHEMA, TEXT, param="format")),
    ("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "a+"}}},
     GrammarSpec(GrammarKind.REGEX, "a+", param="parameters.grammar.value")),
    ("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": SCHEMA}}},
     GrammarSpec(GrammarKind.JSON_SCHEMA, TEXT, param="parameters.grammar.value")),
    ("/v1/responses", {**RESPONSE, "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
     GrammarSpec(GrammarKind.JSON_SCHEMA, TEXT, param="text.format.schema")),
    ("/v1/messages", {**CLAUDE, "tools": CLAUDE_TOOLS, "tool_choice": {"type": "any"}}, CallRule(is_required=True)),
    ("/v1/messages", {**CLAUDE, "tools": CLAUDE_TOOLS, "tool_choice": {"type": "tool", "name": "get"}},
     CallRule(is_required=True, only="get", max_calls=1)),
    ("/v1/messages", {**CLAUDE, "tools": CLAUDE_TOOLS,
                      "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, CallRule(max_calls=1)),
    ("/v1/responses", {**RESPONSE, "tools": RESPONSE_TOOLS}, CallRule(strict_tools=frozenset({"get"}))),
    ("/v1/responses", {**RESPONSE, "tools": RESPONSE_TOOLS, "tool_choice": {"type": "function", "name": "get"}},
     CallRule(is_required=True, only="get", max_calls=1)),
])  # fmt: skip
async def test_other_protocols_become_the_same(
    server: RunningServer, path: str, body: dict[str, Any], expected: GrammarSpec | CallRule
) -> None:
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{server.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    [request] = server.text.requests
    if isinstance(expected, GrammarSpec):
        assert request.sampling.grammar == expected
    else:
        assert isinstance(request.prompts[0], Chat)
        assert request.prompts[0].call_rule == expected


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_answer_that_is_cut_off_is_flagged(server: RunningServer, is_streamed: bool) -> None:
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 2, "response_format": {"type": "json_object"}}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{server.url}/v1/chat/completions", json={**body, "stream": is_streamed})
        free = await http.post(f"{server.url}/v1/chat/completions", json={**body, "response_format": {"type": "text"}})
    assert '"warnings":[{"code":"unfinished_output"' in answer.text.replace(" ", "")
    assert '"finish_reason":"length"' in answer.text.replace(" ", "")
    assert "unfinished_output" not in free.text
