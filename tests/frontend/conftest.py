"""Checkpoints with tiny tokenizers, written once a session, and transformers' reading of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import CHECKPOINTS

from penstock.frontend.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def path(name: str) -> Path:
        return CHECKPOINTS[name]().write(root / name)

    return path


@pytest.fixture(scope="session")
def tokenizer_of(checkpoint_path: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    return functools.cache(lambda name: Tokenizer.load(checkpoint_path(name)))


@pytest.fixture(scope="session")
def reference_of(checkpoint_path: Callable[[str], Path]) -> Callable[[str], Any]:
    from transformers import AutoTokenizer

    return functools.cache(lambda name: AutoTokenizer.from_pretrained(str(checkpoint_path(name))))
