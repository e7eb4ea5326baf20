"""Shared by all tests. Its presence puts this directory on the import path, so that tests can import `checkpoints`."""

import os

# Triton's kernels run in its interpreter here. It looks at this when a function is decorated, those of its own library
# included, and other packages import it early: so before any import.
os.environ.setdefault("TRITON_INTERPRET", "1")
