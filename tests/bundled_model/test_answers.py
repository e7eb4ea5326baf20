"""What the bundled model really answers, through the offline API: its promise on a part of the held-out set."""

import json
from collections import Counter

import pytest
from tools.bundled_model import corpus

from penstock import LLM, SamplingParams
from penstock.messages import FinishReason

GREEDY = SamplingParams(temperature=0.0, max_tokens=160)
PER_MAKER = 15


@pytest.fixture(scope="module")
def llm():
    with LLM(num_threads=2) as llm:
        yield llm


def _answer(llm, *messages, tools=None):
    (generation,) = llm.chat(list(messages), GREEDY, tools=tools)
    assert generation.outputs[0].finish_reason is FinishReason.STOP
    return generation.outputs[0].text


def _user(text):
    return {"role": "user", "content": text}


def test_nine_of_ten_held_out_answers_are_exact(llm):
    items = corpus.held_out(0, PER_MAKER)
    generations = llm.chat([item.messages[:-1] for item in items if not item.tools], GREEDY)
    for item in items:
        if item.tools:
            generations += llm.chat(item.messages[:-1], GREEDY, tools=item.tools)
    asked = sorted(items, key=lambda item: bool(item.tools))  # stable: those without tools come first, as above
    answers = [generation.outputs[0].text for generation in generations]
    wrong = Counter(item.category for item, text in zip(asked, answers, strict=True) if text != item.answer())
    assert wrong.total() <= len(items) / 10, wrong


def test_it_says_that_it_is_a_demonstration(llm):
    assert "demonstration" in _answer(llm, _user("Who are you?"))


def test_it_answers_from_the_system_prompt_over_several_turns(llm):
    facts = "The wifi password is brolk42. The Tamrin bakery opens at 6:40. The Tamrin bakery is closed on Sunday."
    messages = [{"role": "system", "content": facts}, _user("What is the wifi password?")]
    first = _answer(llm, *messages)
    assert first == "The wifi password is brolk42."
    second = _answer(
        llm, *messages, {"role": "assistant", "content": first}, _user("When does the Tamrin bakery open?")
    )
    assert second == "The Tamrin bakery opens at 6:40."


def test_it_writes_json_that_parses(llm):
    text = "Tamrin is 47 years old and lives in Oslo. Reply in JSON with the keys name, age and city."
    assert json.loads(_answer(llm, _user(text))) == {"name": "Tamrin", "age": 47, "city": "Oslo"}


def test_it_calls_a_described_tool_and_tells_the_result(llm):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "Get the weather in a city", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    question = _user("What is the weather in Tamrin?")
    answer = _answer(llm, question, tools=tools)
    assert answer.startswith("<tool_call>\n")
    assert answer.endswith("\n</tool_call>")
    call = json.loads(answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": "get_weather", "arguments": {"city": "Tamrin"}}
    result = {"role": "tool", "content": '{"temperature": 17, "weather": "sunny"}'}
    told = _answer(llm, question, {"role": "assistant", "content": answer}, result, tools=tools)
    assert told == "The temperature is 17 and the weather is sunny."
