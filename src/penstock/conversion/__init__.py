"""Writing quantised checkpoints that other tools read too: GGUF files and compressed-tensors directories.

Owns: the files it is asked to write.
Never: overwrites a file it did not begin; leaves a half-written file under its final name.
"""

from penstock.conversion.convert import TARGETS, convert

__all__ = ["TARGETS", "convert"]
