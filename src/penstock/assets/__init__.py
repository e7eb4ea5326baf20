"""Files that ship with Penstock: the bundled demonstration model."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "model"
"""A complete checkpoint directory; MODEL_CARD.md in it says what it is and how well it does."""
