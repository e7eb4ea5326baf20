"""Hermes, Qwen 2.5, Qwen 3, Granite 4 and many others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import JsonCallReader

FORMAT = ToolFormat("hermes", (("<tool_call>",),), (Block("<tool_call>", "</tool_call>", JsonCallReader),))
