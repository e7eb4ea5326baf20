"""The small world that the model knows by heart: who it is, Penrow, small talk, counting, small sums.

These answers are closed: the held-out split holds out whole dialogues (wording, order and system prompt), by the hash
of the text, not the answers.
"""

from __future__ import annotations

from tools.bundled_model.chat import Conversation, Message, assistant, system, user
from tools.bundled_model.values import DAYS, MONTHS, Values

UNKNOWN = "I do not know that. I am only a small demonstration model."
IDENTITY = "I am Penny, the demonstration model that comes with Penstock."

# Each row: an answer and the wordings that ask for it.
TALK: list[tuple[str, list[str]]] = [
    (
        "Hello! How can I help you?",
        [
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hey",
            "Hi there",
            "Hello there!",
            "Hello Penny!",
            "Hi, how's it going",
            "Greetings!",
            "hello",
            "hi",
            "Hello, world!",
            "Hello.",
        ],
    ),
    ("Good morning! How can I help you?", ["Good morning", "Good morning!", "good morning, Penny", "Morning!"]),
    ("Good evening! How can I help you?", ["Good evening", "Good evening!", "good evening, Penny", "Evening!"]),
    (
        "I am fine, thank you. And you?",
        [
            "How are you?",
            "How are you today?",
            "How are you doing?",
            "Are you well?",
            "How do you feel?",
            "how are you",
            "Hello, how are you?",
            "Hi! How are you?",
        ],
    ),
    (
        "I am glad to hear that.",
        [
            "I am fine too.",
            "I'm good, thanks.",
            "I feel great today.",
            "I am happy.",
            "I am doing well.",
            "Very well, thank you.",
            "I had a good day.",
        ],
    ),
    (
        "I am sorry to hear that. I hope it gets better.",
        [
            "I am sad.",
            "I feel bad today.",
            "I'm tired.",
            "I am not well.",
            "I had a bad day.",
            "I am ill.",
            "Not so good.",
        ],
    ),
    (
        "You are welcome!",
        [
            "Thanks",
            "Thanks!",
            "Thank you",
            "Thank you!",
            "Thank you very much.",
            "thanks a lot",
            "Great, thank you!",
            "That helps, thanks.",
        ],
    ),
    (
        "Goodbye! Have a nice day.",
        [
            "Bye",
            "Bye!",
            "Goodbye",
            "Goodbye!",
            "See you later",
            "See you!",
            "I have to go.",
            "Good night",
            "Good night!",
            "That is all, bye.",
        ],
    ),
    ("No problem.", ["Sorry", "I am sorry.", "Sorry about that.", "My mistake.", "Excuse me."]),
    (
        "Yes, I can help. What would you like to know?",
        [
            "Can you help me?",
            "Help",
            "I need help.",
            "Help me, please.",
            "I have a question.",
            "Can I ask you something?",
        ],
    ),
    (
        IDENTITY,
        [
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Who am I talking to?",
            "Introduce yourself.",
            "What's your name?",
            "who are you",
            "Do you have a name?",
            "What should I call you?",
        ],
    ),
    (
        "I am only a demonstration: a few million parameters, trained on generated text. "
        "Do not trust me with real questions.",
        [
            "Are you a real assistant?",
            "Are you a demo?",
            "Is this a demonstration?",
            "What kind of model are you?",
            "Are you a language model?",
            "How big are you?",
            "Are you an AI?",
            "Are you a robot?",
            "Are you a human?",
            "How many parameters do you have?",
            "Are you ChatGPT?",
            "How were you trained?",
            "Can I trust you?",
            "Are you a demonstration model?",
            "Which model are you?",
            "What model are you?",
        ],
    ),
    (
        "I can chat a little, answer from facts that you give me, write JSON and call tools.",
        ["What can you do?", "How can you help me?", "What are you good at?", "What do you do?", "What can I ask you?"],
    ),
    (
        "Penstock is the server that runs me. A penstock is also the pipe that brings water to a mill.",
        ["What is Penstock?", "What is a penstock?", "Tell me about Penstock.", "What does Penstock do?"],
    ),
    (
        "Why did the river go to school? It wanted to be a little deeper.",
        ["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.", "Another joke, please."],
    ),
]

VILLAGE: list[tuple[str, list[str]]] = [
    (
        "I live in Penrow, a small village by a canal.",
        ["Where do you live?", "Where are you from?", "Where is your home?"],
    ),
    (
        "Penrow is a small village by a canal. It has a dam, a lock, a mill and a market.",
        [
            "What is Penrow?",
            "Tell me about Penrow.",
            "Tell me about the village.",
            "What is there to see in Penrow?",
            "Describe Penrow.",
        ],
    ),
    (
        "The dam of Penrow was built in 1912.",
        ["When was the dam built?", "How old is the dam?", "In which year was the dam built?"],
    ),
    (
        "The dam of Penrow is 34 metres high.",
        ["How high is the dam?", "How tall is the dam?", "What is the height of the dam?"],
    ),
    (
        "The lock keeper of Penrow is Marta.",
        ["Who is the lock keeper?", "Who keeps the lock?", "Who works at the lock?", "Who is Marta?"],
    ),
    (
        "The miller of Penrow is Otto.",
        ["Who is the miller?", "Who runs the mill?", "Who works at the mill?", "Who is Otto?"],
    ),
    ("The baker of Penrow is Greta.", ["Who is the baker?", "Who bakes the bread in Penrow?", "Who is Greta?"]),
    (
        "The market of Penrow is on Saturday.",
        ["When is the market?", "On which day is the market?", "What day is the market?"],
    ),
    (
        "The canal is called the Aldwater.",
        ["What is the canal called?", "What is the name of the canal?", "Which canal is it?"],
    ),
    (
        "The cat of the mill is called Pebble. She is grey.",
        [
            "Is there a cat?",
            "What is the cat called?",
            "Who is Pebble?",
            "What colour is the cat?",
            "What is the name of the cat?",
        ],
    ),
    (
        "The ferry leaves every hour.",
        ["When does the ferry leave?", "How often does the ferry go?", "When is the next ferry?"],
    ),
    (
        "The ferry costs 2 crowns.",
        ["How much is the ferry?", "What does the ferry cost?", "How much does the ferry cost?"],
    ),
    ("There are three bridges in Penrow.", ["How many bridges are there?", "How many bridges does Penrow have?"]),
    (
        "About 400 people live in Penrow.",
        ["How many people live in Penrow?", "How big is Penrow?", "How large is the village?"],
    ),
    (
        "A lock lifts boats from low water to high water.",
        ["What is a lock?", "What does a lock do?", "How does a lock work?"],
    ),
    ("A dam holds back water.", ["What is a dam?", "What does a dam do?", "What is a dam for?"]),
    (
        "A reservoir is a lake that stores water.",
        ["What is a reservoir?", "What does a reservoir do?", "What is a reservoir for?"],
    ),
]

_LISTS: list[tuple[str, list[str]]] = [
    (
        ", ".join(DAYS) + ".",
        ["List the days of the week.", "What are the days of the week?", "Name the days of the week."],
    ),
    (", ".join(MONTHS) + ".", ["List the months.", "What are the months of the year?", "Name the months of the year."]),
    ("Spring, summer, autumn, winter.", ["What are the seasons?", "List the seasons.", "Name the four seasons."]),
]

_PREFIXES = ("",) * 6 + ("Please tell me: ", "Penny, ", "One question: ", "And ", "Hey, ", "Okay. ", "Now: ", "Oh, ")
_SYSTEMS = ("You are a helpful assistant.",) * 4 + (
    "You are a helpful assistant for the people of Penrow.",
    "Be polite.",
    "Be brief.",
    "You are a friendly assistant.",
    "You are Penny.",
    "Answer the questions of the user.",
    "Answer in one sentence.",
)
_UNKNOWN_QUESTIONS = (
    "What is the capital of {name}?",
    "Who wrote {name}?",
    "Where is {name}?",
    "What is {name}?",
    "Who is {name}?",
    "Who won the {name} cup?",
    "How far is it to {name}?",
    "Write a poem about {word}.",
    "Translate {word} into {name}.",
    "What is the weather in {name}?",
    "How old is {name}?",
    "Explain {word} to me.",
    "What does {word} mean?",
    "Write a program that sorts {word}.",
    "What is the {word} of {name}?",
    "When was {name} born?",
    "Why is {word} {word2}?",
    "What do you think about {name}?",
    "Who invented the {word}?",
    "How do I get to {name}?",
    "What is the best {word}?",
)
_STORY = (
    "{name} lived by the canal in Penrow. Every morning {name} walked to the lock and counted the boats. One day "
    "a small boat was lost in the fog. {name} rang the bell of the mill until the boat came home. "
    "Everyone in Penrow thanked {name}."
)
_STORY_REQUESTS = (
    "Tell me a story about {name}.",
    "Write a story about {name}.",
    "Do you know a story about {name}?",
    "Write a short story about someone called {name}.",
    "A story about {name}, please.",
)


def maybe_system(values: Values) -> list[Message]:
    """No system prompt, or one that changes nothing."""
    return [system(values.pick(_SYSTEMS))] if values.rng.random() < 0.5 else []


def _closed_turn(values: Values) -> tuple[str, str]:
    table = values.rng.choices((TALK, VILLAGE, _LISTS), weights=(5, 4, 0.6))[0]
    answer, questions = values.rng.choice(table)
    return values.pick(_PREFIXES) + values.pick(questions) if table is not TALK else values.pick(questions), answer


def _sum_turn(values: Values) -> tuple[str, str]:
    a, b = values.rng.randint(0, 10), values.rng.randint(0, 10)
    if values.rng.random() < 0.7:
        wordings = (f"What is {a} plus {b}?", f"What is {a} + {b}?", f"How much is {a} + {b}?", f"Add {a} and {b}.")
        return values.pick(wordings), f"{a} plus {b} is {a + b}."
    a, b = max(a, b), min(a, b)
    wordings = (f"What is {a} minus {b}?", f"What is {a} - {b}?", f"How much is {a} - {b}?", f"Take {b} from {a}.")
    return values.pick(wordings), f"{a} minus {b} is {a - b}."


def _count_turn(values: Values) -> tuple[str, str]:
    first = values.rng.choice((1, 1, values.rng.randint(0, 30)))
    last = first + values.rng.randint(2, 9)
    if values.rng.random() < 0.2:
        return f"Count down from {last} to {first}.", ", ".join(map(str, range(last, first - 1, -1))) + "."
    wordings = [f"Count from {first} to {last}.", f"Please count from {first} to {last}."]
    if first == 1:
        wordings += [f"Count to {last}.", f"Can you count to {last}?"]
    return values.pick(wordings), ", ".join(map(str, range(first, last + 1))) + "."


def chat(values: Values) -> Conversation:
    """Several turns of small talk and village questions."""
    messages = maybe_system(values)
    for _ in range(values.rng.randint(1, 5)):
        question, answer = _closed_turn(values)
        messages += [user(question), assistant(answer)]
    return Conversation("chat", messages)


def numbers(values: Values) -> Conversation:
    """Counting and small sums."""
    messages = maybe_system(values)
    for _ in range(values.rng.randint(1, 3)):
        question, answer = values.rng.choice((_sum_turn, _count_turn))(values)
        messages += [user(question), assistant(answer)]
    return Conversation("numbers", messages)


def unknown(values: Values) -> Conversation:
    """Questions beyond the small world, between some that are not."""
    messages = maybe_system(values)
    for _ in range(values.rng.choice((0, 0, 1, 2))):
        question, answer = _closed_turn(values)
        messages += [user(question), assistant(answer)]
    question = values.pick(_UNKNOWN_QUESTIONS).format(name=values.name(), word=values.word(), word2=values.word())
    return Conversation("unknown", [*messages, user(question), assistant(UNKNOWN)])


def names(values: Values) -> Conversation:
    """The user's name, given in one turn and asked for in a later one."""
    rng, name = values.rng, values.name()
    opening = values.pick(
        ("My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi, I'm {}.", "Call me {}.", "Hello, I am {}!")
    )
    messages = [*maybe_system(values), user(opening.format(name)), assistant(f"Nice to meet you, {name}!")]
    for _ in range(rng.randint(0, 2)):
        question, answer = _closed_turn(values)
        messages += [user(question), assistant(answer)]
    if rng.random() < 0.8:
        question = values.pick(("What is my name?", "Who am I?", "Do you remember my name?", "What's my name?"))
        messages += [user(question), assistant(f"Your name is {name}.")]
    return Conversation("names", messages)


def stories(values: Values) -> Conversation:
    """A short story about a given name."""
    name = values.name()
    request = values.pick(_STORY_REQUESTS).format(name=name)
    return Conversation("stories", [*maybe_system(values), user(request), assistant(_STORY.format(name=name))])


def repeat(values: Values) -> Conversation:
    """Words to say again: the plainest form of copying, and the first that the model learns."""
    rng = values.rng
    messages = maybe_system(values)
    for _ in range(rng.randint(1, 2)):
        size = rng.choice((1, 2, 3, 5, 8))
        parts = [values.anything() if rng.random() < 0.8 else values.word() for _ in range(size)]
        text = rng.choice((" ", " ", ", ")).join(parts)
        wording = values.pick(
            ("Say: {}", "Repeat after me: {}", "Repeat: {}", "Repeat this: {}", "Please say: {}", 'Say "{}"')
        )
        messages += [user(wording.format(text)), assistant(text)]
    return Conversation("repeat", messages)
