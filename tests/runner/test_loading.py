"""From a checkpoint directory to a model: what is read, what is refused, and how much memory it takes at its peak."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from driving import engine_config
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from penstock.base.errors import CheckpointError
from penstock.kernels import ops as op_table
from penstock.runner.loading import load_model, weights_nbytes


def load(path, **overrides):
    config = engine_config(path, kernels="reference", **overrides)
    return load_model(config, op_table.load("reference", 1), lambda fraction: None)


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path)
    return tmp_path


def rewrite(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_tensor_that_is_missing_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(checkpoint)


def test_a_tensor_that_nothing_uses_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(84)}))
    with pytest.raises(CheckpointError, match=r"1 tensors.*model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(checkpoint)


def test_a_tensor_of_another_shape_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(61)}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has the shape \[61\].*\[60\]"):
        load(checkpoint)


def test_a_quantized_tensor_is_refused(checkpoint):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"down_proj.*I8"):
        load(checkpoint)


def test_stored_rotary_tables_and_tied_heads_are_passed_over(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(7),
        "lm_head.weight": torch.ones(211, 60),
    }
    rewrite(tmp_path, lambda tensors: tensors.update(extra))
    load(tmp_path)


def test_shards_give_the_same_model(tmp_path):
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    write_checkpoint(whole)
    write_checkpoint(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    one, many = load(whole), load(shards)
    assert torch.equal(one.head.weight.packed.data, many.head.weight.packed.data)
    for first, second in zip(one.layers, many.layers, strict=True):
        assert torch.equal(first.mlp.gate_up.weight.packed.data, second.mlp.gate_up.weight.packed.data)


def test_progress_grows_to_one(checkpoint):
    seen = []
    load_model(engine_config(checkpoint, kernels="reference"), op_table.load("reference", 1), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_weights_are_measured_as_they_will_be(checkpoint):
    config = engine_config(checkpoint, kernels="reference")
    model = load(checkpoint)
    linears = [model.embedding, model.head]
    norms = [model.norm]
    for layer in model.layers:
        linears += [layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down]
        norms += [layer.attention_norm, layer.mlp_norm]
    total = sum(linear.weight.packed.nbytes for linear in linears) + sum(norm.weight_K.nbytes for norm in norms)
    assert weights_nbytes(config, op_table.load("reference", 1)) == total


def test_dummy_weights_need_a_config_alone_and_repeat_by_seed(checkpoint, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    first, again, other = (load(bare, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    data = [model.layers[1].mlp.down.weight.packed.data for model in (first, again, other)]
    assert torch.equal(data[0], data[1])
    assert not torch.equal(data[0], data[2])
    assert 0.05 < float(data[0].std()) < 0.2


PEAK_PROGRAM = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from driving import engine_config
from penstock.kernels import ops as op_table
from penstock.runner.loading import load_model, weights_nbytes

def resident(field):
    [line] = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) * 1024

config = engine_config(Path(sys.argv[1]), dtype="bfloat16")
ops = op_table.load(sys.argv[3], 2)
torch.ones(8) @ torch.ones(8)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = resident("VmRSS")
model = load_model(config, ops, lambda fraction: None)
print(json.dumps({"weights": weights_nbytes(config, ops), "peak": resident("VmHWM") - before}))
"""


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_peak_memory_stays_near_the_weights(stored, tmp_path):
    """A 200 MB model: at most the weights and 15 % are resident, whether the file is converted or not."""
    write_checkpoint(
        tmp_path, dtype=stored, vocab_size=20_000, hidden_size=768, intermediate_size=3072, num_hidden_layers=8,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    from driving import __file__ as driving_path

    arguments = [str(tmp_path), str(driving_path).rsplit("/", 1)[0], "native"]
    done = subprocess.run([sys.executable, "-c", PEAK_PROGRAM, *arguments], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["weights"] > 150e6
    assert measured["peak"] <= 1.15 * measured["weights"], measured
