#!/usr/bin/env python3
"""Peak memory of loading a model and answering with it, beside what it may take.

    memory.py MODEL[:KIND] ... [--markdown FILE]         directories or .gguf files

A process of its own loads the model, prefills 2,000 tokens and decodes 16. Its proportional set size is sampled from
outside: private is what it alone holds, mapped are pages of files (the checkpoint's, libraries') that it touched. The
bound is the file (with "MODEL:KIND", which quantises while loading: the quantised weights), the keys and values of
these tokens, and 400 MB for Python, torch and activations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from process_tree import Memory, PeakMemory, ProcessTree

PROMPT, OUTPUT = 2000, 16
ALLOWANCE_BYTES = 400e6
CHILD = """
import json, sys
from pathlib import Path
from penstock.config.defaults import machine_facts
from penstock.config.resolve import EngineOptions, resolve_engine_config
from penstock.kernels import ops as op_table
from penstock.llm import LLM
from penstock.loader import read_model_config
from penstock.messages import SamplingParams
from penstock.runner.loading import weights_nbytes

path, kind = sys.argv[1], sys.argv[2] or None
model = read_model_config(Path(path))
options = EngineOptions(quantization=kind, max_model_len=2048)
config = resolve_engine_config(path, model, options, machine_facts())
weights = weights_nbytes(config, op_table.load(config.kernels, 1))
with LLM(path, quantization=kind, max_model_len=2048, max_num_seqs=1) as llm:
    prompt = [token % model.vocab_size for token in range(7, 7 + int(sys.argv[3]))]
    llm.generate([prompt], SamplingParams(max_tokens=int(sys.argv[4]), temperature=0.0, ignore_eos=True))
    kv_token_bytes = 4 * model.num_layers * model.num_kv_heads * model.head_dim
    print(json.dumps({"weights": weights, "kv_token_bytes": kv_token_bytes}), flush=True)
    sys.stdin.readline()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL[:KIND]")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args()
    lines = []
    for line in table(options.models):
        print(line, flush=True)
        lines.append(line)
    if options.markdown:
        options.markdown.write_text("".join(f"{line}\n" for line in lines))


def table(models: list[str]) -> Iterator[str]:
    heads = ("model", "file", "weights held", "peak, private", "peak, with mapped files", "at the end", "bound")
    yield f"| {' | '.join(heads)}, MB |"
    yield "|---" * len(heads) + "|"
    for name in models:
        path, _, kind = name.partition(":")
        stored = file_bytes(Path(path))
        peak, settled, told = measure(path, kind)
        bound = (told["weights"] if kind else stored) + (PROMPT + OUTPUT) * told["kv_token_bytes"] + ALLOWANCE_BYTES
        label = f"{Path(path).name}{f' --quantization {kind}' if kind else ''}"
        figures = (stored, told["weights"], peak.private, peak.total, settled.private, bound)
        yield f"| {label} | {' | '.join(f'{figure / 1e6:.0f}' for figure in figures)} |"


def measure(path: str, kind: str) -> tuple[Memory, Memory, dict[str, int]]:
    """The peak, what is held at the end, and what the process tells."""
    command = [sys.executable, "-c", CHILD, path, kind, str(PROMPT), str(OUTPUT)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    watching = PeakMemory(ProcessTree(child.pid), interval_s=0.02)
    try:
        with watching.watch():
            told = json.loads(child.stdout.readline())
        return watching.peak, watching.tree.memory(), told
    finally:
        child.communicate("\n")


def file_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


if __name__ == "__main__":
    main()
