"""Runs kernels made for processors that are not here, on one with AVX-512: AMX's, emulated, and AVX-VNNI's.

    python tools/foreign_instructions/run.py [pytest's arguments]
    python tools/foreign_instructions/run.py --script benchmarks/formats.py [its arguments]

Builds the native core once more, in build/foreign (some minutes the first time), so that it offers both without asking
the processor. AMX instructions then trap and are carried out by emulate_amx.cpp, which says nothing about speed. Of
AVX-VNNI, whose one instruction AVX-512 has by another name, the name alone is another, so its speed can be measured.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import nanobind
import pytest

_ROOT = Path(__file__).resolve().parents[2]
_BUILD = _ROOT / "build" / "foreign"
_EMULATOR = _BUILD / "libamx_emulator.so"
_NATIVE = _BUILD / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
_TESTS = ["tests/kernels", "--ignore=tests/kernels/triton", "--ignore=tests/kernels/test_dispatch.py"]


def main() -> int:
    if os.environ.get("LD_PRELOAD") == str(_EMULATOR):
        return _run(sys.argv[1:])
    _build()
    return subprocess.call([sys.executable, __file__, *sys.argv[1:]], env={**os.environ, "LD_PRELOAD": str(_EMULATOR)})


def _build() -> None:
    source = Path(__file__).with_name("emulate_amx.cpp")
    configure = [
        "cmake", "-S", _ROOT, "-B", _BUILD, "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_PREFIX_PATH={nanobind.cmake_dir()}", "-DCMAKE_CXX_FLAGS=-DPENSTOCK_HAS_FOREIGN_INSTRUCTIONS",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", _BUILD, "--parallel", str(os.cpu_count() or 1)], check=True)
    compiler = [
        "c++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-ftls-model=initial-exec",
    ]  # fmt: skip
    subprocess.run([*compiler, source, "-o", _EMULATOR], check=True)


def _run(arguments: list[str]) -> int:
    """With the emulator preloaded. pytest's faulthandler would take its signal away."""
    loader = ExtensionFileLoader("penstock._native", str(_NATIVE))
    spec = importlib.util.spec_from_file_location("penstock._native", _NATIVE, loader=loader)
    assert spec is not None
    native = sys.modules["penstock._native"] = importlib.util.module_from_spec(spec)
    loader.exec_module(native)
    works = {name: works for name, works, _ in native.isa_statuses()}
    assert all(works[name] for name in ("amx", "avx_vnni")), native.isa_statuses()
    os.chdir(_ROOT)
    if arguments[:1] == ["--script"]:
        sys.argv = arguments[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    return pytest.main(["-p", "no:faulthandler", *_TESTS, "-k", "amx or avx_vnni", *arguments])


if __name__ == "__main__":
    sys.exit(main())
