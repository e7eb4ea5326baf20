"""A device that is not there is refused with what is wrong and what helps; auto finds what torch was built for."""

from __future__ import annotations

import pytest
import torch

from penstock.base.errors import ConfigError
from penstock.config import accelerators
from penstock.config.accelerators import find_accelerator, torch_build
from penstock.config.model import ModelConfig
from penstock.config.resolve import EngineOptions, MachineFacts, resolve_engine_config
from penstock.config.settings import hidden_devices
from penstock.kernels import ops as op_table
from penstock.kernels.devices import open_device

MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }
)  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="torch is a GPU build")
@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_a_cpu_build_of_torch_is_named(name):
    with pytest.raises(ConfigError) as refused:
        open_device(name)
    assert torch.__version__ in refused.value.message
    assert "built without" in refused.value.message
    assert "--index-url" in refused.value.remedy
    assert "--device cpu" in refused.value.remedy
    assert refused.value.param == "device"


def test_a_cuda_build_without_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU"):
        open_device("cuda")


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5"):
        open_device("cuda")


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4.1'\n", "rocm"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", "cpu"),
        ("cuda = '12.8'\n", "cuda"),
    ],
)
def test_the_build_is_read_from_torchs_own_file(tmp_path, text, build):
    file = tmp_path / "version.py"
    file.write_text(text)
    assert torch_build(file) == build


def test_this_torchs_build_is_read_right():
    assert torch_build() == ("cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu")


def test_auto_takes_the_gpu_that_torch_was_built_for(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(accelerators, "torch_build", lambda: "cuda")
    assert find_accelerator(tmp_path) == ""
    (tmp_path / "nvidia0").touch()
    assert find_accelerator(tmp_path) == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_accelerator(tmp_path) == ""
    monkeypatch.setattr(accelerators, "torch_build", lambda: "rocm")
    (tmp_path / "kfd").touch()
    assert find_accelerator(tmp_path) == "rocm"


def test_devices_are_hidden_by_the_vendors_variable():
    assert not hidden_devices("cuda", {})
    assert not hidden_devices("cuda", {"CUDA_VISIBLE_DEVICES": "1"})
    assert hidden_devices("cuda", {"CUDA_VISIBLE_DEVICES": "-1"})
    assert hidden_devices("rocm", {"HIP_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize(
    ("options", "machine", "device", "kernels"),
    [
        ({}, {}, "cpu", "native"),
        ({}, {"accelerator": "cuda"}, "cuda", "triton"),
        ({"device": "cpu"}, {"accelerator": "cuda"}, "cpu", "native"),
        ({"device": "rocm"}, {"has_native": False}, "rocm", "triton"),
        ({"device": "mps"}, {}, "mps", "reference"),
        ({"device": "cuda", "kernels": "reference"}, {}, "cuda", "reference"),
        ({}, {"has_native": False}, "cpu", "reference"),
    ],
)
def test_device_and_kernels_follow_from_wishes_and_machine(options, machine, device, kernels):
    facts = MachineFacts(num_cores=2, **machine)
    config = resolve_engine_config("x", MODEL, EngineOptions(**options), facts)
    assert (config.device, config.kernels) == (device, kernels)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, (64, 512)),
        ({"device": "mps"}, (64, 512)),
        ({"device": "cuda"}, (256, 8192)),
        ({"device": "rocm", "max_num_seqs": 5}, (5, 8192)),
        ({"device": "cuda", "max_num_batched_tokens": 300}, (256, 300)),
    ],
)
def test_how_large_a_step_may_be_follows_from_the_device(options, limits):
    config = resolve_engine_config("x", MODEL, EngineOptions(**options), MachineFacts(num_cores=2)).scheduler
    assert (config.max_num_seqs, config.max_num_batched_tokens) == limits


def test_native_kernels_on_a_gpu_are_refused():
    with pytest.raises(ConfigError, match="device is cuda"):
        resolve_engine_config("x", MODEL, EngineOptions(device="cuda", kernels="native"), MachineFacts(num_cores=2))


def test_triton_on_the_cpu_is_refused_outside_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="run on a GPU"):
        op_table.load("triton", 1)


def test_triton_without_a_compiler_is_refused_with_what_helps(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(ConfigError, match="C compiler") as refused:
        op_table.load("triton", 1, device=torch.device("cuda"))
    assert "gcc" in refused.value.remedy
