"""Which kernels are chosen, and that a machine that traps is survived."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys

import pytest

from penstock import _native
from penstock.base.errors import ConfigError
from penstock.kernels import ops

STATUSES = _native.isa_statuses()


def test_portable_always_works() -> None:
    assert STATUSES[0] == ("portable", True, "")


def test_the_best_that_works_is_the_default() -> None:
    assert _native.kernels().isa == [name for name, works, _ in STATUSES if works][-1]


def test_what_does_not_work_has_a_reason() -> None:
    assert all(bool(reason) != works for _, works, reason in STATUSES)


@pytest.mark.parametrize(("name", "works", "reason"), STATUSES)
def test_a_forced_instruction_set_is_used_or_refused_with_its_reason(name: str, works: bool, reason: str) -> None:
    script = "import sys; from penstock.kernels import ops; sys.stdout.write(ops.load('native', 1).isa)"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PENSTOCK_ISA": name}, capture_output=True, text=True
    )
    if works:
        assert (done.returncode, done.stdout) == (0, name)
    else:
        assert done.returncode != 0
        assert f"'{name}' does not work on this machine: {reason}" in done.stderr


def test_an_unknown_instruction_set_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_ISA", "avx1024")
    with pytest.raises(ConfigError, match="'avx1024' is not one of: portable"):
        ops.load("native", 1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere a trap is another signal")
def test_a_trap_in_the_probe_is_survived() -> None:
    before = signal.getsignal(signal.SIGILL)
    for _ in range(3):
        assert "trap (SIGILL)" in _native.guarded_trap()
    assert signal.getsignal(signal.SIGILL) is before


POOLS = """
import torch
from penstock.kernels import ops
native = ops.load("native", 2)
native.linear(torch.randn(64, 512), ops.pack_linear(native, [torch.randn(512, 512)], torch.float32))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line})
"""


def test_one_thread_pool_with_torch() -> None:
    """The kernels' OpenMP is torch's: both are in one library, so no second pool competes for the cores.

    In a process of its own: what other tests import (sentencepiece, scikit-learn) brings a library with it.
    """
    libraries = subprocess.run([sys.executable, "-c", POOLS], capture_output=True, text=True, check=True).stdout
    assert len(libraries.split()) == 1


def test_both_kinds_have_every_op() -> None:
    reference = ops.load("reference", 2)
    native = ops.load("native", 2)
    assert (reference.kind, native.kind) == ("reference", "native")
    assert not ops.Ops.__abstractmethods__ - set(dir(reference))
    assert not ops.Ops.__abstractmethods__ - set(dir(native))
