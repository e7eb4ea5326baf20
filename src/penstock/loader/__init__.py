"""Finding and reading checkpoints: hub cache, mapped safetensors and GGUF.

Owns: mappings of checkpoint files.
Never: executes anything that came with a model; imports torch (the frontend loads tokenizers through here).
"""

from penstock.loader.body_checkpoint import BodyCheckpoint
from penstock.loader.checkpoint import Checkpoint, SafetensorsCheckpoint, open_checkpoint, read_model_config
from penstock.loader.gguf_checkpoint import GGUFCheckpoint
from penstock.loader.gguf_file import GGUFFile
from penstock.loader.hub import resolve
from penstock.loader.mapped_tensor import TensorView
from penstock.loader.package import PackageManifest, PackageReader, PackageWriter, is_package
from penstock.loader.safetensors_file import SafetensorsFile

__all__ = [
    "BodyCheckpoint",
    "Checkpoint",
    "GGUFCheckpoint",
    "GGUFFile",
    "PackageManifest",
    "PackageReader",
    "PackageWriter",
    "SafetensorsCheckpoint",
    "SafetensorsFile",
    "TensorView",
    "is_package",
    "open_checkpoint",
    "read_model_config",
    "resolve",
]
