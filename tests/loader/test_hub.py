"""Resolving a model's name: directories as they are, complete cache snapshots without a network call."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from penstock.base.errors import CheckpointError
from penstock.loader import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_network(monkeypatch):
    """Any connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a network call: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with the model org/tiny, in two shards."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub" / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "tokenizer.json").write_text("{}")
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in shards.values():
        (snapshot / name).write_bytes(b"")
    return snapshot


def test_a_directory_is_itself(tmp_path, no_network):
    assert resolve(str(tmp_path)) == tmp_path.resolve()


def test_a_complete_snapshot_needs_no_network(cache, no_network):
    assert resolve("org/tiny") == cache
    assert resolve("org/tiny", "main") == cache
    assert resolve("org/tiny", COMMIT) == cache


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model-2.safetensors"])
def test_an_interrupted_download_is_not_taken_for_complete(missing, cache, no_network, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (cache / missing).unlink()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        resolve("org/tiny")


def test_an_unknown_model_offline_says_so(cache, no_network, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"org/other.*HF_HUB_OFFLINE"):
        resolve("org/other")


@pytest.mark.parametrize(
    "name", ["/no/such/dir", "./nothing", "~/nothing-here", "a/b/c", "org/..", "", "x y", "org/na\nme"]
)
def test_names_that_are_neither_path_nor_id_are_refused(name, cache, no_network):
    with pytest.raises(CheckpointError, match="directory"):
        resolve(name)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))


def test_the_loader_imports_no_torch():
    code = "import sys, penstock.loader; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
