"""How each format's models write calls, so that grammars can demand it: the other half of what the parsers read.

Templates of one format differ in how they write; the first form whose signs stand in a model's template is its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from penstock.messages import CallForm, CallStyle

HARMONY_FORM: Final = CallForm(name="harmony", style=CallStyle.HARMONY)


def _json(name: str, *, before: str = "", tail: str = "}", keys: tuple[str, str] = ("name", "arguments"), **more: Any
          ) -> CallForm:  # fmt: skip
    """A call is an object of name and arguments. before: what stands before its brace."""
    name_key, arguments_key = keys
    return CallForm(
        name=name, before_name=f'{before}{{"{name_key}": "', after_name=f'", "{arguments_key}": ', tail=tail, **more
    )


def _deepseek(before_name: str, after_name: str, tail: str, separator: str) -> CallForm:
    begin = "<｜tool▁calls▁begin｜>"
    return CallForm(
        name="deepseek", trigger=begin, open=begin, before_name=f"<｜tool▁call▁begin｜>{before_name}",
        after_name=after_name, tail=f"{tail}<｜tool▁call▁end｜>", separator=separator, close="<｜tool▁calls▁end｜>",
    )  # fmt: skip


def _glm(space: str) -> CallForm:
    before_value = f"</arg_key>{space}<arg_value>"
    return CallForm(
        name="glm", style=CallStyle.TAGGED, trigger="<tool_call>", before_name="<tool_call>", after_name=space,
        before_key="<arg_key>", before_text=before_value, before_json=before_value,
        after_value=f"</arg_value>{space}", tail="</tool_call>", separator="\n",
        not_in_text=("<arg_key>", "</tool_call>"),
    )  # fmt: skip


def _coder(begin: str, end: str) -> CallForm:
    return CallForm(
        name="qwen_coder", style=CallStyle.TAGGED, trigger=begin, before_name=f"{begin}\n<function=", after_name=">\n",
        before_key="<parameter=", before_text=">\n", before_json=">\n", after_value="\n</parameter>\n",
        tail=f"</function>\n{end}", separator="\n",
        not_in_text=("<function=", "</function>", "<parameter=", "</parameter>", end),
    )  # fmt: skip


def _invoke(open_tag: str, close_tag: str, prefix: str, typed: tuple[str, str]) -> CallForm:
    return CallForm(
        name="invoke", style=CallStyle.TAGGED, trigger=open_tag, open=f"{open_tag}\n",
        before_name=f'<{prefix}invoke name="', after_name='">\n', before_key=f'<{prefix}parameter name="',
        before_text=f'"{typed[0]}>', before_json=f'"{typed[1]}>', after_value=f"</{prefix}parameter>\n",
        tail=f"</{prefix}invoke>\n", close=close_tag,
        not_in_text=("<invoke", "</invoke>", "<parameter", "</parameter>", close_tag),
    )  # fmt: skip


def _python(open_tag: str, close_tag: str, separator: str = ", ", **more: Any) -> CallForm:
    return CallForm(
        name="pythonic", style=CallStyle.PYTHON, open=open_tag, after_name="(", tail=")", separator=separator,
        close=close_tag, **more,
    )  # fmt: skip


def _gemma(begin: str, end: str, quote: str) -> CallForm:
    return CallForm(
        name="gemma", style=CallStyle.GEMMA, trigger=begin, before_name=f"{begin}call:", tail=end, quote=quote,
    )  # fmt: skip


CALL_FORMS: Final[Mapping[str, tuple[tuple[tuple[str, ...], CallForm], ...]]] = {
    "hermes": (
        ((), _json("hermes", trigger="<tool_call>", before="<tool_call>\n", tail="}\n</tool_call>", separator="\n")),
    ),
    "mistral": (
        (("[ARGS]",),
         CallForm(name="mistral", trigger="[TOOL_CALLS]", before_name="[TOOL_CALLS]", after_name="[ARGS]")),
        ((), _json("mistral", trigger="[TOOL_CALLS]", open="[TOOL_CALLS] [", separator=", ", close="]")),
    ),
    "granite": (
        (("<function_call>",),
         _json("granite", trigger="<function_call>", before="<function_call> ", separator="\n")),
        (("<|/tool_call|>",),
         _json("granite", trigger="<|tool_call|>", open="<|tool_call|>[", separator=", ", close="]<|/tool_call|>")),
        ((), _json("granite", trigger="<|tool_call|>", open="<|tool_call|>[", separator=", ", close="]")),
    ),
    "command_r": (
        (("<|START_ACTION|>",),
         _json("command_r", trigger="<|START_ACTION|>", open="<|START_ACTION|>[\n", separator=",\n",
               close="\n]<|END_ACTION|>", keys=("tool_name", "parameters"))),
        ((), _json("command_r", trigger="Action: ```json\n", open="Action: ```json\n[\n", separator=",\n",
                   close="\n]\n```", keys=("tool_name", "parameters"))),
    ),
    "deepseek": (
        (("```json",), _deepseek("function<｜tool▁sep｜>", "\n```json\n", "\n```", "\n")),
        ((), _deepseek("", "<｜tool▁sep｜>", "", "")),
    ),
    "kimi": (
        ((), CallForm(
            name="kimi", trigger="<|tool_calls_section_begin|>", open="<|tool_calls_section_begin|>", is_numbered=True,
            before_name="<|tool_call_begin|>functions.", after_name="<|tool_call_argument_begin|>",
            tail="<|tool_call_end|>", close="<|tool_calls_section_end|>",
        )),
    ),
    "glm": (
        (("</arg_key>\\n<arg_value>",), _glm("\n")), (("</arg_key>\n<arg_value>",), _glm("\n")), ((), _glm("")),
    ),
    "qwen_coder": (
        (("<seed:tool_call>",), _coder("<seed:tool_call>", "</seed:tool_call>")),
        ((), _coder("<tool_call>", "</tool_call>")),
    ),
    "invoke": (
        (("｜DSML｜",),
         _invoke("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "｜DSML｜",
                 (' string="true"', ' string="false"'))),
        ((), _invoke("<minimax:tool_call>", "</minimax:tool_call>", "", ("", ""))),
    ),
    "gemma": (
        (("<start_function_call>",), _gemma("<start_function_call>", "<end_function_call>", "<escape>")),
        ((), _gemma("<|tool_call>", "<tool_call|>", '<|"|>')),
    ),
    "pythonic": (
        (("<|python_start|>",), _python("<|python_start|>[", "]<|python_end|>", trigger="<|python_start|>")),
        (("<|tool_call_start|>",),
         _python("<|tool_call_start|>[", "]<|tool_call_end|>", trigger="<|tool_call_start|>")),
        (("```tool_code",), _python("```tool_code\n", "\n```", "\n", trigger="```tool_code\n")),
        (("<function_calls>",), _python("<function_calls>\n", "\n</function_calls>", "\n", trigger="<function_calls>")),
        ((), _python("[", "]", starts="[{")),
    ),
    "llama_json": (
        ((), _json("llama_json", starts="{", separator="; ", keys=("name", "parameters"))),
    ),
}  # fmt: skip


def call_form(format_name: str, templates: Iterable[str]) -> CallForm | None:
    """The form of a named format that a model with these templates writes."""
    together = "\n".join(templates)
    forms = CALL_FORMS.get(format_name, ())
    return next((form for signs, form in forms if all(sign in together for sign in signs)), None)
