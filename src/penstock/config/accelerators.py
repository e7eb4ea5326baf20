"""Which accelerator "auto" means, found without importing torch: its build from a file, the driver from /dev.

Owns: nothing. A wrong guess is corrected by the engine, which asks torch (kernels/devices.py).
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from penstock.config.settings import hidden_devices

_DEV = Path("/dev")


def find_accelerator(dev: Path = _DEV) -> str:
    """ "cuda" or "rocm" where the installed torch was built for it and its driver shows a device; else empty."""
    build = torch_build()
    if build == "cuda" and any(dev.glob("nvidia[0-9]*")) and not hidden_devices("cuda"):
        return "cuda"
    if build == "rocm" and (dev / "kfd").exists() and not hidden_devices("rocm"):
        return "rocm"
    return ""


def torch_build(version_file: Path | None = None) -> str:
    """What the installed torch was built for: "cuda", "rocm" or "cpu"; "" without a torch."""
    if version_file is None:
        found = importlib.util.find_spec("torch")
        if found is None or found.origin is None:
            return ""
        version_file = Path(found.origin).parent / "version.py"
    try:
        text = version_file.read_text(encoding="utf-8")
    except OSError:
        return ""
    for name, build in (("cuda", "cuda"), ("hip", "rocm")):
        if re.search(rf"^{name}\b[^=\n]*=\s*['\"]", text, re.MULTILINE):
            return build
    return "cpu"
