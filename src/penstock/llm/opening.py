"""From what a caller names to a checkpoint's configuration and text side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from penstock.assets import BUNDLED_MODEL
from penstock.base.errors import ConfigError
from penstock.config.defaults import machine_facts
from penstock.config.engine import EngineConfig
from penstock.config.resolve import EngineOptions, resolve_engine_config
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.one_pass import ModelTasks
from penstock.frontend.processor import Processor
from penstock.frontend.text_files import TextFiles
from penstock.frontend.tokenizer import Tokenizer
from penstock.loader import read_model_config, resolve
from penstock.messages import EngineReady


class Opened(NamedTuple):
    """A checkpoint that was found: what an engine is built from, and the text side."""

    config: EngineConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate

    def processor(self, ready: EngineReady) -> Processor:
        return Processor(
            self.tokenizer, self.chat_template, ready.max_model_len, ready.vocab_size, tasks=ModelTasks.of(ready)
        )


def open_checkpoint(model: str, revision: str | None, options: Mapping[str, Any], **resolving: float) -> Opened:
    """model: a local directory or a hub id; empty for the bundled one. options: of EngineOptions.

    Raises: CheckpointError or ConfigError.
    """
    unknown = sorted(set(options) - set(EngineOptions.__struct_fields__))
    if unknown:
        raise ConfigError(
            f"LLM has no option {unknown[0]!r}.",
            remedy=f"Options: {', '.join(EngineOptions.__struct_fields__)}.",
            param=unknown[0],
        )
    path = resolve(model, revision) if model else BUNDLED_MODEL
    config = resolve_engine_config(
        str(path), read_model_config(path), EngineOptions(**options), machine_facts(), **resolving
    )
    files = TextFiles.read(path)
    return Opened(config, Tokenizer.from_files(files), ChatTemplate.from_files(files))
