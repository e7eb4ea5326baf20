"""The tables of docs/api.md are true: each field that works is taken, each value that is refused is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from penstock.config.settings import Settings

from .fakes import RunningServer, start_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
MESSAGES = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS = [{"type": "function", **FUNCTION}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}

# By the table's heading: where its requests go, what else they hold, and where in them its fields stand.
CHAT = ("/v1/chat/completions", {"model": "demo", "messages": MESSAGES, "max_tokens": 8}, "")
TEXT = ("/v1/completions", {"model": "demo", "prompt": "hi"}, "")
ENDPOINTS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "Chat": [CHAT],
    "Completions": [TEXT],
    "POST /v1/embeddings": [("/v1/embeddings", {"model": "demo", "input": "hi"}, "")],
    "POST /v1/rerank, /v2/rerank and /rerank": [
        (path, {"model": "demo", "query": "a", "documents": ["b"]}, "")
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    ],
    "POST /v1/score and /score": [
        (path, {"model": "demo", "text_1": "a", "text_2": "b"}, "") for path in ("/v1/score", "/score")
    ],
    "POST /v1/responses": [("/v1/responses", {"model": "demo", "input": "hi", "store": False}, "")],
    "POST /v1/generate: chat's sampling fields, and": [("/v1/generate", {"model": "demo", "max_tokens": 4}, "")],
    "POST /tokenize (vLLM)": [("/tokenize", {"model": "demo", "prompt": "hi"}, "")],
    "POST /v1/messages": [("/v1/messages", {"model": "demo", "messages": MESSAGES, "max_tokens": 8}, "")],
    "POST /api/chat": [("/api/chat", {"model": "demo", "messages": MESSAGES}, "")],
    "POST /api/generate: what differs": [("/api/generate", {"model": "demo", "prompt": "hi"}, "")],
    "options of /api/chat and /api/generate": [
        ("/api/chat", {"model": "demo", "messages": MESSAGES}, "options"),
        ("/api/generate", {"model": "demo", "prompt": "hi"}, "options"),
    ],
    "POST /api/embed": [("/api/embed", {"model": "demo", "input": "hi"}, "")],
    "POST /embed": [("/embed", {"inputs": "hi"}, "")],
    "POST /, /generate and /generate_stream": [
        (path, {"inputs": "hi"}, "") for path in ("/", "/generate", "/generate_stream")
    ],
    "parameters of /, /generate and /generate_stream": [
        (path, {"inputs": "hi"}, "parameters") for path in ("/", "/generate", "/generate_stream")
    ],
}  # fmt: skip
# Of a classifier, of files, of an answer that is kept: test_one_pass.py, test_batches.py, test_responses.py.
ELSEWHERE: set[Any] = {
    "POST /v1/classify and /classify", "POST /v1/batches", ("POST /v1/responses", "previous_response_id"),
}  # fmt: skip
COLUMNS = {"Chat": 1, "Completions": 2}  # of the first table

# A value that works; where it needs company, the whole addition to the request.
EXAMPLES: dict[str, Any] = {
    "model": "demo", "n": 2, "stream": True,
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "temperature": 0.5, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": 1, "seed": 1, "stop": ["x"],
    "logit_bias": {"logit_bias": {"5": 1}}, "max_tokens": 3, "user": "me", "metadata": {"metadata": {"a": "b"}},
    "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "top_n_sigma": 1, "typical_p": 0.9, "xtc_probability": 0.5,
    "xtc_threshold": 0.1, "dynatemp_range": 0.5, "dynatemp_exponent": 1, "mirostat": 2, "mirostat_tau": 5,
    "mirostat_eta": 0.1, "dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_sequence_breakers": ["x"], "min_tokens": 1, "ignore_eos": True, "stop_token_ids": [7], "bad_words": ["x"],
    "include_stop_str_in_output": True, "skip_special_tokens": False, "prompt_logprobs": 1, "priority": 0,
    "cache_salt": "a", "use_beam_search": {"use_beam_search": True, "temperature": 0, "max_tokens": 2},
    "length_penalty": {"use_beam_search": True, "length_penalty": 0.5, "max_tokens": 2},
    "early_stopping": {"use_beam_search": True, "early_stopping": True, "max_tokens": 2},
    "prompt_cache_key": "k", "safety_identifier": "s", "response_format": {"response_format": RESPONSE_FORMAT},
    "structured_outputs": {"structured_outputs": {"regex": "a+"}}, "messages": MESSAGES, "return_token_ids": True,
    "logprobs": {"logprobs": True}, "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 4},
    "tools": TOOLS, "tool_choice": {"tools": TOOLS, "tool_choice": "auto"},
    "parallel_tool_calls": {"tools": TOOLS, "parallel_tool_calls": True},
    "chat_template_kwargs": {"chat_template_kwargs": {"a": 1}}, "add_generation_prompt": True,
    "continue_final_message": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "a"}], "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "reasoning_effort": "none", "thinking_token_budget": 16, "prompt": "hi", "echo": True, "suffix": "x", "best_of": 1,
    "add_special_tokens": False, "truncate_prompt_tokens": -1, "input": "hi", "dimensions": 2,
    "encoding_format": "float", "normalize": True, "query": "a", "documents": ["a", {"text": "b"}], "top_n": 1,
    "return_documents": True, "text_1": "a", "text_2": "b", "activation": True, "instructions": "a",
    "store": True, "background": {"background": True, "store": True}, "max_output_tokens": 4,
    "text": {"text": {"format": {"type": "text"}}},
    "reasoning": {"reasoning": {}}, "token_ids": [1, 2], "return_token_strs": True, "system": "a",
    "thinking": {"thinking": {"type": "disabled"}}, "cache_control": {"cache_control": {"type": "ephemeral"}},
    "output_config": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "output_format": {"output_format": {"type": "json_schema", "schema": SCHEMA}}, "stop_sequences": ["x"],
    "options": {"options": {"num_predict": 3}}, "keep_alive": "5m", "think": False, "format": "json", "raw": True,
    "images": [], "num_predict": 4, "repeat_penalty": 1.1, "num_ctx": 64, "truncate": True, "inputs": "hi",
    "truncation_direction": "right", "parameters": {"parameters": {"max_new_tokens": 3}}, "max_new_tokens": 3,
    "do_sample": True, "details": True, "return_full_text": True, "top_n_tokens": {"top_n_tokens": 2, "details": True},
    "grammar": {"grammar": {"type": "regex", "value": "a+"}},
}  # fmt: skip
# Where the same name is another thing.
OF_TABLE: dict[tuple[str, str], Any] = {
    ("Completions", "logprobs"): 2,
    ("POST /v1/responses", "tools"): FLAT_TOOLS,
    ("POST /v1/responses", "tool_choice"): {"tools": FLAT_TOOLS, "tool_choice": "auto"},
    ("POST /v1/messages", "tools"): [{"name": "f", "input_schema": FUNCTION["parameters"]}],
    ("POST /v1/messages", "tool_choice"): {"tool_choice": {"type": "none"}},
    ("POST /v1/messages", "metadata"): {"metadata": {"user_id": "me"}},
    ("POST /v1/responses", "parallel_tool_calls"): {"tools": FLAT_TOOLS, "parallel_tool_calls": True},
    ("POST /tokenize (vLLM)", "continue_final_message"): {
        "prompt": None, "messages": [*MESSAGES, {"role": "assistant", "content": "a"}], "continue_final_message": True,
        "add_generation_prompt": False,
    },
    ("POST /, /generate and /generate_stream", "stream"): False,
    ("POST /tokenize (vLLM)", "messages"): {"prompt": None, "messages": MESSAGES},
    ("POST /tokenize (vLLM)", "tools"): {"prompt": None, "messages": MESSAGES, "tools": TOOLS},
}  # fmt: skip


class Row(NamedTuple):
    """accepted: JSON values; None: the field works."""

    table: str
    field: str
    kind: str
    accepted: list[Any] | None


def rows() -> list[Row]:
    """Every row of every table of fields."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = []
    part = re.search(r"<!-- begin fields -->(.*?)<!-- end fields -->", text, re.DOTALL)
    assert part is not None
    for name, *cells in _cells(part[1]):
        if len(cells) > 1:
            found += [Row(of, name, cells[0], _accepted(cells[at])) for of, at in COLUMNS.items() if cells[at]]
        else:
            found.append(Row("Chat", name, "", _accepted(cells[0])))
    part = re.search(r"<!-- begin protocols -->(.*?)<!-- end protocols -->", text, re.DOTALL)
    assert part is not None
    for title, table in re.findall(r"\*\*(.*?)\*\*\n\n((?:\|.*\n)+)", part[1] + "\n"):
        found += [Row(title, name, kind, _accepted(accepted)) for name, kind, accepted in _cells(table)]
    return [row for row in found if row.table not in ELSEWHERE and row[:2] not in ELSEWHERE]


def _cells(table: str) -> list[list[str]]:
    """Without the quotes of the first."""
    lines = [line.removeprefix("|").removesuffix("|").split("|") for line in table.splitlines()]
    return [[line[0].strip(" `"), *(cell.strip() for cell in line[1:])] for line in lines if "`" in line[0]]


def _accepted(cell: str) -> list[Any] | None:
    """`yes`, or `null, "auto", 1` with each value in quotes."""
    return None if cell == "yes" else [None, *(json.loads(value) for value in re.findall(r"`(.*?)`", cell))]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningServer]:
    settings = Settings(port=0, request_timeout=20.0, data_directory=str(tmp_path_factory.mktemp("data")))
    async with start_server(settings) as running:
        yield running
        await running.settled()


def requests(row: Row, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """(path, body) with the field at this value; of an example, with what it needs beside it."""
    made = []
    for path, base, place in ENDPOINTS[row.table]:
        more = value if isinstance(value, dict) and row.field in value else {row.field: value}
        made.append((path, {**base, place: {**base.get(place, {}), **more}} if place else {**base, **more}))
    return made


@pytest.mark.parametrize(
    "row", [row for row in rows() if row.accepted is None], ids=lambda row: f"{row.table}: {row.field}"
)
async def test_a_field_that_works_is_taken_and_a_wrong_type_refused(server: RunningServer, row: Row) -> None:
    example = OF_TABLE.get((row.table, row.field), EXAMPLES.get(row.field))
    assert example is not None, "a new field needs an example here"
    wrong = 5 if "list" in row.kind else [["x"]]
    async with server.client() as http:
        for path, body in requests(row, example):
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, (path, body, answer.text)
        for path, body in requests(row, wrong):
            answer = await http.post(path, json=body)
            assert answer.status_code == 400, (path, body, answer.text)
            assert row.field in answer.text


@pytest.mark.parametrize(
    "row", [row for row in rows() if row.accepted is not None], ids=lambda row: f"{row.table}: {row.field}"
)
async def test_what_is_refused_is_refused_by_name(server: RunningServer, row: Row) -> None:
    assert row.accepted is not None
    async with server.client() as http:
        for value in row.accepted:
            for path, body in requests(row, value):
                answer = await http.post(path, json=body)
                assert answer.status_code == 200, (path, body, answer.text)
        for value in (17, "nonsense", [1], {"a": 1}, True):
            if value in row.accepted:
                continue
            for path, body in requests(row, value):
                answer = await http.post(path, json=body)
                assert answer.status_code == 400, (path, body, answer.text)
                assert row.field in answer.text
