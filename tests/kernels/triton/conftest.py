"""The kernels run in Triton's interpreter, repaired. Without triton (an optional extra) there is nothing to test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import triton_interpreter

    triton_interpreter.repair()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lanes that a mask leaves out compute with infinities and NaN: on a GPU too, but only numpy says so."""
    quiet = [
        pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning") for what in ("invalid value", "divide by zero")
    ]
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in quiet:
                item.add_marker(mark)
