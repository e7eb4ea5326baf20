"""What a reader needs to place a result: machine, versions, settings, and what the prefix cache may have held."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from penstock import __version__


def manifest(**more: Any) -> dict[str, Any]:
    """Facts of the machine that the client runs on, and `more`."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "penstock": __version__,
        "command": [Path(sys.argv[0]).name, *_without_secrets(sys.argv[1:])],
        "client_machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": platform.platform(),
            "python": platform.python_version(),
            "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        },
        **more,
    }


def _without_secrets(arguments: list[str]) -> list[str]:
    shown = list(arguments)
    for index, argument in enumerate(shown):
        if argument.startswith("--api-key="):
            shown[index] = "--api-key=..."
        elif argument == "--api-key" and index + 1 < len(shown):
            shown[index + 1] = "..."
    return shown


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
