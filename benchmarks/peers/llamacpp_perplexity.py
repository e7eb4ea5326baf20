"""Perplexity of a GGUF file as llama.cpp itself computes it, on tokens that are given. Runs in llama.cpp's environment.

    PEER_PYTHON benchmarks/peers/llamacpp_perplexity.py TEXTS.json WINDOW FILE.gguf

TEXTS.json: a list of lists of token ids. Prints the list of their perplexities. Windows do not overlap; each starts
with an empty context, as in `penstock eval perplexity`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    texts, window = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    num_threads = len(os.sched_getaffinity(0))
    llama = llama_cpp.Llama(
        sys.argv[3], n_ctx=window, n_batch=window, logits_all=True, n_threads=num_threads, verbose=False
    )
    print(json.dumps([perplexity(llama, tokens, window) for tokens in texts]))


def perplexity(llama: llama_cpp.Llama, tokens: list[int], window: int) -> float:
    total = count = 0.0
    for begin in range(0, len(tokens) - 1, window):
        part = tokens[begin : begin + window]
        llama.reset()
        llama.eval(part)
        logits = np.asarray(llama.scores[: len(part) - 1], np.float64)
        largest = logits.max(1)
        normalizers = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
        total += float((normalizers - logits[np.arange(len(part) - 1), part[1:]]).sum())
        count += len(part) - 1
    return math.exp(total / count)


if __name__ == "__main__":
    main()
