"""Puts the root of the checkout on the import path, for `tools.bundled_model`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
