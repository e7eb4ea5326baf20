"""Llama 3.1 to 3.3: the whole message is `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`."""

from __future__ import annotations

import re

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import CallReader, JsonCallReader
from penstock.frontend.parsers.parts import ToolSchemas

JSON_CALL = re.compile(r'\{\s*"(?:name|type|function|parameters|arguments)"\s*:')


def read_bare(schemas: ToolSchemas) -> CallReader:
    return JsonCallReader(schemas, is_bare=True)


FORMAT = ToolFormat(
    "llama_json",
    (("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
    (Block("<|python_tag|>", "", JsonCallReader), Block("{", "", read_bare, JSON_CALL)),
)
