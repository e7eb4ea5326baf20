"""Auto values: what the machine, and a container's limits, allow."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from penstock.base.errors import ConfigError
from penstock.config.defaults import (
    available_memory_bytes,
    check_public_bind,
    engine_options,
    is_loopback,
    machine_facts,
    usable_cores,
)
from penstock.config.resolve import EngineOptions
from penstock.config.settings import Settings, resolve


def test_unset_settings_become_the_options_defaults() -> None:
    assert engine_options(resolve({}, {}).values) == EngineOptions()


def test_set_settings_reach_the_options() -> None:
    flags = {"dtype": "float32", "max_memory": "1GiB", "num_threads": "3", "max_model_len": "99", "max_num_seqs": "2",
             "enable_prefix_caching": "false", "scheduling_policy": "priority", "kernels": "reference"}  # fmt: skip
    options = engine_options(resolve(flags, {}).values)
    assert (options.dtype, options.max_memory, options.num_threads, options.max_model_len) == (
        "float32",
        1 << 30,
        3,
        99,
    )
    assert (options.max_num_seqs, options.enable_prefix_caching) == (2, False)
    assert (options.scheduling_policy, options.kernels) == ("priority", "reference")


def test_a_cpu_quota_lowers_the_threads(tmp_path: Path) -> None:
    assert 1 <= usable_cores(tmp_path) <= (os.cpu_count() or 1)
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == usable_cores(tmp_path / "nowhere")


def test_a_memory_limit_lowers_what_is_available(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert available_memory_bytes(tmp_path) == 600_000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\nfile 3\n")
    assert available_memory_bytes(tmp_path) == 700_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) > 1_000_000


def test_facts_of_this_machine(tmp_path: Path) -> None:
    assert 1 <= machine_facts(tmp_path).num_cores <= psutil.cpu_count()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_public_bind(Settings(host=host))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "127.0.0.1.example.org", "2130706433"]
)
def test_a_public_host_without_a_key_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        check_public_bind(Settings(host=host))
    check_public_bind(Settings(host=host, api_key=("k",)))
