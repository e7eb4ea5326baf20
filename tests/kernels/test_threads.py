"""The threads of OpenMP that kernels work with, in a process that has no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from penstock.kernels.native.dtypes import DTYPE_CODE

PROGRAM = """
import os, sys, time
from penstock import _native

def num_threads():
    return len(os.listdir("/proc/self/task"))

def multiply():
    return _native.kernels("portable").multiply_all(int(sys.argv[1]), 100, 3)

before = num_threads()
expected = multiply()
assert num_threads() == before + 2
_native.release_threads()
deadline = time.monotonic() + 10  # a thread that was joined is listed a little longer
while num_threads() > before and time.monotonic() < deadline:
    time.sleep(0.001)
assert num_threads() == before
assert multiply() == expected and num_threads() == before + 2
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_released_threads_end_and_come_back() -> None:
    code = DTYPE_CODE[torch.float32]
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(code)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
