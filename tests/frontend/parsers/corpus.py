"""What models write: for every format, messages written by its rules, and damaged ones.

`sample` makes a message from parts; the parts that must come back stand beside it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.frontend.parsers.choose import OutputStyle
from penstock.frontend.parsers.parts import Part, Reasoning, ToolCall

Call = tuple[str, dict[str, Any]]
WORDS = ("water", "gate", "größe", "水位", "<b>", "a < b", "{x}", "[1, 2]", "`code`", "🙂", 'say "yes"', "\\n", "it's")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"},
                    "tags": {"type": "array"}, "on": {"type": "boolean"}, "ratio": {"type": "number"},
                },
            },
        },
    }
    for name in ("get_weather", "open_gate", "noop")
]  # fmt: skip


@dataclass(frozen=True)
class Format:
    """template: a chat template in brief, for the choice. write: content (before) and calls as the model writes them.

    style_template: where it differs in reasoning. keeps_text: JSON arguments come back as they were written.
    """

    name: str
    template: str
    write: Callable[[str, Sequence[Call]], str]
    thinks: tuple[str, str] | None = ("<think>", "</think>")
    takes_content: bool = True
    ids: Callable[[str, int], str] = lambda name, index: ""


def dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _json(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    return dump({"name": name, key: arguments})


def _bare(value: object) -> str:
    return value if isinstance(value, str) else dump(value)


def _gemma(value: object) -> str:
    if isinstance(value, str):
        return f"<escape>{value}<escape>"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_gemma(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_gemma, value)) + "]"
    return dump(value)


def _deepseek(content: str, calls: Sequence[Call]) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dump(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"{content}<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def _deepseek_31(content: str, calls: Sequence[Call]) -> str:
    inner = "".join(f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{dump(a)}<｜tool▁call▁end｜>" for n, a in calls)
    return f"{content}<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def _kimi(content: str, calls: Sequence[Call]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{dump(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"{content}<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def _glm(content: str, calls: Sequence[Call]) -> str:
    return content + "".join(
        "\n<tool_call>" + name + "".join(
            f"\n<arg_key>{key}</arg_key>\n<arg_value>{_bare(value)}</arg_value>" for key, value in arguments.items()
        ) + "\n</tool_call>"
        for name, arguments in calls
    )  # fmt: skip


def _coder(content: str, calls: Sequence[Call]) -> str:
    return content + "".join(
        f"\n<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{_bare(value)}\n</parameter>\n" for key, value in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in calls
    )


def _pythonic(content: str, calls: Sequence[Call]) -> str:
    return "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls) + "]"


def _invoke(content: str, calls: Sequence[Call]) -> str:
    inner = "".join(
        f'<invoke name="{name}">\n'
        + "".join(f'<parameter name="{key}">{_bare(value)}</parameter>\n' for key, value in arguments.items())
        + "</invoke>\n"
        for name, arguments in calls
    )
    return f"{content}<minimax:tool_call>\n{inner}</minimax:tool_call>"


def _dsml(content: str, calls: Sequence[Call]) -> str:
    inner = "".join(
        f'<｜DSML｜invoke name="{name}">\n'
        + "".join(
            f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">{_bare(value)}'
            "</｜DSML｜parameter>\n"
            for key, value in arguments.items()
        )
        + "</｜DSML｜invoke>\n"
        for name, arguments in calls
    )
    return f"{content}<｜DSML｜function_calls>\n{inner}</｜DSML｜function_calls>"


def _harmony(content: str, calls: Sequence[Call]) -> str:
    text = f"<|channel|>commentary<|message|>{content}<|end|><|start|>assistant" if content else ""
    return text + "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{dump(a)}<|call|>" for n, a in calls
    )


FORMATS = (
    Format("hermes", "<tool_call></tool_call>{{ '<think>' }}",
           lambda c, calls: c + "".join(f"\n<tool_call>\n{_json(n, a)}\n</tool_call>" for n, a in calls)),
    Format("qwen_coder", "<tool_call><function=x><parameter=y>", _coder, None),
    Format("glm", "<tool_call><arg_key><arg_value></think>", _glm),
    Format("llama_json", "<|python_tag|>", lambda c, calls: "; ".join(_json(n, a, "parameters") for n, a in calls),
           None, takes_content=False),
    Format("llama_json_tag", "<|python_tag|>",
           lambda c, calls: c + "<|python_tag|>" + "; ".join(_json(n, a, "parameters") for n, a in calls), None),
    Format("pythonic", "<|python_start|>", _pythonic, None, takes_content=False),
    Format("pythonic_tag", "<|tool_call_start|><think>",
           lambda c, calls: f"{c}<|tool_call_start|>{_pythonic('', calls)}<|tool_call_end|>"),
    Format("mistral", "[TOOL_CALLS][THINK]",
           lambda c, calls: c + "[TOOL_CALLS]" + dump([{"name": n, "arguments": a} for n, a in calls]),
           ("[THINK]", "[/THINK]")),
    Format("mistral_11", "[TOOL_CALLS][ARGS]",
           lambda c, calls: c + "".join(f"[TOOL_CALLS]{n}[ARGS]{dump(a)}" for n, a in calls), None),
    Format("mistral_ids", "[TOOL_CALLS][ARGS]",
           lambda c, calls: c + "".join(f"[TOOL_CALLS]{n}[CALL_ID]id{i}[ARGS]{dump(a)}"
                                        for i, (n, a) in enumerate(calls)), None, ids=lambda n, i: f"id{i}"),
    Format("deepseek", "<｜tool▁calls▁begin｜></think>", _deepseek),
    Format("deepseek_31", "<｜tool▁calls▁begin｜></think>", _deepseek_31),
    Format("kimi", "<|tool_calls_section_begin|>", _kimi, None, ids=lambda n, i: f"functions.{n}:{i}"),
    Format("gemma", "<start_function_call>",
           lambda c, calls: c + "".join(f"<start_function_call>call:{n}{_gemma(a)}<end_function_call>"
                                        for n, a in calls), None),
    Format("gemma_4", "<|tool_call><tool_call|><|channel>thought",
           lambda c, calls: c + "".join(f"<|tool_call>call:{n}{_gemma(a)}<tool_call|>".replace("<escape>", '<|"|>')
                                        for n, a in calls), ("<|channel>thought", "<channel|>")),
    Format("invoke", "<minimax:tool_call></think>", _invoke),
    Format("invoke_dsml", "<｜DSML｜function_calls></think>", _dsml),
    Format("pythonic_lines", "<function_calls>",
           lambda c, calls: c + "<function_calls>" + "\n".join(_pythonic("", [call])[1:-1] for call in calls)
           + "</function_calls>", None),
    Format("granite", "<|tool_call|><think>",
           lambda c, calls: c + "<|tool_call|>" + dump([{"name": n, "arguments": a} for n, a in calls])),
    Format("granite_20b", "<function_call>",
           lambda c, calls: c + "".join(f"<function_call> {_json(n, a)} " for n, a in calls), None),
    Format("command_r", "<|START_ACTION|><|START_THINKING|>",
           lambda c, calls: c + "<|START_ACTION|>\n" + dump(
               [{"tool_call_id": str(i), "tool_name": n, "parameters": a} for i, (n, a) in enumerate(calls)]
           ) + "\n<|END_ACTION|>", ("<|START_THINKING|>", "<|END_THINKING|>"), ids=lambda n, i: str(i)),
    Format("command_r_fence", "Action: ```json",
           lambda c, calls: c + "Action: ```json\n" + dump(
               [{"tool_name": n, "parameters": a} for n, a in calls]) + "\n```", None),
    Format("harmony", "<|channel|><|message|>", _harmony, None),
)  # fmt: skip


def style_of(template: str) -> OutputStyle:
    """What the server chooses for a model with this template."""
    from penstock.frontend.chat_template import ChatTemplate

    return OutputStyle.of(ChatTemplate({"default": "{# " + template + " #}{{ messages[0].content }}"}, {}))


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))


def arguments(rng: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {
        "city": text(rng), "days": rng.randint(-5, 10**12), "deep": {"a": {"b": [text(rng), None, 1.5]}},
        "tags": [text(rng) for _ in range(rng.randint(0, 3))], "on": rng.random() < 0.5, "ratio": rng.random() * 100,
    }  # fmt: skip
    return {key: values[key] for key in rng.sample(sorted(values), rng.randint(0, len(values)))}


@dataclass(frozen=True)
class Sample:
    """tools_style: whose parser. expected: the merged parts, with call arguments as values."""

    format: Format
    written: str
    expected: list[Any]


def make_sample(form: Format, rng: random.Random) -> Sample:
    calls = [(rng.choice(("get_weather", "open_gate", "noop")), arguments(rng)) for _ in range(rng.randint(1, 3))]
    content = f"Let me see {text(rng)}." if form.takes_content and rng.random() < 0.5 else ""
    reasoning = f"Hm {text(rng)}" if form.thinks and rng.random() < 0.5 else ""
    written = form.write(content, calls)
    expected: list[Any] = []
    if reasoning and form.thinks:
        written = f"{form.thinks[0]}\n{reasoning}\n{form.thinks[1]}\n\n{written}"
        expected.append(Reasoning(reasoning))
    if content:
        expected.append(content)
    expected += [(name, values, form.ids(name, index)) for index, (name, values) in enumerate(calls)]
    return Sample(form, written, expected)


def damaged(written: str, rng: random.Random) -> str:
    """The message with a piece cut out, doubled, or its end missing."""
    start = rng.randrange(len(written) + 1)
    end = min(len(written), start + rng.randint(1, 12))
    kind = rng.randrange(3)
    if kind == 0:
        return written[:start]
    return written[:start] + written[end:] if kind == 1 else written[:end] + written[start:]


def readable(parts: list[Part]) -> list[Any]:
    """Parts with call arguments as values, to compare with what was written."""
    return [
        (part.name, json.loads(part.arguments), part.call_id) if isinstance(part, ToolCall) else part for part in parts
    ]
