"""Every kernel compiled for cards that are not here, and what the compiler says of each: no GPU is needed.

The modules of this package that have a `specializations` function say what is compiled. Triton makes PTX, its ptxas the
machine code; ptxas names registers and spills, Triton the shared memory. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from penstock.kernels import triton as package
from penstock.kernels.triton import configs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from penstock.kernels.triton.specialization import Specialization

CAPABILITIES: Final = (80, 90, 100)
# Bytes of shared memory that one program may take, and registers a thread (CUDA C programming guide, compute
# capabilities).
SHARED_LIMIT: Final = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTER_LIMIT: Final = 255
AMD_SHARED_LIMIT: Final = 64 << 10
_WARP: Final = 32


class CompiledKernel(msgspec.Struct, frozen=True):
    """What one compilation takes. Sizes in bytes; registers a thread; spills are bytes written and read a thread."""

    name: str
    capability: int
    num_warps: int
    num_stages: int
    ptx_size: int
    cubin_size: int
    registers: int
    shared_size: int
    spill_store_size: int
    spill_load_size: int
    stack_size: int
    seconds: float
    problem: str = ""


def specializations() -> Iterator[Specialization]:
    """Of all modules of this package, by the modules' names."""
    return _declared("specializations")


def candidates() -> Iterator[Specialization]:
    """What a tuner may try on a card, as far as it fits."""
    return _declared("candidates")


def _declared(function: str) -> Iterator[Specialization]:
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if module.name not in ("aot", "attention_tiles"):
            declared = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), function, None)
            yield from declared() if declared is not None else ()


def is_for(specialization: Specialization, capability: int) -> bool:
    return specialization.min_capability <= capability <= specialization.max_capability


def compiled(specialization: Specialization, capability: int) -> Any:
    """Triton's own compiled kernel, with all that it was on the way (`asm`)."""
    kernel = specialization.kernel
    aligned = [
        index
        for index, name in enumerate(kernel.arg_names)
        if specialization.signature[name].startswith("*") or name in specialization.aligned
    ]
    source = ASTSource(
        kernel,
        {name: specialization.signature[name] for name in kernel.arg_names},
        dict(specialization.constants),
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": specialization.num_warps, "num_stages": specialization.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, _WARP), options=options)


def compile_one(specialization: Specialization, capability: int) -> CompiledKernel:
    """Compiles and judges: `problem` says what is over a limit."""
    started = time.monotonic()
    kernel = compiled(specialization, capability)
    usage = _resources(kernel.asm["ptx"], capability)
    result = CompiledKernel(
        name=specialization.name,
        capability=capability,
        num_warps=specialization.num_warps,
        num_stages=specialization.num_stages,
        ptx_size=len(kernel.asm["ptx"]),
        cubin_size=len(kernel.asm["cubin"]),
        shared_size=kernel.metadata.shared,
        seconds=round(time.monotonic() - started, 2),
        registers=usage["registers"],
        spill_store_size=usage["spill_store_size"],
        spill_load_size=usage["spill_load_size"],
        stack_size=usage["stack_size"],
    )
    return msgspec.structs.replace(result, problem=judge(result, spills_allowed=specialization.spills_allowed))


def compile_for_amd(specialization: Specialization) -> int:
    """Compiles for an MI300 in as many stages as are taken there; the bytes of shared memory that a program takes."""
    kernel = specialization.kernel
    source = ASTSource(
        kernel, {name: specialization.signature[name] for name in kernel.arg_names}, dict(specialization.constants)
    )
    options = {"num_warps": specialization.num_warps, "num_stages": min(specialization.num_stages, configs.AMD_STAGES)}
    shared: int = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options).metadata.shared
    return shared


def _resources(ptx: str, capability: int) -> dict[str, int]:
    """What `ptxas -v` says of a kernel's registers and local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        arch = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(path), "-o", f"{path}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stderr
    return parse_log(log)


def parse_log(log: str) -> dict[str, int]:
    """The figures of a `ptxas -v` log of one kernel."""

    def figure(pattern: str) -> int:
        found = re.search(pattern, log)
        assert found is not None, (pattern, log)
        return int(found[1])

    return {
        "registers": figure(r"Used (\d+) registers"),
        "stack_size": figure(r"(\d+) bytes stack frame"),
        "spill_store_size": figure(r"(\d+) bytes spill stores"),
        "spill_load_size": figure(r"(\d+) bytes spill loads"),
    }


def judge(kernel: CompiledKernel, *, spills_allowed: bool) -> str:
    """What is over a limit of the chip; empty: nothing."""
    limit = SHARED_LIMIT[kernel.capability]
    if kernel.shared_size > limit:
        return f"{kernel.shared_size} bytes of shared memory, more than {limit}"
    if kernel.registers > REGISTER_LIMIT:
        return f"{kernel.registers} registers"
    if kernel.spill_store_size and not spills_allowed:
        return f"spills {kernel.spill_store_size} bytes"
    return ""


def to_json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
