"""Chat templates in the manner of the published families, and conversations to render with them.

Written for these tests from what the families document of their formats; none is a copy of a published file. They use
the constructs that real templates use: namespaces, macros, loop controls, slices, string methods, filters, raising.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8")
    for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}

# Every marker the templates write, for tokenizers that know them all.
SPECIAL_MARKERS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "<|user|>", "<|system|>", "<|assistant|>", "<|tool|>", "<|end|>", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|start_of_role|>",
    "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>",
]  # fmt: skip
PLAIN_MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a place, in °C & with "quotes" <b>bold</b>.',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 3}},
            "required": ["city"],
        },
    },
}
GATE = {"type": "function", "function": {"name": "open_gate", "description": "Öffnet das Tor.", "parameters": {}}}


def _m(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def _call(name: str, arguments: Any, call_id: str = "call12345") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# name: keyword arguments of apply_chat_template
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [_m("user", "Hello there!")]},
    "no generation prompt": {"messages": [_m("user", "Hello"), _m("assistant", "Hi.")], "add_generation_prompt": False},
    "system": {"messages": [_m("system", "You are a pump."), _m("user", "Flow?")]},
    "two systems": {"messages": [_m("system", "A."), _m("system", "B."), _m("user", "C?")]},
    "many turns": {
        "messages": [
            _m("system", "Be brief."),
            *(_m("user" if turn % 2 == 0 else "assistant", f"Turn number {turn}.") for turn in range(11)),
        ]
    },
    "unicode": {
        "messages": [_m("user", "Größe? 水は低い方へ 🙂👩‍👩‍👧 e\u0301 \u00a0\u2028 “x”"), _m("assistant", "да 🇩🇪")]
    },
    "white space": {"messages": [_m("user", "  \n leading and trailing \t\n\n"), _m("assistant", "\r\n x \r\n")]},
    "empty content": {"messages": [_m("user", ""), _m("assistant", "")]},
    "code": {"messages": [_m("user", "```python\nif a < b and b > c:\n\treturn {{x}} {% y %} {# z #}\n```")]},
    "markup": {"messages": [_m("user", "<b>bold</b> &amp; \"quoted\" 'single' \\ backslash <tool> [LIST] <|")]},
    "tools offered": {"messages": [_m("user", "Weather in Ulm?")], "tools": [WEATHER]},
    "two tools and a system": {
        "messages": [_m("system", "Use tools."), _m("user", "Weather in Ulm?")],
        "tools": [WEATHER, GATE],
    },
    "tool call and result": {
        "messages": [
            _m("user", "Weather in Ulm?"),
            _m("assistant", None, tool_calls=[_call("get_weather", {"city": "Ulm", "days": 2, "é": None})]),
            _m("tool", '{"temp": 21.5, "text": "größtenteils <klar>"}', name="get_weather", tool_call_id="call12345"),
        ],
        "tools": [WEATHER],
    },
    "tool round trip": {
        "messages": [
            _m("system", "Use tools."),
            _m("user", "Weather in Ulm and Bonn?"),
            _m("assistant", "Let me see.", tool_calls=[_call("get_weather", {"city": "Ulm"})]),
            _m("tool", "21", tool_call_id="call12345"),
            _m("tool", "19", tool_call_id="call12346"),
            _m("assistant", "21 and 19."),
            _m("user", "Thanks"),
        ],
        "tools": [WEATHER, GATE],
    },
    "two calls at once": {
        "messages": [
            _m("user", "Both?"),
            _m("assistant", "", tool_calls=[_call("get_weather", {"city": "Ulm"}), _call("open_gate", {}, "b")]),
            _m("tool", "ok", tool_call_id="b"),
        ],
    },
    "arguments as text": {
        "messages": [_m("user", "Go"), _m("assistant", None, tool_calls=[_call("open_gate", '{"level": 3}')])]
    },
    "reasoning field": {
        "messages": [_m("user", "2+2?"), _m("assistant", "4", reasoning_content="\nAdd them.\n"), _m("user", "3+3?")]
    },
    "thinking in content": {
        "messages": [_m("user", "2+2?"), _m("assistant", "Easy.\n\n4"), _m("user", "And 3+3?"), _m("assistant", "6")],
        "add_generation_prompt": False,
    },
    "text parts": {"messages": [_m("user", [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}])]},
    "roles out of order": {"messages": [_m("assistant", "I begin."), _m("user", "So you do.")]},
    "names and empty tools": {
        "messages": [_m("user", "I am Ada.", name="Ada"), _m("assistant", "Hi Ada", name="p")],
        "tools": [],
    },
    "thinking off": {"messages": [_m("user", "Quick!")], "enable_thinking": False, "date_string": "1 May 2026"},
    "documents": {
        "messages": [_m("user", "Summarise.")],
        "documents": [{"title": "Dams", "text": "Water & walls."}, {"title": "Öl", "text": "x"}],
        "controls": {"length": "short"},
    },
}  # fmt: skip
