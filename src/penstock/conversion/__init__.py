"""Writing quantised checkpoints that other tools read too: GGUF files, compressed-tensors, GPTQ and AWQ directories.

Owns: the files it is asked to write, and beside them what a calibration has found so far.
Never: overwrites a file it did not begin; leaves a half-written file under its final name.
"""

from penstock.conversion.convert import TARGETS, convert
from penstock.conversion.recipe import Calibration, Recipe

__all__ = ["TARGETS", "Calibration", "Recipe", "convert"]
