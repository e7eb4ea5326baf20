"""Tool use in the Hermes manner: choose among described functions, fill the arguments, answer from the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.bundled_model.chat import Conversation, Message, assistant, system, user
from tools.bundled_model.values import GOODS, Values
from tools.bundled_model.world import TALK


@dataclass(frozen=True)
class Slot:
    """One parameter: the names that it may bear, its JSON type and its values."""

    names: tuple[str, ...]
    kind: str
    draw: Callable[[Values], str | int]


@dataclass(frozen=True)
class Skill:
    """What a function can do: names, descriptions, parameters and wordings that ask for it."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    slots: tuple[Slot, ...]
    requests: tuple[str, ...]
    results: tuple[str, ...]


def _integer(low: int, high: int) -> Callable[[Values], int]:
    return lambda values: int(values.number(low, high))


_CITY = Slot(("city", "location", "place", "town"), "string", Values.place)
_PERSON = Slot(("name", "person", "to", "recipient"), "string", Values.name)
SKILLS = [
    Skill(
        ("get_weather", "weather", "current_weather", "get_current_weather", "fetch_weather"),
        ("Get the weather in a city", "Get the current weather", "Weather of a place"),
        (_CITY,),
        (
            "What is the weather in {0}?",
            "How is the weather in {0}?",
            "Is it raining in {0}?",
            "Weather in {0}, please.",
            "What's the weather like in {0}?",
            "How warm is it in {0}?",
            "What is the weather like in {0} today?",
        ),
        ("temperature", "weather", "wind"),
    ),
    Skill(
        ("get_time", "current_time", "time_in", "clock"),
        ("Get the time in a city", "Tell the local time"),
        (_CITY,),
        ("What time is it in {0}?", "Tell me the time in {0}.", "What is the time in {0}?"),
        ("time",),
    ),
    Skill(
        ("get_population", "population"),
        ("Get the population of a city", "Count the people of a place"),
        (_CITY,),
        ("How many people live in {0}?", "What is the population of {0}?"),
        ("population", "year"),
    ),
    Skill(
        ("call_person", "phone", "make_call"),
        ("Call a person", "Make a phone call"),
        (_PERSON,),
        ("Call {0}.", "Please call {0}.", "Can you phone {0}?"),
        ("status",),
    ),
    Skill(
        ("add", "add_numbers", "sum"),
        ("Add two numbers",),
        (
            Slot(("a", "x", "first"), "integer", _integer(2, 9999)),
            Slot(("b", "y", "second"), "integer", _integer(2, 9999)),
        ),
        ("What is {0} plus {1}?", "What is {0} + {1}?", "Add {0} and {1}."),
        ("result", "sum"),
    ),
    Skill(
        ("multiply", "multiply_numbers", "product"),
        ("Multiply two numbers",),
        (
            Slot(("a", "x", "first"), "integer", _integer(2, 9999)),
            Slot(("b", "y", "second"), "integer", _integer(2, 9999)),
        ),
        ("What is {0} times {1}?", "What is {0} * {1}?", "Multiply {0} by {1}."),
        ("result", "product"),
    ),
    Skill(
        ("book_room", "reserve_room", "book_hotel"),
        ("Book a hotel room", "Reserve a room"),
        (_CITY, Slot(("nights", "days"), "integer", _integer(2, 60))),
        (
            "Book a room in {0} for {1} nights.",
            "I need a hotel room in {0} for {1} nights.",
            "Reserve a room in {0} for {1} nights.",
        ),
        ("room", "price", "hotel"),
    ),
    Skill(
        ("send_message", "send_text", "message"),
        ("Send a message to a person", "Send a text message"),
        (_PERSON, Slot(("text", "message", "body"), "string", lambda values: f"{values.word()} {values.word()}")),
        ('Send "{1}" to {0}.', "Send {0} the message: {1}", 'Tell {0} "{1}".'),
        ("status", "time"),
    ),
    Skill(
        ("find_train", "search_trains", "next_train"),
        ("Find a train between two cities", "Find the next train"),
        (
            Slot(("from", "origin", "start"), "string", Values.place),
            Slot(("to", "destination", "end"), "string", Values.place),
        ),
        ("Find a train from {0} to {1}.", "When is the next train from {0} to {1}?", "I want to go from {0} to {1}."),
        ("time", "platform", "price"),
    ),
    Skill(
        ("order_item", "buy", "place_order"),
        ("Order an item from the shop", "Buy goods"),
        (
            Slot(("item", "product", "what"), "string", lambda v: v.pick(GOODS) if v.rng.random() < 0.5 else v.word()),
            Slot(("quantity", "count", "amount"), "integer", _integer(2, 99)),
        ),
        ("Order {1} {0}.", "Buy {1} {0}.", "I want {1} {0}.", "Please order {1} {0}."),
        ("total", "order"),
    ),
    Skill(
        ("get_price", "price", "look_up_price"),
        ("Get the price of an item", "Look up a price"),
        (Slot(("item", "product", "name"), "string", lambda v: v.pick(GOODS) if v.rng.random() < 0.5 else v.word()),),
        ("How much is the {0}?", "What does the {0} cost?", "What is the price of {0}?"),
        ("price", "currency"),
    ),
    Skill(
        ("set_timer", "timer", "start_timer"),
        ("Set a timer", "Start a timer in minutes"),
        (Slot(("minutes", "duration"), "integer", _integer(2, 240)),),
        ("Set a timer for {0} minutes.", "Wake me in {0} minutes.", "Start a timer of {0} minutes."),
        ("status", "end"),
    ),
    Skill(
        ("search", "web_search", "look_up"),
        ("Search the web", "Search for a text"),
        (Slot(("query", "text", "q"), "string", lambda values: f"{values.word()} {values.word()}"),),
        ("Search for {0}.", "Look up {0}.", "Search the web for {0}.", "Find {0} on the web."),
        ("result", "pages"),
    ),
]


@dataclass(frozen=True)
class Tool:
    """A skill with the names that this conversation gives it."""

    skill: Skill
    name: str
    parameters: tuple[str, ...]
    schema: dict[str, Any]


def _made_tool(values: Values, skill: Skill) -> Tool:
    rng = values.rng
    name = (
        values.pick(skill.names)
        if rng.random() < 0.75
        else f"{values.word()}_{values.word()}"
        if rng.random() < 0.5
        else values.word()
    )
    parameters = tuple(values.pick(slot.names) if rng.random() < 0.8 else values.word() for slot in skill.slots)
    properties: dict[str, Any] = {}
    for parameter, slot in zip(parameters, skill.slots, strict=True):
        properties[parameter] = {"type": slot.kind}
        if rng.random() < 0.25:
            properties[parameter]["description"] = f"The {slot.names[0]}"
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.7:
        schema["required"] = list(parameters)
    function = {"name": name, "description": values.pick(skill.descriptions), "parameters": schema}
    if rng.random() < 0.05:
        del function["description"]
    return Tool(skill, name, parameters, {"type": "function", "function": function})


def _call(tool: Tool, values: Values) -> tuple[str, Message]:
    """A request for `tool`, and the assistant's call."""
    arguments = [slot.draw(values) for slot in tool.skill.slots]
    request = values.pick(tool.skill.requests).format(*arguments)
    function = {"name": tool.name, "arguments": dict(zip(tool.parameters, arguments, strict=True))}
    return request, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _result(tool: Tool, values: Values) -> tuple[Message, Message]:
    """A tool's JSON result and the sentence that the assistant makes of it."""
    rng = values.rng
    if rng.random() < 0.15:
        text = values.anything()
        return {"role": "tool", "content": text}, assistant(f"The result is {text}.")
    keys = list(tool.skill.results) if rng.random() < 0.5 else values.distinct(values.word, rng.randint(1, 3))
    keys = rng.sample(keys, rng.randint(1, len(keys)))
    result: dict[str, str | int] = {
        key: int(values.number(2, 9999)) if rng.random() < 0.5 else values.anything() for key in keys
    }
    phrases = [f"the {key} is {value}" for key, value in result.items()]
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return {"role": "tool", "content": json.dumps(result, ensure_ascii=False)}, assistant(
        text[0].upper() + text[1:] + "."
    )


def _tools(values: Values) -> list[Tool]:
    count = values.rng.choice((1, 1, 1, 1, 2, 2, 2, 3))
    tools = [_made_tool(values, skill) for skill in values.rng.sample(SKILLS, count)]
    return tools if len({tool.name for tool in tools}) == count else tools[:1]


def _opening(values: Values) -> list[Message]:
    return (
        [system(values.pick(("You are a helpful assistant.", "Use the tools.", "Be brief.")))]
        if values.rng.random() < 0.4
        else []
    )


def tool_call(values: Values) -> Conversation:
    """One request that needs a function; now and then small talk that needs none comes first, or instead."""
    rng = values.rng
    tools = _tools(values)
    messages = _opening(values)
    if rng.random() < 0.2:
        answer, questions = rng.choice(TALK)
        messages += [user(values.pick(questions)), assistant(answer)]
        if rng.random() < 0.5:
            return Conversation("tool call", messages, [tool.schema for tool in tools])
    request, call = _call(rng.choice(tools), values)
    return Conversation("tool call", [*messages, user(request), call], [tool.schema for tool in tools])


def tool_answer(values: Values) -> Conversation:
    """A function's result, told in a sentence."""
    tools = _tools(values)
    tool = values.rng.choice(tools)
    request, call = _call(tool, values)
    response, answer = _result(tool, values)
    messages = [*_opening(values), user(request), call, response, answer]
    if values.rng.random() < 0.15:
        request, call = _call(values.rng.choice(tools), values)
        return Conversation("tool call", [*messages, user(request), call], [tool.schema for tool in tools])
    return Conversation("tool answer", messages, [tool.schema for tool in tools])
