"""From a setting's name to the torch device, or to an error that says why there is none and what helps."""

from __future__ import annotations

import os
from typing import Final

import torch

from penstock.base.errors import ConfigError

# Triton's dots of bfloat16 need it (A100 and later).
MIN_CUDA_CAPABILITY: Final = (8, 0)
_REMEDY: Final = "Or serve with --device cpu."


def open_device(name: str) -> torch.device:
    """name: "cpu", "cuda", "rocm", "xpu" or "mps". Raises ConfigError when torch cannot use it here."""
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        # Segments that grow leave no holes. Read at the first use of the device; what the user set stays.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    reason, remedy = _why_not(name)
    if reason:
        raise ConfigError(f"--device {name}: {reason}", remedy=f"{remedy} {_REMEDY}", param="device")
    return torch.device("cuda" if name == "rocm" else name)


def _why_not(name: str) -> tuple[str, str]:
    """(why the device cannot be used, what helps); two empty strings when it can."""
    match name:
        case "cuda":
            if torch.version.cuda is None:
                return _other_build("CUDA", "https://download.pytorch.org/whl/cu130")
            if not torch.cuda.is_available():
                return (
                    f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU it can use.",
                    "Does nvidia-smi show one, and a driver that is new enough? A container must be given its GPUs.",
                )
            found = torch.cuda.get_device_capability()
            if found < MIN_CUDA_CAPABILITY:
                return (
                    f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}; the kernels need "
                    f"{MIN_CUDA_CAPABILITY[0]}.{MIN_CUDA_CAPABILITY[1]}.",
                    "Use an A100 or a later GPU.",
                )
        case "rocm":
            if torch.version.hip is None:
                return _other_build("ROCm", "https://download.pytorch.org/whl/rocm6.4")
            if not torch.cuda.is_available():
                return f"torch {torch.__version__} (ROCm) finds no GPU it can use.", "Does rocminfo show one?"
        case "xpu":
            if not (hasattr(torch, "xpu") and torch.xpu.is_available()):
                return (
                    f"torch {torch.__version__} finds no Intel GPU.",
                    "Install torch from https://download.pytorch.org/whl/xpu, and Intel's driver.",
                )
        case "mps":
            if not torch.backends.mps.is_available():
                return f"torch {torch.__version__} finds no Apple GPU.", "It takes macOS on Apple silicon."
        case _:
            raise AssertionError(name)
    return "", ""


def _other_build(wanted: str, index: str) -> tuple[str, str]:
    return (
        f"the installed torch {torch.__version__} was built without {wanted}.",
        f"Install a build with it: pip install torch --index-url {index}.",
    )
