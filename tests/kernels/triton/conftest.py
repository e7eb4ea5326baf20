"""The kernels run in Triton's interpreter, repaired. Without triton (an optional extra) there is nothing to test."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import triton_interpreter

    triton_interpreter.repair()
