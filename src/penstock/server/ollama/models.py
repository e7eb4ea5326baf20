"""GET /api/tags, /api/ps, /api/version and POST /api/show: what is served, in Ollama's words."""

from __future__ import annotations

from typing import Any, Final

from penstock.frontend.one_pass import ModelTasks
from penstock.frontend.parsers.choose import OutputStyle
from penstock.server.exchange import Exchange
from penstock.server.ollama import decode
from penstock.server.ollama.generate import model_name, timestamp
from penstock.server.state import ServerState

# The version of Ollama whose API this is; clients compare it before they use a feature.
OLLAMA_VERSION: Final = "0.12.6"
_NEVER: Final = "9999-12-31T23:59:59Z"


class OllamaModels:
    """Handlers of the routes that describe. Each is a `call.Handler`."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def tags(self, _body: bytes, _exchange: Exchange) -> object:
        return {"models": [self._entry(name) for name in self._state.model_names]}

    async def running(self, _body: bytes, _exchange: Exchange) -> object:
        engine = self._state.engine
        if engine is None:
            return {"models": []}
        extra = {"expires_at": _NEVER, "size_vram": 0, "context_length": engine.ready.max_model_len}
        return {"models": [{**self._entry(name), **extra} for name in self._state.model_names]}

    async def version(self, _body: bytes, _exchange: Exchange) -> object:
        return {"version": OLLAMA_VERSION, "penstock": self._state.info.version}

    async def show(self, body: bytes, _exchange: Exchange) -> object:
        name = model_name(self._state, decode.decode_show(body))
        engine, text = self._state.parts()
        family = self._state.facts.family or "unknown"
        return {
            "modelfile": f"FROM {name}\n",
            "parameters": "",
            "template": text.template(),
            "details": self._details(),
            "model_info": {
                "general.architecture": family,
                "general.parameter_count": self._state.facts.num_parameters,
                f"{family}.context_length": engine.ready.max_model_len,
            },
            "capabilities": _capabilities(text.style, text.tasks),
            "modified_at": timestamp(self._state.facts.modified_s),
        }

    def _entry(self, name: str) -> dict[str, Any]:
        facts = self._state.facts
        return {
            "name": name,
            "model": name,
            "modified_at": timestamp(facts.modified_s),
            "size": facts.size_bytes,
            "digest": self._state.system_fingerprint,
            "details": self._details(),
        }

    def _details(self) -> dict[str, Any]:
        facts = self._state.facts
        return {
            "parent_model": "",
            "format": facts.file_format,
            "family": facts.family,
            "families": [facts.family] if facts.family else [],
            "parameter_size": _short(facts.num_parameters),
            "quantization_level": self._state.info.dtype,
        }


def _capabilities(style: OutputStyle, tasks: ModelTasks) -> list[str]:
    if "generate" not in tasks.names:
        return ["embedding"] if "embed" in tasks.names else []
    thinks = style.reasoning is not None or style.is_harmony
    return ["completion", *(["tools"] if style.knows_calls else []), *(["thinking"] if thinks else [])]


def _short(count: int) -> str:
    """A number of parameters as people write it: 1.2B, 360M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
