"""Checkpoints that lie, are cut short, or want to run code: each is refused by name, none is followed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from penstock.base.errors import CheckpointError
from penstock.loader import SafetensorsCheckpoint, SafetensorsFile, read_model_config


def safetensors_bytes(header: object, data: bytes = b"", *, claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = safetensors_bytes({"w": entry(), "__metadata__": {"format": "pt"}}, bytes(range(16)))

LYING_FILES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header longer than the file": safetensors_bytes({"w": entry()}, bytes(16), claimed=10**6),
    "header of 2**63 bytes": safetensors_bytes({"w": entry()}, bytes(16), claimed=2**63),
    "header of 2**64-1 bytes": safetensors_bytes({"w": entry()}, bytes(16), claimed=2**64 - 1),
    "not JSON": safetensors_bytes(b"\x80\x04pickle", bytes(16)),
    "not UTF-8": safetensors_bytes(b'{"\xff": {}}', bytes(16)),
    "a list": safetensors_bytes([], bytes(16)),
    "entry is a number": safetensors_bytes({"w": 7}, bytes(16)),
    "deep nesting": safetensors_bytes(b'{"w":' + b"[" * 100_000, bytes(16)),
    "truncated data": GOOD[:-1],
    "offsets beyond the file": safetensors_bytes({"w": entry(offsets=(0, 10**15))}, bytes(16)),
    "offsets beyond 64 bits": safetensors_bytes({"w": entry(offsets=(0, 2**70))}, bytes(16)),
    "offsets backwards": safetensors_bytes({"w": entry(offsets=(16, 0))}, bytes(16)),
    "negative offset": safetensors_bytes({"w": entry(offsets=(-16, 0))}, bytes(16)),
    "offsets of strings": safetensors_bytes({"w": entry(offsets=("0", "16"))}, bytes(16)),
    "three offsets": safetensors_bytes({"w": entry(offsets=(0, 8, 16))}, bytes(16)),
    "shape larger than data": safetensors_bytes({"w": entry(shape=(4, 4))}, bytes(16)),
    "shape that overflows": safetensors_bytes({"w": entry(shape=(2**40, 2**40))}, bytes(16)),
    "negative shape": safetensors_bytes({"w": entry(shape=(-2, -2))}, bytes(16)),
    "shape of booleans": safetensors_bytes({"w": entry(shape=(True, 4))}, bytes(16)),
    "shape of a thousand dimensions": safetensors_bytes({"w": entry(shape=[1] * 1000, offsets=(0, 4))}, bytes(16)),
    "no shape": safetensors_bytes({"w": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
    "unknown dtype": safetensors_bytes({"w": entry(dtype="X99")}, bytes(16)),
    "dtype is a list": safetensors_bytes({"w": entry(dtype=["F32"])}, bytes(16)),
    "overlapping tensors": safetensors_bytes({"w": entry(), "v": entry(offsets=(8, 24))}, bytes(24)),
    "the same bytes twice": safetensors_bytes({"w": entry(), "v": entry()}, bytes(16)),
}


@pytest.mark.parametrize("name", LYING_FILES)
def test_a_lying_file_is_refused(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LYING_FILES[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        SafetensorsFile(path)


def test_an_honest_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    file = SafetensorsFile(path)
    assert file.names() == ["w"]
    assert file.shape("w") == (2, 2)
    view = file.read("w")
    assert (view.dtype, view.shape, bytes(view.data)) == ("F32", (2, 2), bytes(range(16)))
    row = file.read("w", 1, 2)
    assert (row.shape, bytes(row.data)) == ((1, 2), bytes(range(8, 16)))


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    return tmp_path


def test_missing_and_misshapen_tensors_are_named(directory):
    checkpoint = SafetensorsCheckpoint(directory)
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'v'"):
        checkpoint.read("v", (2, 2))
    with pytest.raises(CheckpointError, match=r"'w' has the shape \[2, 2\].*\[2, 3\]"):
        checkpoint.read("w", (2, 3))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_with_the_remedy(suffix, tmp_path):
    (tmp_path / f"pytorch_model{suffix}").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(CheckpointError, match=rf"(?s)pytorch_model\{suffix}.*save_pretrained"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "/etc/passwd", "/tmp/outside.safetensors", "a/../../outside.safetensors",
        "sub/model.safetensors", "..", ".", "", "a\\..\\b.safetensors", "model.bin", 7, None, ["model.safetensors"],
    ],
)  # fmt: skip
def test_an_index_cannot_name_files_elsewhere(name, directory):
    (directory.parent / "outside.safetensors").write_bytes(GOOD)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="index"):
        SafetensorsCheckpoint(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 100_000])
def test_a_broken_index_is_refused(text, directory):
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        SafetensorsCheckpoint(directory)


def test_shards_that_are_missing_are_named(directory):
    names = {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        SafetensorsCheckpoint(directory)


def test_a_tensor_in_two_shards_is_refused(directory):
    (directory / "other.safetensors").write_bytes(GOOD)
    names = {"w": "model.safetensors", "v": "other.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"'w' is in both"):
        SafetensorsCheckpoint(directory)


def test_several_files_without_an_index_are_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        SafetensorsCheckpoint(tmp_path)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors"):
        SafetensorsCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "nonsense", "{" * 100_000, '{"a": NaN}', "\xff", '{"vocab_size": 1' + "0" * 5000 + "}"]
)
def test_a_broken_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_generation_config_adds_end_tokens(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert read_model_config(tmp_path).eos_token_ids == (2, 5)
