"""Llama 3.2, Llama 4, LFM2 and OLMo 3: `[f(a=1, b="x"), g()]`, Python calls with literal keyword arguments."""

from __future__ import annotations

import re

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import CallReader, FirstCharacterReader, JsonCallReader, WholeReader
from penstock.frontend.parsers.llama_json import JSON_CALL, read_bare
from penstock.frontend.parsers.parts import ToolSchemas
from penstock.frontend.parsers.python_calls import read_python_calls

_CALL = re.compile(r"\[\s*[A-Za-z_][\w.\-]*\s*\(")


def read(schemas: ToolSchemas) -> CallReader:
    """Llama 4 also writes JSON between the markers."""
    return FirstCharacterReader(
        lambda first: JsonCallReader(schemas) if first == "{" else WholeReader(read_python_calls)
    )


FORMAT = ToolFormat(
    "pythonic",
    (
        ("<|python_start|>",),
        ("<|tool_call_start|>",),
        ("<|tool_list_start|>",),
        ("[func_name1(",),
        ("```tool_code",),
        ("<function_calls>",),
    ),
    (
        Block("<|python_start|>", "<|python_end|>", read),
        Block("<|tool_call_start|>", "<|tool_call_end|>", read),
        Block("```tool_code\n", "\n```", read),
        Block("<function_calls>", "</function_calls>", read),
        Block("[", "", read, _CALL),
        Block("{", "", read_bare, JSON_CALL),
    ),
)
