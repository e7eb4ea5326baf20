"""Writes docs/configuration.md and the tables inside docs/api.md from the code; --check only compares (for CI)."""

from __future__ import annotations

import argparse
import re
import sys
import types
import typing
from pathlib import Path

import msgspec

from penstock.config.settings import ENVIRONMENT_ONLY, SPECS, SettingSpec, format_size
from penstock.messages import EngineStats
from penstock.messages.bounds import BOUNDS, MAX_BODY_BYTES, MAX_ENTRIES, MAX_HEAD_BYTES, MAX_JSON_DEPTH
from penstock.observability.metrics import ServerInfo, ServerMetrics, Snapshot, all_families
from penstock.server.anthropic import schema as anthropic
from penstock.server.app import ROUTES
from penstock.server.auth import PUBLIC_PATHS
from penstock.server.cohere.rerank import RerankRequest
from penstock.server.ollama import schema as ollama
from penstock.server.ollama.embed import EmbedRequest
from penstock.server.openai import response_schema
from penstock.server.openai.batches import BatchRequest
from penstock.server.openai.embeddings import EmbeddingRequest
from penstock.server.openai.schema import (
    NO_OP_VALUES,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    TokenizeRequest,
)
from penstock.server.tgi import schema as tgi
from penstock.server.tgi.embed import TeiEmbedRequest
from penstock.server.vllm.classify import ClassifyRequest
from penstock.server.vllm.score import ScoreRequest

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made by tools/generate_docs.py from the code: do not edit. -->"
# Fields that another field's bound governs.
RENAMED = {"top_logprobs": "logprobs", "max_completion_tokens": "max_tokens", "best_of": "n"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a file is out of date")
    options = parser.parse_args()
    api = ROOT / "docs/api.md"
    wanted = {
        ROOT / "docs/configuration.md": configuration(),
        api: fill(api.read_text(encoding="utf-8"), {
            "routes": routes(), "fields": fields(), "protocols": protocols(), "bounds": bounds(),
            "metrics": metrics(),
        }),
    }  # fmt: skip
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path.relative_to(ROOT)} is out of date: run `make docs`.")
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if stale and options.check else 0


def configuration() -> str:
    lines = [
        "# Configuration", "", NOTE, "",
        f"{len(SPECS)} settings. Each can be given as a flag, as an environment variable (`PENSTOCK_` and its name",
        "in capitals), or as a key of a TOML file (`--config FILE` or `PENSTOCK_CONFIG`). The flag wins over the",
        "variable, the variable over the file, the file over the default. An unknown flag, variable or key is an error",
        "that names the nearest known one. `penstock config explain` prints every value with its source.",
        "Sizes are written `8GiB` or `8GB`, lists with commas.",
    ]  # fmt: skip
    group = ""
    for spec in SPECS.values():
        if spec.group != group:
            group = spec.group
            lines += [
                "",
                f"## {group}",
                "",
                "| Setting | Flag | Values | Default | What it does |",
                "|---|---|---|---|---|",
            ]
        lines.append(f"| `{spec.name}` | `{_flag(spec)}` | {_values(spec)} | {_default(spec)} | {_cell(spec.help)} |")
    lines += ["", "## Environment variables that are no settings", "", "| Variable | What it does |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(text)} |" for name, text in ENVIRONMENT_ONLY.items()]
    lines += ["", "Bounds on what a request may ask for are in [api.md](api.md#bounds).", ""]
    return "\n".join(lines)


def _flag(spec: SettingSpec) -> str:
    return f"{spec.flag}` / `--no-{spec.flag.removeprefix('--')}" if spec.kind == "flag" else spec.flag


def _values(spec: SettingSpec) -> str:
    if spec.choices:
        return ", ".join(f"`{choice}`" for choice in spec.choices)
    if spec.bounds is None:
        return {"flag": "true, false", "list": "list", "text": "text"}[spec.kind]
    low, high = (format_size(int(edge)) if spec.kind == "size" else _number(edge) for edge in spec.bounds)
    return f"{low} to {high}"


def _default(spec: SettingSpec) -> str:
    return f"auto: {spec.auto}" if spec.auto else f"`{spec.show(spec.default)}`"


def routes() -> str:
    lines = ["| Route | Key | What it does |", "|---|---|---|"]
    for method, path, text in ROUTES:
        lines.append(f"| `{method} {path}` | {'no' if path in PUBLIC_PATHS else 'yes'} | {text} |")
    return "\n".join(lines)


def fields() -> str:
    chat = {field.name: field for field in msgspec.structs.fields(ChatRequest)}
    text = {field.name: field for field in msgspec.structs.fields(CompletionRequest)}
    lines = ["| Field | Type | Chat | Completions | Bounds |", "|---|---|---|---|---|"]
    refused = []
    for name, field in {**chat, **text}.items():
        if field.type is typing.Any:
            allowed = ", ".join(f"`{_json(value)}`" for value in NO_OP_VALUES.get(name, ()))
            refused.append(f"| `{name}` | {'null, ' + allowed if allowed else 'null'} |")
            continue
        bound = BOUNDS.get(RENAMED.get(name, name))
        shown = f"{_number(bound[0])} to {_number(bound[1])}" if bound and name != "logprobs" else _entries(name)
        marks = [_accepted(of[name].type) if name in of else "" for of in (chat, text)]
        row = (f"`{name}`", _type((text if name in text else chat)[name].type), *marks, shown)
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "Known, but not supported: any other value than these is refused.",
        "",
        "| Field | Accepted |",
        "|---|---|",
    ]
    return "\n".join(lines + refused)


# Heading, request type, and the values that its unsupported fields may yet have.
PROTOCOLS = (
    ("POST /v1/embeddings", EmbeddingRequest, {}),
    ("POST /v1/rerank, /v2/rerank and /rerank", RerankRequest, {}),
    ("POST /v1/score and /score", ScoreRequest, {}),
    ("POST /v1/classify and /classify", ClassifyRequest, {}),
    ("POST /v1/responses", response_schema.ResponseRequest, response_schema.NO_OP_VALUES),
    ("POST /v1/batches", BatchRequest, {}),
    ("POST /v1/generate: chat's sampling fields, and", GenerateRequest, {}),
    ("POST /tokenize (vLLM)", TokenizeRequest, {}),
    ("POST /v1/messages", anthropic.MessagesRequest, anthropic.NO_OP_VALUES),
    ("POST /api/chat", ollama.ChatRequest, ollama.NO_OP_VALUES),
    ("POST /api/generate: what differs", ollama.GenerateRequest, ollama.NO_OP_VALUES),
    ("options of /api/chat and /api/generate", ollama.Options, ollama.NO_OP_OPTIONS),
    ("POST /api/embed", EmbedRequest, {}),
    ("POST /embed", TeiEmbedRequest, {}),
    ("POST /, /generate and /generate_stream", tgi.GenerateRequest, {}),
    ("parameters of /, /generate and /generate_stream", tgi.Parameters, tgi.NO_OP_VALUES),
)
LEFT_OUT = {GenerateRequest: CompletionRequest, ollama.GenerateRequest: ollama.ChatRequest}


def protocols() -> str:
    """Every field of the other protocols: it works, or only the values named here pass and others are refused."""
    lines: list[str] = []
    for title, request_type, allowed in PROTOCOLS:
        lines += [f"**`{title}`**" if " " not in title else f"**{title}**", "", "| Field | Type | Accepted |"]
        lines.append("|---|---|---|")
        known = (
            {field.name for field in msgspec.structs.fields(LEFT_OUT[request_type])} if request_type in LEFT_OUT else ()
        )
        for field in msgspec.structs.fields(request_type):
            if field.name in known:
                continue
            if field.type is typing.Any:
                values = ", ".join(f"`{_json(value)}`" for value in allowed.get(field.name, ()))
                lines.append(f"| `{field.name}` |  | {'null, ' + values if values else 'null'} |")
            else:
                lines.append(f"| `{field.name}` | {_type(field.type)} | {_accepted(field.type)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def _accepted(kind: object) -> str:
    """Whether a field works, or which few values it may have beside null."""
    parts = set(typing.get_args(kind) or (kind,)) - {types.NoneType}
    if not parts:
        return "null"
    if parts == {list[None]}:
        return "null, `[]`"
    if all(
        isinstance(part, type) and issubclass(part, msgspec.Struct) and not part.__struct_fields__ for part in parts
    ):
        return "null, `{}`"
    return "null, `false`" if parts == {typing.Literal[False]} else "yes"


def _entries(name: str) -> str:
    counts = {"messages": "messages", "prompt": "prompts", "stop": "stop", "logit_bias": "logit_bias", "tools": "tools",
              "stop_token_ids": "stop_token_ids", "bad_words": "bad_words", "metadata": "metadata",
              "dry_sequence_breakers": "dry_sequence_breakers"}  # fmt: skip
    if name in counts:
        return f"at most {MAX_ENTRIES[counts[name]]} entries"
    if name in ("user", "safety_identifier", "prompt_cache_key"):
        return f"at most {MAX_ENTRIES['user_chars']} characters"
    if name == "cache_salt":
        return f"1 to {MAX_ENTRIES['namespace_chars']} characters"
    return "true or 0 to 20" if name == "logprobs" else ""


def _type(kind: object) -> str:
    """A Python type as JSON people say it; null is always allowed where a field is optional."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
        return " or ".join(dict.fromkeys(_type(part) for part in parts))
    if origin is typing.Literal:
        return " or ".join(f"`{_json(value)}`" for value in typing.get_args(kind))
    if origin is list:
        return f"list of {_type(typing.get_args(kind)[0])}"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return "object"
    if kind is types.NoneType:
        return ""
    return {str: "text", int: "integer", float: "number", bool: "boolean"}.get(typing.cast(type, kind), str(kind))


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def bounds() -> str:
    lines = ["| What | Bound |", "|---|---|"]
    lines += [f"| `{name}` | {_number(low)} to {_number(high)} |" for name, (low, high) in BOUNDS.items()]
    lines += [f"| `{name}` | at most {limit} |" for name, limit in MAX_ENTRIES.items()]
    lines += [f"| request line and headers | at most {MAX_HEAD_BYTES} bytes |"]
    lines += [f"| body | at most {MAX_BODY_BYTES} bytes |", f"| nesting | at most {MAX_JSON_DEPTH} levels |"]
    return "\n".join(lines)


def metrics() -> str:
    snapshot = Snapshot(stats=EngineStats(), info=ServerInfo(version="", model=""), is_ready=False, num_open=0)
    lines = ["| Metric | Type | What it is |", "|---|---|---|"]
    for family in all_families(ServerMetrics(), snapshot):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        lines.append(f"| `{name}` | {family.type} | {_cell(family.documentation)} |")
    return "\n".join(lines)


def fill(text: str, tables: dict[str, str]) -> str:
    """`text` with every block between `<!-- begin NAME -->` and `<!-- end NAME -->` replaced."""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match: match[1] + table + "\n" + match[2], text)  # noqa: B023
        assert count == 1, f"docs/api.md lacks the markers of {name}"
    return text


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
