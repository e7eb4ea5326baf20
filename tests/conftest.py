"""Shared by all tests. Its presence puts this directory on the import path, so that tests can import `checkpoints`."""

import os

# Triton's kernels run in its interpreter here. It looks at this when a function is decorated, those of its own library
# included, and other packages import it early: so before any import.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none, or where kernels are interpreted."""
    import pytest
    import torch

    if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] != "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU, or kernels are interpreted"))
