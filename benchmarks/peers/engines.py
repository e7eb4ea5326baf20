"""The engines of the comparisons: where each one's environment is, and the settings that its documentation advises."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = Path(os.environ.get("BENCH_PEER_ENVS", HERE / "envs"))
WORK = Path(os.environ.get("BENCH_WORK", HERE.parent / "work"))
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


@dataclass(frozen=True)
class Engine:
    """One engine: its interpreter, its worker file, and the environment variables it runs under.

    weight_copies and extra_gb estimate its memory (copies of the checkpoint's bytes, gigabytes on top), to decide how
    many engines may be loaded at the same time.
    """

    name: str
    python: Path
    weight_copies: float
    extra_gb: float
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def worker(self) -> Path:
        return HERE / "workers" / f"{self.name}_worker.py"

    @property
    def is_installed(self) -> bool:
        return self.python.exists()

    def memory_bytes(self, weight_bytes: int) -> int:
        return int(self.weight_copies * weight_bytes + self.extra_gb * 1e9)

    def environment(self) -> dict[str, str]:
        """The whole environment of its processes: this one's, what is right for every engine, and its own."""
        shared = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        path = f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **shared, **self.variables, "PATH": path}


def _environment_python(name: str) -> Path:
    return ENVIRONMENTS / name / "bin" / "python"


def _vllm_variables(threads: int) -> dict[str, str]:
    """What vLLM's CPU page advises: tcmalloc and Intel's OpenMP preloaded, threads bound to cores, a stated KV pool."""
    openmp = ENVIRONMENTS / "vllm" / "lib" / "libiomp5.so"
    preload = ":".join(str(library) for library in (TCMALLOC, openmp) if library.exists())
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "LD_PRELOAD": preload,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def catalogue(threads: int) -> dict[str, Engine]:
    """Every engine by name, set up for `threads` threads."""
    count = {"OMP_NUM_THREADS": str(threads)}
    engines = (
        Engine("penstock", Path(sys.executable), 1.15, 2.0),
        Engine("vllm", _environment_python("vllm"), 2.2, 3.5, _vllm_variables(threads)),
        Engine("openvino", _environment_python("openvino"), 1.3, 3.5),
        Engine("onnxruntime", _environment_python("onnxruntime"), 1.3, 3.0),
        Engine("transformers", _environment_python("transformers"), 1.1, 2.0, count),
        Engine("llamacpp", _environment_python("llamacpp"), 1.1, 2.0, count),
    )
    return {engine.name: engine for engine in engines}


def chosen(names: str, threads: int) -> list[Engine]:
    """The engines of a comma-separated list; those without an environment are named on standard error and left out.

    Raises ValueError for a name that does not exist.
    """
    table = catalogue(threads)
    engines = []
    for name in names.split(","):
        if name not in table:
            raise ValueError(f"unknown engine {name!r}; one of: {', '.join(table)}")
        if table[name].is_installed:
            engines.append(table[name])
        else:
            print(f"{name}: no environment at {table[name].python.parent.parent} (setup.sh {name})", file=sys.stderr)
    return engines
