from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from delayed_device import DelayedBackend, delayed_device
from penstock.runner import model_runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path)
    return path


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> DelayedBackend:
    """Engines built after this run on a delayed device."""
    backend = DelayedBackend()
    monkeypatch.setattr(model_runner, "step_device", lambda config, _device: delayed_device(config, backend))
    return backend
