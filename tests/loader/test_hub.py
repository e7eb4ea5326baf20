"""Resolving a model's name: directories as they are, complete cache snapshots without a network call."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from penstock.base.errors import CheckpointError
from penstock.loader import resolve
from penstock.loader.hub import gguf_names

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


NAMES = [
    "README.md",
    "Model-1B-Q4_K_M.gguf",
    "Model-1B-Q4_K_S.gguf",
    "Model-1B-IQ4_XS.gguf",
    "BF16/Model-1B-BF16-00001-of-00002.gguf",
    "BF16/Model-1B-BF16-00002-of-00002.gguf",
    "mmproj-Q8_0.gguf",
    "model.q8_0.gguf",
]


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ("Q4_K_M", NAMES[1:2]),
        ("q4_k_m", NAMES[1:2]),
        ("IQ4_XS", NAMES[3:4]),
        ("BF16", NAMES[4:6]),
        ("Q8_0", NAMES[7:8]),
    ],
)
def test_a_quantization_names_one_gguf(quantization, found):
    assert gguf_names(NAMES, quantization) == found


@pytest.mark.parametrize("quantization", ["Q4_K", "Q4", "Q2_K", "gguf"])
def test_a_quantization_that_is_not_there_lists_those_that_are(quantization):
    with pytest.raises(CheckpointError, match=r"no GGUF.*Q4_K_M"):
        gguf_names(NAMES, quantization)


def test_two_ggufs_of_one_quantization_are_not_chosen_from():
    with pytest.raises(CheckpointError, match="several"):
        gguf_names([*NAMES, "Other-Q8_0.gguf"], "Q8_0")


def test_a_cached_gguf_needs_no_network(cache, no_network, monkeypatch):
    for name in (*NAMES[1:3], *NAMES[4:6]):
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_bytes(b"GGUF")
    assert resolve("org/tiny:Q4_K_M") == cache / NAMES[1]
    assert resolve("org/tiny:bf16") == cache / NAMES[4]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (cache / NAMES[5]).unlink()
    for name in ("org/tiny:bf16", "org/tiny:Q2_K", "org/other:Q4_0"):
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
            resolve(name)


def test_a_file_is_a_gguf_or_nothing(tmp_path, no_network):
    model = tmp_path / "m-00001-of-00002.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="lacks m-00002-of-00002"):
        resolve(str(model))
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(b"GGUF")
    assert resolve(str(second)) == model
    with pytest.raises(CheckpointError, match="no file or directory"):
        resolve(str(tmp_path / "none.gguf"))
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="no GGUF"):
        resolve(str(tmp_path / "pickle.bin"))
