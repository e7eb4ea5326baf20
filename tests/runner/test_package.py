"""A compiled package: the same weights to the bit, read straight into place, and refused where it does not fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
import torch
from driving import Driver, engine_config
from safetensors import safe_open

from checkpoints import write_checkpoint
from gguf_files import write_gguf
from penstock import LLM, SamplingParams
from penstock.base.errors import CheckpointError, ConfigError, PenstockError
from penstock.cli.compile import copy_text_files
from penstock.cli.main import main
from penstock.frontend.text_files import TextFiles
from penstock.kernels import ops as op_table
from penstock.kernels.layouts import HostLayouts
from penstock.kernels.quantized import GGUF_LAYOUTS, INT8_CHANNEL, w4a16
from penstock.loader import read_model_config
from penstock.loader.package import MANIFEST, WEIGHTS
from penstock.runner import ModelRunner, loading
from penstock.runner.loading import load_model, weights_nbytes, write_package
from penstock.runner.staged_copies import StagedCopies, staging_for
from penstock.runner.step_device import HostBackend

PROMPT = [5, 17, 80, 3, 9]


def compile_to(output: Path, source: Path, **overrides: object) -> Path:
    config = engine_config(source, **overrides)
    output.mkdir()
    write_package(config, op_table.load("native", 2), output, lambda fraction: None)
    copy_text_files(source, output)
    return output


def first_tokens(config) -> list[int]:
    driver = Driver(ModelRunner(config, lambda phase, fraction: None))
    sequence = driver.start("one", PROMPT)
    driver.generate([sequence], 8)
    return sequence.output


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen2-moe"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"quantization": "q4_k_m"}])
def test_a_package_gives_the_tokens_and_takes_the_memory_of_its_checkpoint(tmp_path, family, options):
    source = tmp_path / "checkpoint"
    write_checkpoint(source, family=family, tie_word_embeddings=family == "qwen2")
    package = compile_to(tmp_path / "package", source, **options)
    dtype = options.get("dtype", "float32")
    assert read_model_config(package).dtype == dtype
    packed = engine_config(package, dtype=dtype)
    stored = engine_config(source, **options)
    assert first_tokens(packed) == first_tokens(stored)
    ops = op_table.load("reference", 1)
    assert weights_nbytes(packed, ops) == weights_nbytes(stored, ops)


def test_the_file_is_a_safetensors_file_whose_tensors_begin_on_pages(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    package = compile_to(tmp_path / "package", tmp_path / "checkpoint")
    with safe_open(package / WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == set(json.loads((package / MANIFEST).read_text())["entries"])
    header_bytes = int.from_bytes((package / WEIGHTS).read_bytes()[:8], "little")
    header = json.loads((package / WEIGHTS).read_bytes()[8 : 8 + header_bytes])
    assert all((8 + header_bytes + entry["data_offsets"][0]) % 4096 == 0 for entry in header.values())
    assert not (package / (WEIGHTS + ".part")).exists()


def test_the_command_writes_what_the_offline_engine_starts_from(tmp_path, capsys):
    bundled = Path(__file__).parents[2] / "src/penstock/assets/model"
    output = tmp_path / "package"
    assert main(["compile", str(bundled), str(output), "--quantization", "int8"]) == 0
    assert "penstock serve" in capsys.readouterr().out
    params, options = SamplingParams(temperature=0.0, max_tokens=8), {"max_num_seqs": 2, "max_memory": 256 << 20}
    with LLM(str(output), **options) as llm:
        packed = llm.generate(["Hello"], params)[0].outputs[0].token_ids
    with LLM(str(bundled), quantization="int8", **options) as llm:
        assert llm.generate(["Hello"], params)[0].outputs[0].token_ids == packed
    assert main(["compile", str(bundled), str(output)]) == 2, "not over what is there"
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3-moe"])
def test_a_gguf_is_compiled_with_its_text(family, tmp_path, capsys):
    checkpoint, file, output = tmp_path / "checkpoint", tmp_path / "model.gguf", tmp_path / "package"
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "moe_intermediate_size": 32}
    write_checkpoint(checkpoint, family, tokenizer=True, norm_topk_prob=True, num_attention_heads=4, **sizes)
    write_gguf(file, checkpoint, "Q8_0")
    assert main(["compile", str(file), str(output), "--dtype", "bfloat16"]) == 0
    assert "MiB" in capsys.readouterr().out
    assert read_model_config(output) == msgspec.structs.replace(read_model_config(file), dtype="bfloat16")
    texts = [TextFiles.read(path) for path in (file, output)]
    assert texts[0].templates == texts[1].templates
    assert texts[0].special_tokens == texts[1].special_tokens
    assert texts[0].backend.to_str() == texts[1].backend.to_str()
    assert first_tokens(engine_config(output, dtype="bfloat16")) == first_tokens(engine_config(file, dtype="bfloat16"))
    params, options = SamplingParams(temperature=0.0, max_tokens=8), {"max_num_seqs": 2, "max_memory": 256 << 20}
    with LLM(str(output), **options) as llm:
        assert llm.generate(["the quick brown"], params)[0].outputs[0].token_ids


class LateCopies(HostBackend):
    """A device whose copies are made as late as may be: when they are waited for, and the rest in `finish`."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.log: list[str] = []
        self.open: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self, destination, source):
        self.log.append("start")
        self.open.append((destination, source))

    def event(self):
        return LateEnd(self)

    def make(self) -> None:
        destination, source = self.open.pop(0)
        destination.copy_(source)
        source.fill_(255)  # what is read from a piece again is wrong

    def finish(self) -> None:
        while self.open:
            self.make()


class LateEnd:
    """Of the copy before it."""

    def __init__(self, copies: LateCopies) -> None:
        self.copies = copies

    def record(self) -> None:
        self.copy = self.copies.open[-1]

    def synchronize(self) -> None:
        assert self.copies.open[0] is self.copy, "copies end in their order"
        self.copies.log.append("waited")
        self.copies.make()

    def wait(self) -> None:
        raise AssertionError("the host waits")


@pytest.mark.parametrize("options", [{}, {"quantization": "q4_k_m"}], ids=str)
@pytest.mark.parametrize("piece_bytes", [4096, 1000, 1 << 20])
def test_a_device_gets_its_weights_in_pieces_beside_the_reading(tmp_path, monkeypatch, options, piece_bytes):
    source, copies = tmp_path / "checkpoint", LateCopies()
    write_checkpoint(source)
    package = compile_to(tmp_path / "package", source, **options)
    expected = first_tokens(engine_config(package))
    monkeypatch.setattr(loading, "staging_for", lambda _device: StagedCopies(copies, piece_bytes))
    runner = ModelRunner(engine_config(package), lambda phase, fraction: None)
    assert len(copies.open) <= 2
    if copies.log.count("start") > 2:
        # One copy is on its way while the next piece is read; a piece is waited for when it is filled again.
        assert copies.log[:4] == ["start", "start", "waited", "start"]
        assert copies.log.count("waited") == copies.log.count("start") - 2
    copies.finish()
    driver = Driver(runner)
    sequence = driver.start("one", PROMPT)
    driver.generate([sequence], 8)
    assert sequence.output == expected


def test_copies_to_a_device_that_is_waited_for_are_made_at_once():
    assert staging_for(torch.device("cpu")) is None
    target, data = torch.zeros(10, dtype=torch.uint8), bytes(range(10))

    def read(first: int, memory: memoryview) -> None:
        memory[:] = data[first : first + len(memory)]

    StagedCopies(HostBackend(torch.device("xpu")), 4).fill(target, read)
    assert bytes(target.numpy()) == data


@pytest.fixture
def package(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    return compile_to(tmp_path / "package", tmp_path / "checkpoint")


def load(package: Path, **overrides: object) -> None:
    load_model(engine_config(package, **overrides), op_table.load("native", 1), lambda fraction: None)


def edit_manifest(package: Path, change) -> None:
    manifest = json.loads((package / MANIFEST).read_text())
    change(manifest)
    (package / MANIFEST).write_text(json.dumps(manifest))


def test_another_layout_is_refused_by_name(package):
    edit_manifest(package, lambda manifest: manifest.update(layouts="triton-1"))
    with pytest.raises(CheckpointError, match=f"layout triton-1; this engine's is {HostLayouts.version}") as refused:
        load(package)
    assert "Compile the model again" in refused.value.remedy


def test_another_dtype_or_quantization_is_refused_by_name(package):
    with pytest.raises(ConfigError, match="compiled with dtype float32"):
        load(package, dtype="bfloat16")
    with pytest.raises(ConfigError, match="quantization not set"):
        load(package, quantization="int8")


CHANGES = {
    "format": lambda manifest: manifest.update(format_version=99),
    "fewer bytes": lambda manifest: next(iter(manifest["entries"].values())).update(nbytes=4),
    "more bytes": lambda manifest: next(iter(manifest["entries"].values())).update(nbytes=2**40),
    "shape": lambda manifest: next(iter(manifest["entries"].values())).update(shape=[2**40, 2]),
    "no entries": lambda manifest: manifest.update(entries={}),
    "layout": lambda manifest: next(iter(manifest["entries"].values())).update(kind="quantized", layout={"bits": 77}),
    "type": lambda manifest: manifest.update(dtype=5),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_wrong_manifest_is_an_error_and_no_crash(package, change):
    config = engine_config(package)
    edit_manifest(package, CHANGES[change])
    with pytest.raises(PenstockError):
        load_model(config, op_table.load("native", 1), lambda fraction: None)


def test_a_file_that_was_cut_is_an_error(package):
    config = engine_config(package)
    with (package / WEIGHTS).open("r+b") as file:
        file.truncate((1 << 20) + 5000)
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(config, op_table.load("native", 1), lambda fraction: None)


def test_a_failed_compile_leaves_no_package(tmp_path):
    source, output = tmp_path / "checkpoint", tmp_path / "package"
    write_checkpoint(source)
    config = engine_config(source)
    config = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, num_layers=9))
    output.mkdir()
    with pytest.raises(CheckpointError):
        write_package(config, op_table.load("native", 1), output, lambda fraction: None)
    assert list(output.iterdir()) == []


# When packed bytes change, HostLayouts.version must: packages of before are then refused instead of read wrong.
FINGERPRINTS = {"host-2": "a0144a5e1f740e34"}


def test_a_version_of_the_layouts_is_of_these_bytes():
    ops = op_table.load("reference", 1)
    digest = hashlib.sha256()
    source = ((torch.arange(40 * 512) * 2654435761 % 1009).float() / 1009 - 0.5).view(40, 512)
    for dtype in (torch.float32, torch.bfloat16):
        digest.update(op_table.pack_linear(ops, [source], dtype).data.view(torch.uint8).numpy().tobytes())
    for layout in (INT8_CHANNEL, w4a16(128), *GGUF_LAYOUTS.values()):
        packed = ops.layouts.empty_quantized(40, 512, layout, torch.bfloat16)
        packed.data.zero_()
        if layout.scales == "super":
            ops.pack_gguf(packed, 0, _blocks(layout), _ggml_type(layout))
        else:
            groups = 512 // layout.group_size if layout.group_size else 1
            codes = (torch.arange(40 * 512) * 7 % (1 << layout.bits)).to(torch.uint8).view(40, 512)
            scales = (torch.arange(40 * groups).float().view(40, groups) % 13 + 1) / 16
            ops.pack_parts(packed, 0, codes, scales, None if layout.minimums == "none" else scales)
        digest.update(packed.data.numpy().tobytes())
    assert digest.hexdigest()[:16] == FINGERPRINTS[HostLayouts.version]


def _ggml_type(layout) -> int:
    return next(kind for kind, known in GGUF_LAYOUTS.items() if known == layout)


def _blocks(layout) -> torch.Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(_ggml_type(layout))]
    count = 40 * 512 // elements * nbytes
    return (torch.arange(count) * 31 % 59).to(torch.uint8).view(40, -1)
