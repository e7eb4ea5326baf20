"""Finding and reading checkpoints: hub cache, safetensors mapping.

Owns: mappings of checkpoint files.
Never: executes anything that came with a model; imports torch (the frontend loads tokenizers through here).
"""

from penstock.loader.checkpoint import Checkpoint, read_model_config
from penstock.loader.hub import resolve
from penstock.loader.safetensors_file import SafetensorsFile, TensorView

__all__ = ["Checkpoint", "SafetensorsFile", "TensorView", "read_model_config", "resolve"]
