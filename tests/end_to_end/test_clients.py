"""The unmodified clients that people use, against a real server with the bundled model: chat, streams, tools and their
results, structured output, vectors. Every protocol says the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import cohere
import httpx
import ollama
import openai
import pytest
from huggingface_hub import InferenceClient
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MODEL = "penstock-demo"
FACTS = "The wifi password is brolk42. The Tamrin bakery opens at 6:40. The Tamrin bakery is closed on Sunday."
QUESTION, ANSWER = "What is the wifi password?", "The wifi password is brolk42."
FOLLOW_UP, FOLLOWED_UP = "When does the Tamrin bakery open?", "The Tamrin bakery opens at 6:40."
WEATHER, RESULT = "What is the weather in Tamrin?", '{"temperature": 17, "weather": "sunny"}'
TOLD = "The temperature is 17 and the weather is sunny."
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Get the weather in a city", "parameters": PARAMETERS}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]


class Place(BaseModel):
    """A place."""

    city: Literal["Tamrin", "Oster"]
    days: int


PLACE: Any = Place.model_json_schema() | {"additionalProperties": False}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "penstock.cli.main", "serve", "--port", "0", "--max-memory", "512MiB"]
    process = subprocess.Popen([*command, "--num-threads", "1"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"is served at (\S+)/v1", line):
            yield match[1]
            break
    process.terminate()
    assert process.wait(30) == 0


def test_openai(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "system", "content": FACTS}, {"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    messages += [whole.choices[0].message.to_dict(), {"role": "user", "content": FOLLOW_UP}]
    with client.chat.completions.stream(model=MODEL, messages=messages, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == FOLLOWED_UP
    messages = [{"role": "user", "content": WEATHER}]
    called = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0)
    assert called.choices[0].finish_reason == "tool_calls"
    call = (called.choices[0].message.tool_calls or [])[0]
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Tamrin"})
    messages += [called.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    told = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0)
    assert told.choices[0].message.content == TOLD
    messages = [{"role": "user", "content": WEATHER}]
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=TOOLS, temperature=0) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    assert kinds.count("tool_calls.function.arguments.delta") > 1, "arguments come as they are written"
    assert streamed[0].function.arguments == call.function.arguments
    parsed = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Place, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Place)


def test_beam_search(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    beams: Any = {"use_beam_search": True, "length_penalty": 0.0}
    messages: Any = [{"role": "system", "content": FACTS}, {"role": "user", "content": QUESTION}]
    best, second = client.chat.completions.create(model=MODEL, messages=messages, n=2, extra_body=beams).choices
    assert best.message.content == ANSWER
    assert second.message.content != ANSWER
    found = client.completions.create(
        model=MODEL, prompt=["Once upon a time", "The gate"], n=2, best_of=4, max_tokens=8, extra_body=beams
    )
    assert len({choice.text for choice in found.choices}) == 4
    assert found.usage is not None
    assert found.usage.completion_tokens > 20


def test_openai_responses(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    whole = client.responses.create(model=MODEL, instructions=FACTS, input=QUESTION, temperature=0)
    assert whole.output_text == ANSWER
    with client.responses.stream(
        model=MODEL, instructions=FACTS, input=FOLLOW_UP, previous_response_id=whole.id, temperature=0
    ) as stream:
        assert stream.until_done().get_final_response().output_text == FOLLOWED_UP
    tools: Any = [{"type": "function", **FUNCTION}]
    called = client.responses.create(model=MODEL, input=WEATHER, tools=tools, temperature=0)
    (call,) = called.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Tamrin"}
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
    told = client.responses.create(
        model=MODEL, input=result, tools=tools, previous_response_id=called.id, temperature=0
    )
    assert told.output_text == TOLD
    parsed = client.responses.parse(model=MODEL, input=WEATHER, text_format=Place, temperature=0)
    assert isinstance(parsed.output_parsed, Place)


def test_anthropic(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    arguments: Any = {"model": MODEL, "max_tokens": 100, "extra_body": {"temperature": 0}}
    messages: Any = [{"role": "user", "content": QUESTION}]
    whole = client.messages.create(**arguments, messages=messages, system=FACTS)
    assert [block.to_dict() for block in whole.content] == [{"type": "text", "text": ANSWER}]
    counted = client.messages.count_tokens(model=MODEL, messages=messages, system=FACTS)
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    messages += [{"role": "assistant", "content": whole.content}, {"role": "user", "content": FOLLOW_UP}]
    with client.messages.stream(**arguments, messages=messages, system=FACTS) as stream:
        assert stream.get_final_text() == FOLLOWED_UP
    tools: Any = [{"name": "get_weather", "description": FUNCTION["description"], "input_schema": PARAMETERS}]
    messages = [{"role": "user", "content": WEATHER}]
    with client.messages.stream(**arguments, messages=messages, tools=tools) as stream:
        called = stream.get_final_message()
    (block,) = called.content
    assert called.stop_reason == "tool_use"
    assert block.type == "tool_use"
    assert (block.name, block.input) == ("get_weather", {"city": "Tamrin"})
    result = {"type": "tool_result", "tool_use_id": block.id, "content": RESULT}
    messages += [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    told = client.messages.create(**arguments, messages=messages, tools=tools)
    assert told.content[0].to_dict()["text"] == TOLD
    formed = client.messages.create(
        **arguments,
        messages=[{"role": "user", "content": WEATHER}],
        output_config={"format": {"type": "json_schema", "schema": PLACE}},
    )
    assert Place.model_validate_json(formed.content[0].to_dict()["text"])
    parsed = client.messages.parse(**arguments, messages=[{"role": "user", "content": WEATHER}], output_format=Place)
    assert isinstance(parsed.parsed_output, Place)


def test_anthropics_cache_control(url: str) -> None:
    """What one request marks is read by the next, to the token, and counted as Anthropic counts it."""
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    system: Any = [{"type": "text", "text": f"Cached. {FACTS}", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]

    def usage(question: str) -> tuple[int, int, int, int, int]:
        with client.messages.stream(
            model=MODEL, max_tokens=20, system=system, messages=[{"role": "user", "content": question}]
        ) as stream:
            final = stream.get_final_message()
        used, counted = (
            final.usage,
            client.messages.count_tokens(model=MODEL, system=system, messages=[{"role": "user", "content": question}]),
        )
        created = used.cache_creation_input_tokens or 0
        assert used.cache_creation is not None
        assert used.cache_creation.ephemeral_1h_input_tokens == created
        return (counted.input_tokens, used.input_tokens, created, used.cache_read_input_tokens or 0, used.output_tokens)

    total, left, created, read, _ = usage(QUESTION)
    assert (total, read) == (left + created + read, read)
    assert created > 20
    marked = created + read
    total, left, created, read, _ = usage(FOLLOW_UP)
    assert total == left + created + read
    assert created == 0
    assert read >= marked


def test_ollama(url: str) -> None:
    client = ollama.Client(host=url)
    greedy: Any = {"temperature": 0}
    messages: Any = [{"role": "system", "content": FACTS}, {"role": "user", "content": QUESTION}]
    whole = client.chat(model=MODEL, messages=messages, options=greedy)
    assert whole.message.content == ANSWER
    messages += [whole.message, {"role": "user", "content": FOLLOW_UP}]
    lines = client.chat(model=MODEL, messages=messages, options=greedy, stream=True)
    assert "".join(line.message.content or "" for line in lines) == FOLLOWED_UP
    messages = [{"role": "user", "content": WEATHER}]
    called = client.chat(model=MODEL, messages=messages, tools=TOOLS, options=greedy)
    assert called.message.tool_calls is not None
    assert called.message.tool_calls[0].function.arguments == {"city": "Tamrin"}
    messages += [called.message, {"role": "tool", "tool_name": "get_weather", "content": RESULT}]
    assert client.chat(model=MODEL, messages=messages, tools=TOOLS, options=greedy).message.content == TOLD
    lines = client.chat(model=MODEL, messages=messages[:1], tools=TOOLS, options=greedy, stream=True)
    calls = [call for line in lines for call in line.message.tool_calls or []]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("get_weather", {"city": "Tamrin"})]
    formed = client.chat(model=MODEL, messages=messages[:1], format=PLACE, options=greedy)
    assert Place.model_validate_json(formed.message.content or "")
    generated = client.generate(model=MODEL, system=FACTS, prompt=QUESTION, options=greedy)
    assert generated.response == ANSWER
    formed_too = client.generate(model=MODEL, prompt=WEATHER, format=PLACE, options=greedy, think=False)
    assert Place.model_validate_json(formed_too.response)
    with pytest.raises(ollama.ResponseError, match="degrees of reasoning"):
        client.chat(model=MODEL, messages=messages[:1], think="high")
    assert [model.model for model in client.list().models] == [MODEL]


def test_vectors(url: str) -> None:
    """Every client that has embeddings gets the same ones."""
    by_openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    vectors = [one.embedding for one in by_openai.embeddings.create(model=MODEL, input=[FACTS, QUESTION, FACTS]).data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert sum(value * value for value in vectors[1]) == pytest.approx(1, abs=1e-5)
    by_ollama = ollama.Client(host=url).embed(model=MODEL, input=[FACTS, QUESTION])
    assert [list(vector) for vector in by_ollama.embeddings] == vectors[:2]
    chain = OpenAIEmbeddings(model=MODEL, base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)  # type: ignore[arg-type]
    assert chain.embed_query(QUESTION) == vectors[1]
    by_hub = InferenceClient(token="none").feature_extraction([FACTS, QUESTION], model=f"{url}/embed")
    assert by_hub.ravel().tolist() == pytest.approx(vectors[0] + vectors[1])


def test_rerank(url: str) -> None:
    """Cohere's client, and what it says by hand; Jina's form of the same."""
    documents = ["Bread is baked at night.", QUESTION, "A gate."]
    ranked = cohere.ClientV2(api_key="none", base_url=url).rerank(
        model=MODEL, query=QUESTION, documents=documents, top_n=2
    )
    assert len(ranked.results) == 2
    assert ranked.results[0].index == 1
    body = {"model": MODEL, "query": QUESTION, "documents": documents}
    plain = httpx.post(f"{url}/v1/rerank", json=body).json()
    assert [result["relevance_score"] for result in plain["results"][:2]] == [
        result.relevance_score for result in ranked.results
    ]
    assert {"model", "usage"} <= plain.keys()


def test_huggingface_hub(url: str) -> None:
    client = InferenceClient(model=url, token="none")
    prompt = "Once upon a time"
    whole = client.text_generation(prompt, max_new_tokens=20, details=True)
    events = list(client.text_generation(prompt, max_new_tokens=20, details=True, stream=True))
    assert events[-1].generated_text == whole.generated_text == "".join(event.token.text for event in events)
    chat = InferenceClient(base_url=f"{url}/v1", token="none")
    messages = [{"role": "system", "content": FACTS}, {"role": "user", "content": QUESTION}]
    answer = chat.chat_completion(messages, model=MODEL, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    chunks = chat.chat_completion(messages, model=MODEL, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    called = chat.chat_completion([{"role": "user", "content": WEATHER}], model=MODEL, temperature=0, tools=TOOLS)
    call = called.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Tamrin"})
    told = chat.chat_completion(
        [
            {"role": "user", "content": WEATHER},
            {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": {
                "name": call.function.name, "arguments": call.function.arguments}}]},
            {"role": "tool", "tool_call_id": call.id, "content": RESULT},
        ],
        model=MODEL, temperature=0, tools=TOOLS,
    )  # fmt: skip
    assert told.choices[0].message.content == TOLD
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    formed = chat.chat_completion([{"role": "user", "content": WEATHER}], model=MODEL, response_format=wanted)
    assert Place.model_validate_json(formed.choices[0].message.content or "")
    regex: Any = {"type": "regex", "value": "[0-9]{4}"}
    assert re.fullmatch("[0-9]{4}", client.text_generation(prompt, max_new_tokens=20, grammar=regex))


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city"""
    return RESULT


def test_langchain(url: str) -> None:
    llm = ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", temperature=0, max_retries=0)  # type: ignore[arg-type]
    assert llm.invoke([("system", FACTS), ("user", QUESTION)]).content == ANSWER
    assert "".join(str(chunk.content) for chunk in llm.stream([("system", FACTS), ("user", QUESTION)])) == ANSWER
    with_tools = llm.bind_tools(TOOLS)
    called = with_tools.invoke([HumanMessage(WEATHER)])
    assert called.tool_calls[0]["args"] == {"city": "Tamrin"}
    result = ToolMessage(get_weather.invoke(called.tool_calls[0]["args"]), tool_call_id=called.tool_calls[0]["id"])
    assert with_tools.invoke([HumanMessage(WEATHER), called, result]).content == TOLD
    chunks = with_tools.stream([HumanMessage(WEATHER)])
    whole = next(chunks)
    for chunk in chunks:
        whole += chunk
    assert whole.tool_calls[0]["args"] == {"city": "Tamrin"}
    for method in ("json_schema", "function_calling"):
        assert isinstance(llm.with_structured_output(Place, method=method).invoke(WEATHER), Place)
