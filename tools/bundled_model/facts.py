"""Questions whose answers stand in the prompt: facts about made-up people, places and things, with unseen values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.bundled_model.chat import Conversation, assistant, system, user
from tools.bundled_model.values import COLOURS, DAYS, GOODS, JOBS, MONTHS, Values, words
from tools.bundled_model.world import UNKNOWN


@dataclass(frozen=True)
class Attribute:
    """One thing that can be said of a subject `{x}` with a value `{v}`."""

    key: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    draw: Callable[[Values], str]


def _words(options: list[str]) -> Callable[[Values], str]:
    return lambda values: values.pick(options) if values.rng.random() < 0.6 else values.word()


PLACE = [
    Attribute(
        "opens",
        ("{x} opens at {v}.", "{x} is open from {v}."),
        ("When does {x} open?", "What time does {x} open?", "At what time does {x} open?"),
        "{x} opens at {v}.",
        Values.clock,
    ),
    Attribute(
        "closes",
        ("{x} closes at {v}.", "{x} is open until {v}."),
        ("When does {x} close?", "What time does {x} close?", "Until when is {x} open?"),
        "{x} closes at {v}.",
        Values.clock,
    ),
    Attribute(
        "closed",
        ("{x} is closed on {v}.", "On {v} {x} is closed."),
        ("On which day is {x} closed?", "When is {x} closed?", "Which day is {x} closed?"),
        "{x} is closed on {v}.",
        lambda values: values.pick(DAYS),
    ),
    Attribute(
        "owner",
        ("{x} belongs to {v}.", "The owner of {x} is {v}.", "{v} owns {x}."),
        ("Who owns {x}?", "Who is the owner of {x}?", "To whom does {x} belong?"),
        "{x} belongs to {v}.",
        Values.person,
    ),
    Attribute(
        "street",
        ("{x} is in {v} Street.", "You find {x} in {v} Street."),
        ("Where is {x}?", "In which street is {x}?", "Where do I find {x}?"),
        "{x} is in {v} Street.",
        Values.name,
    ),
    Attribute(
        "phone",
        ("The phone number of {x} is {v}.", "Call {x} at {v}."),
        ("What is the phone number of {x}?", "How can I call {x}?", "Which number do I call for {x}?"),
        "The phone number of {x} is {v}.",
        lambda values: values.number(1000, 999999),
    ),
    Attribute(
        "year",
        ("{x} was built in {v}.", "{x} dates from {v}."),
        ("When was {x} built?", "In which year was {x} built?", "How old is {x}?"),
        "{x} was built in {v}.",
        lambda values: values.number(1100, 2030),
    ),
    Attribute(
        "sells",
        ("{x} sells {v}.", "At {x} you can buy {v}."),
        ("What does {x} sell?", "What can I buy at {x}?"),
        "{x} sells {v}.",
        _words(GOODS),
    ),
    Attribute(
        "ticket",
        ("A ticket for {x} costs {v} crowns.", "Tickets for {x} are {v} crowns."),
        ("How much is a ticket for {x}?", "What does a ticket for {x} cost?"),
        "A ticket for {x} costs {v} crowns.",
        Values.price,
    ),
    Attribute(
        "door",
        ("The door of {x} is {v}.", "{x} has a {v} door."),
        ("What colour is the door of {x}?", "Which colour does the door of {x} have?"),
        "The door of {x} is {v}.",
        _words(COLOURS),
    ),
]
PERSON = [
    Attribute(
        "age",
        ("{x} is {v} years old.", "The age of {x} is {v}."),
        ("How old is {x}?", "What is the age of {x}?"),
        "{x} is {v} years old.",
        lambda values: values.number(10, 120),
    ),
    Attribute(
        "city",
        ("{x} lives in {v}.", "The home of {x} is {v}."),
        ("Where does {x} live?", "In which city does {x} live?", "Where is {x} at home?"),
        "{x} lives in {v}.",
        Values.place,
    ),
    Attribute(
        "job",
        ("{x} works as a {v}.", "{x} is a {v}."),
        ("What is the job of {x}?", "What does {x} do for a living?", "What does {x} work as?"),
        "{x} works as a {v}.",
        _words(JOBS),
    ),
    Attribute(
        "colour",
        ("{x} likes the colour {v}.", "The favourite colour of {x} is {v}."),
        ("What is the favourite colour of {x}?", "Which colour does {x} like?"),
        "The favourite colour of {x} is {v}.",
        _words(COLOURS),
    ),
    Attribute(
        "birthday",
        ("{x} was born on {v}.", "The birthday of {x} is {v}."),
        ("When was {x} born?", "When is the birthday of {x}?"),
        "{x} was born on {v}.",
        lambda values: f"{values.rng.randint(1, 28)} {values.pick(MONTHS)}",
    ),
    Attribute(
        "pet",
        ("{x} has a dog called {v}.", "The dog of {x} is called {v}."),
        ("What is the dog of {x} called?", "What is the name of the dog of {x}?"),
        "The dog of {x} is called {v}.",
        Values.name,
    ),
    Attribute(
        "friend",
        ("{x} is a friend of {v}.", "The best friend of {x} is {v}."),
        ("Who is the best friend of {x}?", "Who is a friend of {x}?"),
        "The best friend of {x} is {v}.",
        Values.name,
    ),
    Attribute(
        "email",
        ("The email of {x} is {v}.", "Write to {x} at {v}."),
        ("What is the email of {x}?", "How can I write to {x}?"),
        "The email of {x} is {v}.",
        Values.email,
    ),
]
_KINDS = words(
    "bakery inn museum library school mill shop hotel station theatre garden tower church harbour market pool"
)
_KEYS = [
    key.replace("-", " ")
    for key in words(
        "password wifi-password room-number door-code code-word secret-word price address city order-number "
        "name-of-the-boat ticket-number total meeting-place start-time winner captain colour-of-the-flag "
        "name-of-the-street size weight phone-number name-of-the-king capital river teacher weather temperature "
        "speed distance answer secret-number currency best-dish soup-of-the-day song key next-train platform seat "
        "gate language deadline version discount"
    )
]
_OPENINGS = (
    "You are a helpful assistant.",
    "You answer questions of visitors.",
    "Answer from these facts.",
    "Use these facts.",
    "Here are some facts.",
    "You know the following.",
    "Facts:",
    "Answer the questions of the user.",
    "You work at a hotel.",
)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Fact:
    """A statement, the wordings that ask for it and its answer."""

    statement: str
    questions: tuple[str, ...]
    answer: str


def _of(attribute: Attribute, subject: str, values: Values) -> Fact:
    value = attribute.draw(values)
    statement = values.pick(attribute.statements).format(x=subject, v=value)
    questions = tuple(_capital(question.format(x=subject)) for question in attribute.questions)
    return Fact(_capital(statement), questions, _capital(attribute.answer.format(x=subject, v=value)))


def _subjects(values: Values) -> list[tuple[str, list[Attribute]]]:
    subjects: list[tuple[str, list[Attribute]]] = []
    for name in values.distinct(values.name, values.rng.choice((1, 1, 2, 2, 3))):
        if values.rng.random() < 0.5:
            kind = values.pick(_KINDS)
            subject = values.pick((f"the {name} {kind}", f"the {kind}", f"the {kind} of {name}"))
            if subject not in [other for other, _ in subjects]:
                subjects.append((subject, PLACE))
        else:
            subjects.append((name, PERSON))
    return subjects


def _subject_facts(values: Values) -> tuple[list[Fact], list[Fact]]:
    """Facts that are told, and facts of the same subjects that are not."""
    told: list[Fact] = []
    untold: list[Fact] = []
    for subject, attributes in _subjects(values):
        chosen = values.rng.sample(attributes, values.rng.randint(1, 4))
        told += [_of(attribute, subject, values) for attribute in chosen]
        # Two attributes whose questions overlap ("How old is the mill?") never make an untold fact of each other.
        rest = [attribute for attribute in attributes if attribute not in chosen]
        untold.append(_of(values.rng.choice(rest), subject, values))
    return told, untold


def _keyed_facts(values: Values) -> tuple[list[Fact], list[Fact]]:
    """`key: value` facts with any key; the last key is not told."""
    rng = values.rng
    keys = values.distinct(lambda: values.pick(_KEYS) if rng.random() < 0.7 else values.word(), rng.randint(2, 7))
    style = rng.choice(("The {k} is {v}.", "The {k} is {v}.", "{k}: {v}", "{k} = {v}", "- {k}: {v}"))
    facts = []
    for key in keys:
        value = values.anything()
        statement = style.format(k=key, v=value)
        questions = (
            f"What is the {key}?",
            f"What is the {key}?",
            f"Tell me the {key}.",
            f"Do you know the {key}?",
            f"What's the {key}?",
        )
        facts.append(
            Fact(_capital(statement) if rng.random() < 0.7 else statement, questions, f"The {key} is {value}.")
        )
    return facts[:-1], facts[-1:]


def facts(values: Values) -> Conversation:
    """Facts in the system prompt (or the first question), and one to five questions about them."""
    rng = values.rng
    told, untold = (_keyed_facts if rng.random() < 0.4 else _subject_facts)(values)
    rng.shuffle(told)
    lines = rng.choice((" ", " ", "\n")).join(fact.statement for fact in told)
    if ":" in told[0].statement or "=" in told[0].statement:
        lines = "\n".join(fact.statement for fact in told)
    asked = rng.sample(told, min(len(told), rng.randint(1, 5)))
    turns = [(values.pick(fact.questions), fact.answer) for fact in asked]
    if rng.random() < 0.15:
        turns.insert(rng.randint(0, len(turns)), (values.pick(untold[0].questions), UNKNOWN))
    messages = []
    if rng.random() < 0.75:
        opening = values.pick(_OPENINGS)
        messages.append(system(opening + rng.choice((" ", "\n")) + lines if rng.random() < 0.9 else lines))
    else:
        turns[0] = (lines + rng.choice((" ", "\n")) + turns[0][0], turns[0][1])
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
    return Conversation("facts", messages)


def persona(values: Values) -> Conversation:
    """A name and a place given to the assistant by the system prompt."""
    name, place = values.name(), values.place()
    kind = values.pick(_KINDS)
    prompt = values.pick(
        (
            f"You are {name}, the assistant of the {place} {kind}.",
            f"Your name is {name}. You work at the {place} {kind}.",
            f"You are {name} from the {place} {kind}.",
        )
    )
    turns = [
        (values.pick(("What is your name?", "Who are you?", "What's your name?")), f"My name is {name}."),
        (
            values.pick(("Where do you work?", "Where are you from?", "Which place is this?")),
            f"I work at the {place} {kind}.",
        ),
        (values.pick(("Hello", "Hello!", "Hi", "Hi!", "Hi there")), "Hello! How can I help you?"),
    ]
    messages = [system(prompt)]
    for question, answer in values.rng.sample(turns, values.rng.randint(1, 3)):
        messages += [user(question), assistant(answer)]
    return Conversation("persona", messages)
