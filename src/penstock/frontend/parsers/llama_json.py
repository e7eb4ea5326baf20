"""Llama 3.1 to 3.3: the whole message is `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`."""

from __future__ import annotations

import re

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.json_calls import parse_json_calls

JSON_CALL = re.compile(r'\{\s*"(?:name|type|function|parameters|arguments)"\s*:')

FORMAT = ToolFormat(
    "llama_json",
    (("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
    (Block("<|python_tag|>", "", parse_json_calls), Block("{", "", parse_json_calls, JSON_CALL)),
)
