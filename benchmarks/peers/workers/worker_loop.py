"""The worker's half of the offline comparison: reads one JSON request a line, answers one JSON line each.

    {"op": "load", "model": DIR, "threads": 2, "max_model_len": 2048, "max_num_seqs": 64, "token_limit": N, ...}
        -> {"ok": true, "seconds": S, "version": TEXT}
    {"op": "generate", "batch": B, "prompt_len": P, "output_len": O, "seed": N}
        -> {"ok": true, "seconds": S, "tokens": B * O}
    {"op": "stop"}

A failure answers {"ok": false, "error": TEXT} and the loop goes on. Runs in the engine's own environment: standard
library only. Whatever the engine prints goes to standard error, so that it cannot break the protocol.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from typing import Any, Protocol

# The first ids are the special tokens of make_model.py's and make_checkpoint.py's tokenizers.
FIRST_PLAIN_TOKEN = 16


class Engine(Protocol):
    """What a worker file provides."""

    version: str

    def load(self, options: dict[str, Any]) -> None:
        """Makes the model ready to generate; `options` is the load request."""

    def generate(self, prompts: list[list[int]], output_len: int) -> int:
        """Greedy, exactly `output_len` tokens for each prompt whatever they are; returns how many came in all."""


def random_prompts(batch: int, prompt_len: int, token_limit: int, seed: int) -> list[list[int]]:
    """`batch` prompts of uniform token ids: no two alike, so no prefix cache and no speculation helps."""
    generator = random.Random(seed)
    return [[generator.randrange(FIRST_PLAIN_TOKEN, token_limit) for _ in range(prompt_len)] for _ in range(batch)]


def run(engine: Engine) -> None:
    """Serves requests from standard input until "stop" or its end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    token_limit = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "stop":
            break
        token_limit = request.get("token_limit", token_limit)
        try:
            answer = _answer(engine, request, token_limit)
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(engine: Engine, request: dict[str, Any], token_limit: int) -> dict[str, Any]:
    if request["op"] == "load":
        start = time.perf_counter()
        engine.load(request)
        return {"ok": True, "seconds": time.perf_counter() - start, "version": engine.version}
    prompts = random_prompts(request["batch"], request["prompt_len"], token_limit, request["seed"])
    start = time.perf_counter()
    tokens = engine.generate(prompts, request["output_len"])
    return {"ok": True, "seconds": time.perf_counter() - start, "tokens": tokens}
