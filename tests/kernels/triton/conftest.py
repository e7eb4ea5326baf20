"""The kernels run in Triton's interpreter, repaired; on a card (TRITON_INTERPRET=0 pytest -m gpu), there.

Without triton (an optional extra) there is nothing to test.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

IS_ON_CARD = os.environ["TRITON_INTERPRET"] != "1" and torch.cuda.is_available()
# What asks something of the interpreter or of the compiler, or starts processes of its own.
NOT_ON_CARD = {
    "test_triton_interpreter.py", "test_triton_on_card.py", "test_triton_launches.py", "test_triton_gpu_script.py",
    "test_triton_ahead_of_time.py", "test_triton_configs.py",
}  # fmt: skip

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif IS_ON_CARD:
    import on_card

    on_card.redirect_launches()
else:
    import triton_interpreter

    triton_interpreter.repair()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lanes that a mask leaves out compute with infinities and NaN: on a GPU too, but only numpy says so."""
    quiet = [
        pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning") for what in ("invalid value", "divide by zero")
    ]
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        for mark in quiet:
            item.add_marker(mark)
        if IS_ON_CARD and item.path.name not in NOT_ON_CARD:
            item.add_marker(pytest.mark.gpu)
