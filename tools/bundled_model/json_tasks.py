"""Requests for JSON: named keys, in a given order, filled from a text."""

from __future__ import annotations

import json
from collections.abc import Callable

from tools.bundled_model.chat import Conversation, assistant, system, user
from tools.bundled_model.values import COLOURS, DAYS, GOODS, JOBS, Values

JsonValue = str | int | float


def _number(text: str) -> JsonValue:
    return float(text) if "." in text else int(text)


def _integer(low: int, high: int) -> Callable[[Values], JsonValue]:
    return lambda values: int(values.number(low, high))


# key: (draw, clauses about the person or thing)
_PERSON: dict[str, tuple[Callable[[Values], JsonValue], tuple[str, ...]]] = {
    "age": (_integer(10, 120), ("is {v} years old", "has the age {v}")),
    "city": (Values.place, ("lives in {v}", "comes from {v}", "is from {v}")),
    "job": (lambda v: v.pick(JOBS) if v.rng.random() < 0.6 else v.word(), ("works as a {v}", "is a {v}")),
    "colour": (
        lambda v: v.pick(COLOURS) if v.rng.random() < 0.6 else v.word(),
        ("likes the colour {v}", "loves {v} things"),
    ),
    "email": (Values.email, ("reads mail at {v}", "has the email {v}")),
    "phone": (_integer(100, 999999), ("has the phone number {v}", "answers the phone at {v}")),
    "friend": (Values.name, ("has a friend called {v}", "knows {v}")),
}
_ORDER: dict[str, tuple[Callable[[Values], JsonValue], tuple[str, ...]]] = {
    "price": (lambda v: _number(v.price()), ("costs {v} crowns", "is sold for {v} crowns")),
    "quantity": (_integer(2, 99), ("comes in packs of {v}", "is counted {v} times")),
    "colour": (
        lambda v: v.pick(COLOURS) if v.rng.random() < 0.6 else v.word(),
        ("is {v} in colour", "has a {v} colour"),
    ),
    "shop": (Values.name, ("is sold at {v}", "can be had at {v}")),
    "day": (lambda v: v.pick(DAYS), ("comes on {v}", "arrives on {v}")),
    "size": (_integer(10, 999), ("has the size {v}", "is {v} long")),
}
_REQUESTS = (
    "Reply in JSON with the keys {keys}.",
    "Reply in JSON with keys {keys}.",
    "Answer in JSON with the keys {keys}.",
    "Give me JSON with {keys}.",
    "Return a JSON object with the keys {keys}.",
    "Write this as JSON with the keys {keys}.",
    "Extract {keys} as JSON.",
    "Output JSON: {keys}.",
)


def _listed(keys: list[str], values: Values) -> str:
    style = values.rng.random()
    if style < 0.3:
        return ", ".join(keys)
    if style < 0.4:
        return ", ".join(f'"{key}"' for key in keys)
    return ", ".join(keys[:-1]) + " and " + keys[-1] if len(keys) > 1 else keys[0]


def _prose(values: Values) -> tuple[str, dict[str, JsonValue]]:
    """A sentence or two about one person or thing, and its record."""
    rng = values.rng
    person = rng.random() < 0.6
    subject_key = "name" if person else "item"
    subject = values.person() if person else (values.pick(GOODS) if rng.random() < 0.5 else values.word())
    table = _PERSON if person else _ORDER
    record: dict[str, JsonValue] = {subject_key: subject}
    clauses = []
    for key in rng.sample(sorted(table), rng.randint(1, 4)):
        draw, wordings = table[key]
        record[key] = draw(values)
        clauses.append(values.pick(wordings).format(v=record[key]))
    start = subject if person else f"The {subject}"
    if len(clauses) > 1 and rng.random() < 0.5:
        text = f"{start} {', '.join(clauses[:-1])} and {clauses[-1]}."
    else:
        text = (
            f"{start} "
            + (" and " if rng.random() < 0.4 else f". {'It' if not person else 'This person'} ").join(clauses)
            + "."
        )
    return text, record


def _pairs(values: Values) -> tuple[str, dict[str, JsonValue]]:
    """`key: value` text with any keys, and its record."""
    rng = values.rng
    known = (
        "name",
        "city",
        "age",
        "price",
        "title",
        "date",
        "code",
        "room",
        "street",
        "country",
        "email",
        "phone",
        "item",
    )
    keys = values.distinct(lambda: values.pick(known) if rng.random() < 0.5 else values.word(), rng.randint(1, 5))
    record: dict[str, JsonValue] = {}
    for key in keys:
        record[key] = (
            _number(values.price())
            if rng.random() < 0.25
            else int(values.number())
            if rng.random() < 0.25
            else _text(values)
        )
    style = rng.choice(("{k}: {v}", "{k}: {v}", "The {k} is {v}.", "{k} = {v}"))
    glue = " " if style.endswith(".") else rng.choice((", ", "\n", "; "))
    return glue.join(style.format(k=key, v=value) for key, value in record.items()), record


def _text(values: Values) -> str:
    return values.rng.choice((values.name, values.name, values.word, values.person))()


def json_record(values: Values) -> Conversation:
    """Some keys of a text as one JSON object."""
    rng = values.rng
    text, record = (_pairs if rng.random() < 0.4 else _prose)(values)
    keys = rng.sample(list(record), rng.randint(1, len(record)))
    request = values.pick(_REQUESTS).format(keys=_listed(keys, values))
    answer = json.dumps({key: record[key] for key in keys}, ensure_ascii=False)
    style = rng.random()
    if style < 0.35:
        messages = [user(f"{text}{rng.choice((' ', chr(10)))}{request}")]
    elif style < 0.55:
        messages = [user(f"{request}{rng.choice((' ', chr(10)))}{text}")]
    elif style < 0.8:
        messages = [system(request), user(text)]
    else:
        messages = [system(text), user(request)]
    return Conversation("json", [*messages, assistant(answer)])
