"""Compiles every GPU kernel for sm_80, sm_90 and sm_100, without a GPU, and writes what each takes.

    python tools/compile_kernels.py [--only TEXT] [--subset] [--out benchmarks/results/kernels]
    python tools/compile_kernels.py --candidates --out benchmarks/results/attention_tiles

Writes OUT.json and OUT.md. Exit 1: a kernel spills where it matters, exceeds a limit of the chip, or does not compile.
--candidates: what tools/tune_attention.py may try; it tries those without a problem (and exit 1 says that none is).
Compilations are cached (TRITON_CACHE_DIR), so a second run takes little.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton

from penstock.kernels.triton import aot
from penstock.kernels.triton.specialization import Specialization

_HEAD = "| kernel | chip | warps | stages | registers | shared KiB | spill bytes | PTX KiB | cubin KiB |"


def main() -> int:
    arguments = _arguments()
    results = [
        _compile(specialization, capability)
        for specialization in (aot.candidates() if arguments.candidates else aot.specializations())
        if arguments.only in specialization.name and (specialization.in_test or not arguments.subset)
        for capability in aot.CAPABILITIES
        if aot.is_for(specialization, capability)
    ]
    if arguments.out:
        Path(f"{arguments.out}.json").write_bytes(aot.to_json({"triton": triton.__version__, "kernels": results}))
        Path(f"{arguments.out}.md").write_text(_table(results, arguments), encoding="utf-8")
    problems = [kernel for kernel in results if kernel.problem]
    for kernel in problems:
        print(f"{kernel.name} sm_{kernel.capability}: {kernel.problem}")
    print(
        f"{len(results)} compiled in {sum(kernel.seconds for kernel in results):.0f} s, {len(problems)} with a problem"
    )
    return 1 if len(problems) == len(results) or (problems and not arguments.candidates) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--subset", action="store_true", help="those that the tests compile")
    parser.add_argument("--candidates", action="store_true", help="what may be tried on a card")
    parser.add_argument("--out", default="", help="path without ending")
    return parser.parse_args()


def _compile(specialization: Specialization, capability: int) -> aot.CompiledKernel:
    try:
        kernel = aot.compile_one(specialization, capability)
        print(f"{kernel.seconds:6.2f} s  sm_{capability}  {kernel.name}  {kernel.problem}", file=sys.stderr, flush=True)
        return kernel
    except Exception as error:  # one that does not compile is a line of the report, and the others go on
        lines = [line for line in str(error).splitlines() if line.strip()]
        problem = f"{type(error).__name__}: {' '.join(lines[-3:])[:300]}"
        return aot.CompiledKernel(specialization.name, capability, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, problem)


def _table(results: Sequence[aot.CompiledKernel], arguments: argparse.Namespace) -> str:
    lines = [
        "# GPU kernels, compiled ahead of time",
        "",
        f"`python tools/compile_kernels.py{' --candidates' if arguments.candidates else ''} --out {arguments.out}`;"
        f" Triton {triton.__version__} and its ptxas; no GPU was used, nothing here is a measured speed.",
        f"Limits: {aot.REGISTER_LIMIT} registers a thread; shared memory a program "
        + ", ".join(f"{size >> 10} KiB (sm_{capability})" for capability, size in aot.SHARED_LIMIT.items())
        + ".",
        "",
        _HEAD,
        "|---" * (_HEAD.count("|") - 1) + "|",
    ]
    lines += [
        f"| {k.name} | sm_{k.capability} | {k.num_warps} | {k.num_stages} | {k.registers} | {k.shared_size / 1024:.1f} "
        f"| {k.spill_store_size} | {k.ptx_size / 1024:.0f} | {k.cubin_size / 1024:.0f} |"
        + (f" {k.problem}" if k.problem else "")
        for k in results
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
