"""`penstock doctor`: facts of this machine, and checks that each end in "ok" or in a remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from penstock import __version__
from penstock.assets import BUNDLED_MODEL
from penstock.base.errors import PenstockError
from penstock.config.defaults import available_memory_bytes, usable_cores
from penstock.config.settings import Settings, format_size, resolve

_PACKAGES: Final = (
    "torch", "numpy", "msgspec", "tokenizers", "jinja2", "huggingface-hub", "safetensors", "starlette", "uvicorn",
    "uvloop", "httptools", "prometheus-client",
)  # fmt: skip
_NATIVE_PROBE: Final = """
import torch, penstock._native as native
for name, works, reason in native.isa_statuses():
    print(f"{name}: {'works' if works else reason}")
print("chosen: " + native.kernels().isa)
"""
MIN_OPEN_FILES: Final = 4096
MIN_FREE_MEMORY_BYTES: Final = 1 << 30
PROBE_TIMEOUT_S: Final = 120


@dataclass(frozen=True)
class Finding:
    """remedy: empty when nothing is wrong."""

    name: str
    fact: str
    remedy: str = ""


def doctor() -> int:
    """Prints every finding; 1 when one of them is a problem."""
    problems = 0
    for check in CHECKS:
        for finding in _run_check(check):
            problems += bool(finding.remedy)
            mark = "PROBLEM" if finding.remedy else "ok     "
            print(f"{mark}  {finding.name}: {finding.fact}", flush=True)
            if finding.remedy:
                print(f"         remedy: {finding.remedy}", flush=True)
    print(f"{problems} problem{'s' if problems != 1 else ''} found." if problems else "No problems found.")
    return 1 if problems else 0


def _run_check(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of one check; a check that fails itself is a finding, too."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(check.__name__.strip("_"), f"the check failed: {error!r}", "Report this as a bug.")


def _versions() -> Iterator[Finding]:
    yield Finding("penstock", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed", f"pip install {name}")


def _machine() -> Iterator[Finding]:
    logical, cores = os.cpu_count() or 1, usable_cores()
    yield Finding(
        "cores", f"{cores} usable of {psutil.cpu_count(logical=False) or logical} physical, {logical} logical"
    )
    total, free = psutil.virtual_memory().total, available_memory_bytes()
    remedy = "Close other programs, or give the container more." if free < MIN_FREE_MEMORY_BYTES else ""
    yield Finding("memory", f"{format_size(free)} available of {format_size(total)}", remedy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = f"Raise it: ulimit -n {MIN_OPEN_FILES}" if soft < MIN_OPEN_FILES else ""
    yield Finding("open files", f"limit {soft} (hard {hard}): one for each connection", remedy)


def _native_core() -> Iterator[Finding]:
    """In a process of its own: a machine that reports instructions it does not have may kill who tries them."""
    probe = subprocess.run(
        [sys.executable, "-c", _NATIVE_PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
    )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        yield Finding("native core", reason, "Reinstall with a C++20 compiler, or serve with --kernels reference.")
        return
    *statuses, chosen = probe.stdout.strip().splitlines()
    is_lowest = chosen.endswith("portable")
    yield Finding(
        "native core",
        f"{chosen} ({'; '.join(statuses)})",
        "This processor runs only the portable kernels: expect a fraction of the speed." if is_lowest else "",
    )


def _settings() -> Iterator[Finding]:
    try:
        resolved = resolve({})
    except PenstockError as error:
        yield Finding("settings", error.message, error.remedy or "Correct it.")
        return
    changed = [f"{name} ({source})" for name, source in resolved.sources.items() if source != "default"]
    yield Finding("settings", ", ".join(changed) or "all at their defaults")


def _hub_cache() -> Iterator[Finding]:
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE)
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    remedy = "" if os.access(existing, os.W_OK) else f"Make {existing} writable, or set HF_HOME."
    mode = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online"
    models = sorted(entry.name for entry in path.glob("models--*")) if path.exists() else []
    yield Finding("hub cache", f"{path}, {len(models)} models, {format_size(free)} free on disk, {mode}", remedy)


def _bundled_model() -> Iterator[Finding]:
    """The whole way, with the model that comes along: engine process, kernels, tokenizer, HTTP."""
    import msgspec

    from penstock.cli.private_server import private_server
    from penstock.config.settings import ResolvedSettings

    if not (BUNDLED_MODEL / "config.json").exists():
        yield Finding("bundled model", "missing from this installation", "Reinstall Penstock.")
        return
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}
    settings = ResolvedSettings(Settings(max_num_seqs=2, max_memory=256 << 20), {})
    try:
        with private_server(settings) as (client, model):
            answers = [
                client.request("POST", "/v1/chat/completions", msgspec.json.encode({"model": model, **body}))
                for _ in range(2)
            ]
    except PenstockError as error:
        yield Finding("bundled model", error.message, error.remedy or "Look at the lines above.")
        return
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.status == 200]
    if len(texts) < 2:
        yield Finding("bundled model", f"answered with status {answers[0].status}", "Report this as a bug.")
    elif texts[0] != texts[1]:
        yield Finding("bundled model", "gave two answers to one greedy request", "Report this as a bug.")
    else:
        yield Finding("bundled model", f"answers, twice alike: {texts[0]!r}")


CHECKS: Final = (_versions, _machine, _native_core, _settings, _hub_cache, _bundled_model)
