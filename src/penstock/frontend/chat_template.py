"""Messages to prompt text, by the checkpoint's own chat template, byte for byte as transformers renders it.

Text from the request is traced through the rendering (see traced_text), so that the prompt says of each character
whether the template or a user wrote it.
Never: compiles a template that a request brings along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Template, TemplateSyntaxError, nodes

from penstock.base.errors import CheckpointError, ValidationError
from penstock.frontend.template_environment import TemplateEnvironment, TemplateRefusalError, WorkLimitError
from penstock.frontend.text_files import TextFiles
from penstock.frontend.tokenizer import RenderedPrompt
from penstock.frontend.traced_text import plain, spans_of, user_text

# Templates put role names into control tokens ('<|' + role + '|>'), so these alone count as the template's own text.
KNOWN_ROLES: Final = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "ipython", "model", "tool_response", "documents"}
)
RESERVED_VARIABLES: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "self", "loop"})
MAX_VALUE_DEPTH: Final = 64
MAX_ERROR_CHARS: Final = 500

# Escaping would lose track of user text; there is nothing to include or import.
_UNSUPPORTED_TAGS: Final = (nodes.EvalContextModifier, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)

# The names a message's reasoning goes by. Templates read the first, some older ones "thinking".
_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """The chat templates of one checkpoint, compiled. Safe to use from several threads."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """sources: templates by name. special_tokens: what templates know as bos_token and so on.

        Raises CheckpointError when a template does not compile.
        """
        self._environment = TemplateEnvironment()
        self._special_tokens = dict(special_tokens)
        self._sources = dict(sources)
        self._templates: dict[str, Template] = {}
        self._wants_parts: dict[str, bool] = {}
        self._takes_argument_text: dict[str, bool] = {}
        for name, source in sources.items():
            self._compile(name, source)

    @classmethod
    def load(cls, path: Path) -> ChatTemplate:
        """Reads the checkpoint's directory."""
        return cls.from_files(TextFiles.read(path))

    @classmethod
    def from_files(cls, files: TextFiles) -> ChatTemplate:
        return cls(files.templates, files.special_tokens)

    @property
    def sources(self) -> Mapping[str, str]:
        """The templates' own text, by name."""
        return self._sources

    def __bool__(self) -> bool:
        """Whether the checkpoint has a template at all."""
        return bool(self._templates)

    def _compile(self, name: str, source: str) -> None:
        try:
            tree = self._environment.parse(source)
            if any(next(tree.find_all(tag), None) for tag in _UNSUPPORTED_TAGS):
                raise CheckpointError(f"The chat template {name!r} uses a tag that is not supported in chat templates.")
            self._templates[name] = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"The chat template {name!r} is malformed: {error}.") from error
        self._wants_parts[name] = _iterates_content(tree)
        self._takes_argument_text[name] = any(
            test.name == "string" and _named(test.node) == "arguments" for test in tree.find_all(nodes.Test)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Renders a conversation of plain JSON values.

        continue_final_message: leave the last message open for the model to go on with. variables: further ones for
        the template (enable_thinking and such). Raises ValidationError with the template's own words when it refuses.
        """
        if not messages:
            raise ValidationError("messages is empty.", param="messages")
        if continue_final_message and add_generation_prompt:
            raise ValidationError(
                "continue_final_message and add_generation_prompt exclude each other.", param="continue_final_message"
            )
        name = self._choose(tools)
        chat = [_message(message, self._wants_parts[name]) for message in messages]
        if continue_final_message:
            _mark_end(chat[-1])
        context = {
            **self._special_tokens,
            **_variables(variables or {}),
            "messages": chat,
            "tools": None if tools is None else _from_user(list(tools)),
            "documents": None if documents is None else _from_user(list(documents)),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(self._templates[name], context)
        if continue_final_message:
            text = _cut_end(text, chat[-1])
        return RenderedPrompt(plain(text), spans_of(text))

    def takes_argument_text(self, tools: object) -> bool:
        """Whether the template that serves these tools looks itself if a call's arguments are JSON text."""
        return self._takes_argument_text[self._choose(tools)]

    def _choose(self, tools: object) -> str:
        if not self._templates:
            raise ValidationError(
                "This model has no chat template.",
                remedy="Use /v1/completions, or add a chat_template.jinja to the checkpoint.",
                param="messages",
            )
        if tools is not None and "tool_use" in self._templates:
            return "tool_use"
        if "default" not in self._templates:
            raise ValidationError(
                f"This model has no default chat template, only {', '.join(sorted(self._templates))}.", param="messages"
            )
        return "default"

    def _run(self, template: Template, context: dict[str, Any]) -> str:
        self._environment.begin()
        try:
            return template.render(context)
        except TemplateRefusalError as error:
            raise ValidationError(
                _shortened(f"The chat template refuses these messages: {error}"), param="messages"
            ) from error
        except WorkLimitError as error:
            raise ValidationError(str(error), remedy="Send fewer or shorter messages.", param="messages") from error
        except Exception as error:
            # Whatever else a template stumbles over, it does so because of these messages: only this request ends.
            detail = f"The chat template cannot render these messages: {type(error).__name__}: {error}"
            raise ValidationError(
                _shortened(detail), remedy="Check roles, order and fields of the messages.", param="messages"
            ) from error


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "..."


def _from_user(value: object, depth: int = 0) -> Any:
    """A copy of a JSON value in which every string, keys included, is marked as the user's."""
    if depth > MAX_VALUE_DEPTH:
        raise ValidationError(f"Values are nested more than {MAX_VALUE_DEPTH} deep.", param="messages")
    if isinstance(value, str):
        return user_text(value)
    if isinstance(value, Mapping):
        return {_from_user(key, depth + 1): _from_user(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_from_user(item, depth + 1) for item in value]
    assert value is None or isinstance(value, (bool, int, float)), f"not a JSON value: {type(value).__name__}"
    return value


def _message(message: Mapping[str, Any], wants_parts: bool) -> dict[str, Any]:
    """One message as templates expect it: without empty fields, with reasoning under every name it goes by."""
    fields = {key: value for key, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in _REASONING_FIELDS if name in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    if isinstance(fields.get("content"), (list, tuple)):
        _check_parts(fields["content"])
        if not wants_parts:
            fields["content"] = "\n".join(part["text"] for part in fields["content"])
    chat: dict[str, Any] = _from_user(fields)
    if fields.get("role") in KNOWN_ROLES:
        chat["role"] = fields["role"]
    return chat


def _check_parts(parts: Sequence[Any]) -> None:
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValidationError(
                'Only text is supported in a message: parts must be {"type": "text", "text": "..."}.', param="messages"
            )


def _variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in RESERVED_VARIABLES or not name.isidentifier() or name.startswith("_"):
            raise ValidationError(f"{name!r} cannot be set for a chat template.", param="chat_template_kwargs")
    return {name: _from_user(value) for name, value in variables.items()}


def _mark_end(message: dict[str, Any]) -> None:
    """Puts a tag behind the text of the message, so that its end can be found in the rendering."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_TAG
        return
    texts = [part for part in content or [] if "text" in part]
    if not texts:
        raise ValidationError("The final message has no text to continue.", param="continue_final_message")
    texts[-1]["text"] = texts[-1]["text"] + _CONTINUE_TAG


def _cut_end(text: str, message: dict[str, Any]) -> str:
    """What the template wrote up to the tag."""
    content = message["content"]
    tagged = content if isinstance(content, str) else next(p["text"] for p in reversed(content) if "text" in p)
    final = str.removesuffix(plain(tagged), _CONTINUE_TAG).strip()
    tag = _CONTINUE_TAG.strip()
    if final not in text or tag not in text:
        raise ValidationError(
            "The chat template leaves out part of the final message: it cannot be continued.",
            param="continue_final_message",
        )
    position = text.rindex(tag)
    kept = text[:position]
    return kept if text[position : position + len(_CONTINUE_TAG)] == _CONTINUE_TAG else kept.rstrip()


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether the template goes through the parts of a message's content itself; else it wants one string."""
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _named(assignment.node) == "content":
            names.add(assignment.target.name)
    return any(_named(loop.iter) in names for loop in tree.find_all(nodes.For))


def _named(node: nodes.Node | None) -> str | None:
    """The last name of an expression like x, a.x, a['x'], with slices and filters taken off."""
    while isinstance(node, nodes.Filter) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return None
