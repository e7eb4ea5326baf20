"""Runs the kernel tests on the machine code of the AMX kernels, on a processor with AVX-512 but without AMX.

    python tools/amx_emulator/run_tests.py [pytest's arguments]

Builds the native core once more, in build/amx-emulated (some minutes the first time), so that it offers AMX without
asking the processor; AMX instructions then trap and are carried out by emulate.cpp. Says nothing about speed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import nanobind
import pytest

_ROOT = Path(__file__).resolve().parents[2]
_BUILD = _ROOT / "build" / "amx-emulated"
_EMULATOR = _BUILD / "libamx_emulator.so"
_NATIVE = _BUILD / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
_TESTS = ["tests/kernels", "--ignore=tests/kernels/triton", "--ignore=tests/kernels/test_dispatch.py", "-k", "amx"]


def main() -> int:
    if os.environ.get("LD_PRELOAD") == str(_EMULATOR):
        return _test()
    _build()
    return subprocess.call([sys.executable, __file__, *sys.argv[1:]], env={**os.environ, "LD_PRELOAD": str(_EMULATOR)})


def _build() -> None:
    source = Path(__file__).with_name("emulate.cpp")
    configure = [
        "cmake", "-S", _ROOT, "-B", _BUILD, "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_PREFIX_PATH={nanobind.cmake_dir()}", "-DCMAKE_CXX_FLAGS=-DPENSTOCK_AMX_IS_EMULATED",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", _BUILD, "--parallel", str(os.cpu_count() or 1)], check=True)
    subprocess.run(
        [
            "c++",
            "-std=c++20",
            "-O2",
            "-Wall",
            "-Wextra",
            "-fPIC",
            "-shared",
            "-ftls-model=initial-exec",
            source,
            "-o",
            _EMULATOR,
        ],
        check=True,
    )


def _test() -> int:
    """With the emulator preloaded. pytest's faulthandler would take its signal away."""
    loader = ExtensionFileLoader("penstock._native", str(_NATIVE))
    spec = importlib.util.spec_from_file_location("penstock._native", _NATIVE, loader=loader)
    assert spec is not None
    native = sys.modules["penstock._native"] = importlib.util.module_from_spec(spec)
    loader.exec_module(native)
    amx_works = {name: works for name, works, _ in native.isa_statuses()}["amx"]
    assert amx_works, native.isa_statuses()
    os.chdir(_ROOT)
    return pytest.main(["-p", "no:faulthandler", *_TESTS, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
