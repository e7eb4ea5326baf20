"""What "auto" is resolved from: the wishes in the settings, and the facts of the machine.

Owns: nothing. Reads /proc and /sys, never the environment.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from pathlib import Path

import psutil

from penstock.base.errors import ConfigError
from penstock.config.accelerators import find_accelerator
from penstock.config.resolve import EngineOptions, MachineFacts
from penstock.config.settings import Settings

_CGROUP = Path("/sys/fs/cgroup")
# What stays free for the system, the API process and the page cache of the weights being read.


def engine_options(settings: Settings) -> EngineOptions:
    """The part of the settings that an engine is built from; None becomes the options' word for auto."""
    return EngineOptions(
        device=settings.device or "auto",
        dtype=settings.dtype or "auto",
        load_format=settings.load_format or "auto",
        quantization=settings.quantization,
        activations=settings.activations or "auto",
        seed=settings.seed,
        num_threads=settings.num_threads or 0,
        kernels=settings.kernels or "auto",
        max_memory=settings.max_memory or 0,
        max_model_len=settings.max_model_len or 0,
        max_num_seqs=settings.max_num_seqs or 0,
        max_num_batched_tokens=settings.max_num_batched_tokens or 0,
        max_num_queued_requests=settings.max_num_queued_requests,
        max_num_queued_tokens=settings.max_num_queued_tokens,
        scheduling_policy=settings.scheduling_policy,
        kv_cache_dtype=settings.kv_cache_dtype,
        capture_graphs=settings.capture_graphs,
        enable_prefix_caching=settings.enable_prefix_caching,
        host_kv_memory=settings.host_kv_memory,
        batch_invariant=settings.batch_invariant,
    )


def machine_facts(cgroup: Path = _CGROUP) -> MachineFacts:
    """What this process may use here, a container's limits included."""
    return MachineFacts(
        num_cores=usable_cores(cgroup),
        has_native=importlib.util.find_spec("penstock._native") is not None,
        accelerator=find_accelerator(),
    )


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Physical cores of this process's affinity mask, less where a CPU quota allows fewer; at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_physical_core(cpu) for cpu in allowed}
    quota = _read_words(cgroup / "cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        return max(1, min(len(cores), int(quota[0]) // int(quota[1])))
    return max(1, len(cores))


def available_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory that can be taken without swapping: the system's, or what a container's limit leaves."""
    available = int(psutil.virtual_memory().available)
    limit, used = _read_words(cgroup / "memory.max"), _read_words(cgroup / "memory.current")
    if limit and used and limit[0] != "max":
        reclaimable = _inactive_file_bytes(cgroup)
        available = min(available, max(0, int(limit[0]) - int(used[0]) + reclaimable))
    return available


def check_public_bind(settings: Settings) -> None:
    """Raises ConfigError when the server would be reachable from other machines without a key."""
    if not settings.api_key and not is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host} would serve everyone who can reach this machine, and no API key is set.",
            remedy="Set PENSTOCK_API_KEY (or --api-key), or listen on 127.0.0.1.",
            param="host",
        )


def is_loopback(host: str) -> bool:
    """Whether `host` is surely this machine alone; a name other than localhost is not resolved and not trusted."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _physical_core(cpu: int) -> str:
    """An identity of the core that `cpu` is a hardware thread of."""
    siblings = _read_words(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    return siblings[0] if siblings else str(cpu)


def _inactive_file_bytes(cgroup: Path) -> int:
    """Page cache charged to the container that the kernel gives back under pressure."""
    words = _read_words(cgroup / "memory.stat")
    return int(words[words.index("inactive_file") + 1]) if "inactive_file" in words else 0


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []
