"""From settings to the checkpoint they name and the configuration of an engine for it."""

from __future__ import annotations

from pathlib import Path

from penstock.assets import BUNDLED_MODEL
from penstock.config.defaults import engine_options, machine_facts
from penstock.config.engine import EngineConfig
from penstock.config.resolve import resolve_engine_config
from penstock.config.settings import Settings
from penstock.loader import read_model_config, resolve

BUNDLED_NAME = "penstock-demo"


def find_checkpoint(settings: Settings) -> Path:
    """The directory of the model, downloaded if need be. Raises CheckpointError."""
    return resolve(settings.model, settings.revision or None) if settings.model else BUNDLED_MODEL


def model_names(settings: Settings) -> tuple[str, ...]:
    """The names that clients may use; the first is reported."""
    return settings.served_model_name or (settings.model or BUNDLED_NAME,)


def engine_config(settings: Settings, path: Path) -> EngineConfig:
    """Raises CheckpointError, ConfigError."""
    return resolve_engine_config(str(path), read_model_config(path), engine_options(settings), machine_facts())
