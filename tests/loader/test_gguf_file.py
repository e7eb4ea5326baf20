"""The GGUF reader: files that the gguf package wrote, and files that nobody should have written."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.base.errors import CheckpointError
from penstock.loader.gguf_checkpoint import GGUFCheckpoint, gguf_name, hf_name, turned_rows
from penstock.loader.gguf_file import GGUFFile, split_paths


def write(path: Path, **options: int) -> dict[str, np.ndarray]:
    """A file with a pair of every kind and a few tensors."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_head_count(2)
    writer.add_embedding_length(16)
    writer.add_string("some.text", "grüße")
    writer.add_uint32("some.integer", 7)
    writer.add_bool("some.flag", True)
    writer.add_float32("some.number", 0.5)
    writer.add_array("some.strings", ["a", "bc", ""])
    writer.add_array("some.numbers", [1, 2, 3])
    values = {f"tensor.{index}": np.random.default_rng(index).random((6, 64), np.float32) for index in range(4)}
    for name, array in values.items():
        stored = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_pairs_and_tensors_are_read(tmp_path: Path) -> None:
    values = write(tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.text("general.architecture") == "llama"
    assert file.text("some.text") == "grüße"
    assert file.integer("some.integer") == 7
    assert file.flag("some.flag", default=False) is True
    assert file.value("some.number") == 0.5
    assert file.strings("some.strings") == ["a", "bc", ""]
    assert file.numbers("some.numbers").tolist() == [1, 2, 3]
    assert file.strings("absent") == []
    entry = file.tensors["tensor.2"]
    assert (entry.type, entry.shape, entry.row_bytes) == ("Q8_0", (6, 64), 68)
    expected = gguf.quants.quantize(values["tensor.2"], gguf.GGMLQuantizationType.Q8_0)
    view = file.read("tensor.2", 1, 4)
    assert (view.dtype, view.shape) == ("Q8_0", (3, 64))
    np.testing.assert_array_equal(np.frombuffer(view.data, np.uint8).reshape(3, 68), expected[1:4])
    vector = file.read("vector")
    assert np.frombuffer(vector.data, np.float32).tolist() == [0, 1, 2, 3, 4]
    file.release("tensor.2")


@pytest.mark.parametrize("key", ["some.integer", "some.flag", "absent"])
def test_a_value_of_another_type_is_refused(key: str, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=key):
        file.text(key)


def test_split_files_are_one(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", split_max_tensors=2)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    assert split_paths(parts[1]) == parts
    with contextlib.closing(GGUFCheckpoint(parts[0])) as checkpoint:
        assert {"tensor.0", "tensor.1", "tensor.2", "tensor.3", "vector"} == checkpoint.names()
    parts[2].unlink()
    with pytest.raises(CheckpointError, match="lacks m-00003-of-00003"):
        split_paths(parts[0])


def header(
    pairs: bytes = b"", num_pairs: int = 0, tensors: bytes = b"", num_tensors: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs) + pairs + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (32, 1), kind: int = 8, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ALIGNMENT = text(b"general.alignment") + struct.pack("<II", 4, 0)
HOSTILE = {
    "empty": b"",
    "no magic": b"GGML" + bytes(60),
    "version 1": header(version=1) + bytes(32),
    "big endian": header(version=3 << 24) + bytes(32),
    "a quintillion pairs": header(num_pairs=1 << 60),
    "a million tensors": header(num_tensors=1 << 20),
    "pairs that are not there": header(num_pairs=3),
    "an endless key": header(struct.pack("<Q", 1 << 62), 1),
    "a key that is no text": header(text(b"\xff\xfe") + struct.pack("<II", 4, 1), 1),
    "an unknown type": header(text(b"k") + struct.pack("<I", 77), 1),
    "an endless string": header(text(b"k") + struct.pack("<IQ", 8, 1 << 63), 1),
    "an endless array": header(text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 40), 1),
    "a long array that is not there": header(text(b"k") + struct.pack("<IIQ", 9, 10, 1 << 22), 1),
    "an array of arrays": header(text(b"k") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1), 1),
    "an array of lying strings": header(text(b"k") + struct.pack("<IIQQ", 9, 8, 2, 1 << 40), 1),
    "the same key twice": header((text(b"k") + struct.pack("<II", 4, 1)) * 2, 2),
    "no alignment": header(ALIGNMENT, 1) + bytes(32),
    "a tensor past the end": header(tensors=tensor(), num_tensors=1) + bytes(33),
    "a tensor of an unknown type": header(tensors=tensor(kind=5), num_tensors=1) + bytes(256),
    "a tensor at an odd place": header(tensors=tensor(offset=3), num_tensors=1) + bytes(256),
    "a tensor far away": header(tensors=tensor(offset=1 << 62), num_tensors=1) + bytes(256),
    "a tensor of parts of blocks": header(tensors=tensor(dims=(33, 1)), num_tensors=1) + bytes(256),
    "a tensor of nine dimensions": header(tensors=tensor(dims=(1,) * 9), num_tensors=1) + bytes(256),
    "a tensor of 2**120 values": header(tensors=tensor(dims=(1 << 60, 1 << 60), kind=0), num_tensors=1) + bytes(256),
    "a vector in blocks": header(tensors=tensor(dims=(32,)), num_tensors=1) + bytes(256),
    "the same tensor twice": header(tensors=tensor() * 2, num_tensors=2) + bytes(256),
    "tensors that overlap": header(tensors=tensor() + tensor(b"u"), num_tensors=2) + bytes(256),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_a_clear_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"hostile\.gguf"):
        GGUFFile(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), max_size=6),
)
def test_damaged_files_are_read_or_refused(cut: int, changes: list[tuple[int, int]], tmp_path: Path) -> None:
    """Whatever the damage: a CheckpointError, or tensors that lie inside the file."""
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        write(whole)
    data = bytearray(whole.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data[: len(data) - cut] if cut < len(data) else b"")
    try:
        file = GGUFFile(path)
    except CheckpointError:
        return
    for key in file.keys():  # noqa: SIM118  not a mapping
        with contextlib.suppress(CheckpointError):
            file.value(key)
    for name, entry in file.tensors.items():
        assert len(file.read(name).data) == (entry.shape[0] if entry.shape else 1) * entry.row_bytes


def test_names_go_both_ways() -> None:
    for name in (
        "token_embd.weight",
        "output.weight",
        "blk.12.attn_q.bias",
        "blk.0.ffn_down.weight",
        "output_norm.weight",
    ):
        assert gguf_name(hf_name(name)) == name
    assert hf_name("blk.3.attn_output.weight") == "model.layers.3.self_attn.o_proj.weight"
    assert hf_name("blk.0.ffn_gate_exps.weight") == "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    assert hf_name("blk.0.ffn_gate_exps.weight", "qwen3moe") == "model.layers.0.mlp.experts.{}.gate_proj.weight"
    assert gguf_name("model.layers.0.mlp.experts.17.gate_proj.weight") == "blk.0.ffn_gate_exps.weight"
    assert hf_name("blk.0.ffn_norm_exps.weight") == "blk.0.ffn_norm_exps.weight"
    assert gguf_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None


def test_turned_rows_undo_the_converters_permutation() -> None:
    heads, head_dim = 3, 8
    rows = np.arange(heads * head_dim)
    turned = rows.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)  # conversion/llama.py: permute
    np.testing.assert_array_equal(turned[turned_rows(head_dim, 0, heads * head_dim)], rows)
    np.testing.assert_array_equal(turned[turned_rows(head_dim, 5, 19)], rows[5:19])


def stack_of(path: Path, shape: tuple[int, ...]) -> Path:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_matrices_of_a_stack_are_read_by_themselves(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(stack_of(tmp_path / "m.gguf", (3, 4, 5)))
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(3)]
    assert checkpoint.names() == set(names)
    view = checkpoint.read(names[2], (4, 5), 1, 3)
    assert np.frombuffer(view.data, np.float32).tolist() == list(range(45, 55))
    assert (view.shape, checkpoint.row_bytes(names[2]), checkpoint.size_bytes(names[2])) == ((2, 5), 20, 80)
    del view
    checkpoint.release(names[2], 0, 4)
    checkpoint.close()


@pytest.mark.parametrize("shape", [(4, 5), (2, 2, 2, 2), (1025, 1, 1)])
def test_stacks_that_are_none_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ffn_up_exps"):
        GGUFCheckpoint(stack_of(tmp_path / "m.gguf", shape))
