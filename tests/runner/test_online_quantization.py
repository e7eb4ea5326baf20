"""Float checkpoints rounded while they load: what is held, how close it is, and that the peak stays small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from driving import Driver, engine_config, make_runner

from checkpoints import write_checkpoint
from penstock.kernels import ops as op_table
from penstock.runner.loading import load_model, weights_nbytes

SIZES = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
# Most relative error (root mean square) of a weight of normal numbers.
KINDS = {"int8": 0.012, "int4": 0.12, "q4_k_m": 0.08, "fp8": 0.03}


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_and_counted(kind: str, kernels: str, tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path, **SIZES)
    config = engine_config(tmp_path, quantization=kind, kernels=kernels)
    ops = op_table.load(kernels, 1)
    model = load_model(config, ops, lambda fraction: None)
    expected = theirs.model.layers[1].mlp.down_proj.weight
    found = ops.dequantize(model.layers[1].mlp.down.weight.packed)
    assert (found - expected).square().mean().sqrt() < KINDS[kind] * expected.square().mean().sqrt()
    x = torch.randn(5, SIZES["intermediate_size"], generator=torch.Generator().manual_seed(0))
    product = model.layers[1].mlp.down(x, ops)
    assert (product - x @ found.T).square().mean().sqrt() < 0.02 * product.square().mean().sqrt()
    layouts = {type(model.embedding.weight.packed).__name__, type(model.head.weight.packed).__name__}
    assert layouts == {"PackedLinear", "QuantizedLinear"}
    head_bits = 6 if kind == "q4_k_m" else 8
    assert (model.head.weight.packed.layout.bits, model.head.weight.packed.layout.values) == (head_bits, "integer")
    plain = weights_nbytes(engine_config(tmp_path), ops)
    assert weights_nbytes(config, ops) < (0.55 if kind in ("int8", "fp8") else 0.45) * plain


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_rounded_and_routers_are_not(kind: str, tmp_path: Path) -> None:
    sizes = {**SIZES, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    theirs = write_checkpoint(tmp_path, "qwen2-moe", num_hidden_layers=1, **sizes)
    config, ops = engine_config(tmp_path, quantization=kind), op_table.load("native", 1)
    mlp = load_model(config, ops, lambda fraction: None).layers[0].mlp
    routers = [mlp.router.weight.packed, mlp.shared.router.weight.packed]
    assert {type(router).__name__ for router in routers} == {"PackedLinear"}
    for expert in range(6):
        expected = theirs.model.layers[0].mlp.experts.down_proj[expert]
        found = ops.dequantize(mlp.experts.down[expert].packed)
        assert (found - expected).square().mean().sqrt() < KINDS[kind] * expected.square().mean().sqrt()
    plain = weights_nbytes(engine_config(tmp_path), ops)
    assert weights_nbytes(config, ops) < (0.55 if kind in ("int8", "fp8") else 0.45) * plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_quantized_model_generates(family: str, kind: str, tmp_path: Path) -> None:
    """Alone and together, in one piece and in chunks: the same tokens."""
    write_checkpoint(tmp_path, family, tie_word_embeddings=True, **SIZES)
    prompts = [[5, 9, 200, 31, 7], list(range(3, 120)), [42]]
    results = []
    for chunk, together in ((None, True), (16, True), (None, False)):
        driver = Driver(make_runner(tmp_path, quantization=kind, dtype="bfloat16"))
        sequences = [driver.start(str(index), prompt) for index, prompt in enumerate(prompts)]
        for group in [sequences] if together else [[sequence] for sequence in sequences]:
            driver.generate(group, 16, chunk)
        assert all(sequence.error is None for sequence in sequences)
        results.append([sequence.output for sequence in sequences])
    assert results[0] == results[1] == results[2]


PEAK_PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from driving import engine_config
from penstock.kernels import ops as op_table
from penstock.runner.loading import load_model, weights_nbytes

def resident(field):
    [line] = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) * 1024

config = engine_config(Path(sys.argv[1]), dtype="bfloat16", quantization="int8")
ops = op_table.load("native", 2)
torch.ones(8) @ torch.ones(8)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = resident("VmRSS")
model = load_model(config, ops, lambda fraction: None)
print(json.dumps({"weights": weights_nbytes(config, ops), "peak": resident("VmHWM") - before}))
"""


def test_the_float_weights_are_never_all_there(tmp_path: Path) -> None:
    """A 230 MB model in bfloat16: at most its quantised size and one layer (14 MB) are resident, and some slack."""
    write_checkpoint(
        tmp_path, dtype="bfloat16", vocab_size=8_000, hidden_size=768, intermediate_size=3072, num_hidden_layers=14,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    import driving

    arguments = [str(tmp_path), str(Path(driving.__file__).parent)]
    done = subprocess.run([sys.executable, "-c", PEAK_PROGRAM, *arguments], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["weights"] > 110e6
    assert measured["peak"] <= measured["weights"] + 32e6, measured
