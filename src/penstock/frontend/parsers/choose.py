"""Which parsers a model needs, read off its own chat template: no flag says it, and none can be wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.parsers import (
    command_r,
    deepseek,
    gemma,
    glm,
    granite,
    harmony,
    hermes,
    invoke,
    kimi,
    llama_json,
    mistral,
    pythonic,
    qwen_coder,
)
from penstock.frontend.parsers.blocks import BlockParser, ToolFormat
from penstock.frontend.parsers.call_forms import HARMONY_FORM, call_form
from penstock.frontend.parsers.generic import learn_format
from penstock.frontend.parsers.learnt_call_form import learn_call_form
from penstock.frontend.parsers.parts import PartParser, ToolSchemas
from penstock.frontend.parsers.reasoning import ReasoningParser, ReasoningTags, tags_of
from penstock.messages import CallForm

# The first whose signs a template shows: those with signs of their own before those whose signs others share.
FORMATS: Final[tuple[ToolFormat, ...]] = (
    mistral.FORMAT,
    deepseek.FORMAT,
    kimi.FORMAT,
    gemma.FORMAT,
    command_r.FORMAT,
    glm.FORMAT,
    invoke.FORMAT,
    qwen_coder.FORMAT,
    hermes.FORMAT,
    granite.FORMAT,
    pythonic.FORMAT,
    llama_json.FORMAT,
)


@dataclass(frozen=True)
class OutputStyle:
    """How one model writes. tool_format: None where its template knows no calls. call_form: how it writes calls, where
    that can be demanded of it."""

    tool_format: ToolFormat | None = None
    reasoning: ReasoningTags | None = None
    is_harmony: bool = False
    call_form: CallForm | None = None

    @classmethod
    def of(cls, template: ChatTemplate) -> OutputStyle:
        """Reads the templates; the one for tools counts first."""
        sources = sorted(template.sources.items(), key=lambda item: item[0] != "tool_use")
        texts = [source for _, source in sources]
        if any(map(harmony.is_spoken_by, texts)):
            return cls(is_harmony=True, call_form=HARMONY_FORM)
        known = next((one for text in texts for one in FORMATS if one.is_spoken_by(text)), None)
        if known is not None:
            return cls(known, tags_of(texts), call_form=call_form(known.name, texts))
        learnt = learn_format(template)
        return cls(learnt, tags_of(texts), call_form=learn_call_form(template) if learnt is not None else None)

    @property
    def knows_calls(self) -> bool:
        return self.is_harmony or self.tool_format is not None

    def parser(self, tools: Sequence[Mapping[str, Any]] | None, opening: str = "") -> PartParser | None:
        """A parser for one sequence, None where its text is all content.

        tools: what the model was shown, in OpenAI's shape. opening: the end of the prompt that the template wrote.
        """
        schemas = _schemas(tools or ())
        if self.is_harmony:
            return harmony.HarmonyParser(schemas)
        calls: PartParser | None = None
        if self.tool_format is not None and (tools or self.tool_format.dropped):
            calls = BlockParser(self._format(with_tools=bool(tools)), schemas)
        if self.reasoning is None:
            return calls
        return ReasoningParser(self.reasoning, calls, is_inside=self.reasoning.is_open_in(opening))

    def markers(self, *, with_tools: bool) -> frozenset[str]:
        """What the parser must see as text, also where it is a special token that is otherwise left out."""
        if self.is_harmony:
            return frozenset(harmony.MARKERS)
        found: set[str] = set()
        if self.tool_format is not None:
            found |= self._format(with_tools=with_tools).markers
        if self.reasoning is not None:
            found |= {self.reasoning.open, self.reasoning.close}
        return frozenset(found)

    def _format(self, *, with_tools: bool) -> ToolFormat:
        assert self.tool_format is not None
        if with_tools:
            return self.tool_format
        return dataclasses.replace(self.tool_format, blocks=(), inner=())


def _schemas(tools: Iterable[Mapping[str, Any]]) -> ToolSchemas:
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            schemas[function["name"]] = properties if isinstance(properties, Mapping) else {}
    return schemas
