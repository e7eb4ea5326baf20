"""Llama 3.2, Llama 4, LFM2 and OLMo 3: `[f(a=1, b="x"), g()]`, Python calls with literal keyword arguments."""

from __future__ import annotations

import ast
import re
from typing import Any

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.json_calls import object_json, parse_json_calls
from penstock.frontend.parsers.llama_json import JSON_CALL
from penstock.frontend.parsers.parts import ToolCall, ToolSchemas

_CALL = re.compile(r"\[\s*[A-Za-z_][\w.\-]*\s*\(")
_JSON_NAMES = {"true": True, "false": False, "null": None}


def parse(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:
    """Reads the syntax tree; nothing is evaluated. Llama 4 also writes JSON between the markers."""
    stripped = text.strip()
    if stripped.startswith("{"):
        return parse_json_calls(stripped, schemas)
    try:
        calls: list[ToolCall] = []
        for statement in ast.parse(stripped).body:
            if not isinstance(statement, ast.Expr):
                return None
            value = statement.value
            calls += [_call(node) for node in (value.elts if isinstance(value, ast.List) else [value])]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, SystemError):
        return None
    return calls or None


def _call(node: ast.expr) -> ToolCall:
    """Raises ValueError for anything but a call with literal keyword arguments."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keyword arguments")
    values = {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    arguments = object_json(values)
    if len(values) != len(node.keywords) or arguments is None:
        raise ValueError("arguments that JSON cannot hold")
    return ToolCall(ast.unparse(node.func), arguments)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError("not a JSON value")


def _key(node: ast.expr | None) -> str:
    key = None if node is None else ast.literal_eval(node)
    if not isinstance(key, str):
        raise ValueError("not a JSON key")
    return key


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
        Block("<|python_start|>", "<|python_end|>", parse),
        Block("<|tool_call_start|>", "<|tool_call_end|>", parse),
        Block("```tool_code\n", "\n```", parse),
        Block("<function_calls>", "</function_calls>", parse),
        Block("[", "", parse, _CALL),
        Block("{", "", parse_json_calls, JSON_CALL),
    ),
)
