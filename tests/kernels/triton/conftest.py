"""The kernels run in Triton's interpreter, repaired."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton_interpreter

triton_interpreter.repair()
