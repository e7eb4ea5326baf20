#!/usr/bin/env python3
"""What `penstock quantize` writes, read by vLLM: greedy tokens and log-probabilities of prompts beside ours.

    foreign_readers.py VLLM_PYTHON [--only TEXT] [--markdown FILE]

The bundled model in each directory format, with calibration; both run in bfloat16. Differences are of the prompt's
log-probabilities; tokens agree up to the first that differs, after which the two write different texts. (llama.cpp
reads GGUF in benchmarks/quality.py, transformers reads compressed-tensors in tests/conversion/test_convert.py.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

from tools.bundled_model import corpus  # noqa: E402

from penstock.assets import BUNDLED_MODEL  # noqa: E402
from penstock.conversion import Calibration, Recipe, convert  # noqa: E402
from penstock.frontend.tokenizer import Tokenizer  # noqa: E402
from penstock.llm import LLM  # noqa: E402
from penstock.messages import SamplingParams  # noqa: E402

NUM_TOKENS = 24
TARGETS = {
    "w8a8": ("w8a8", Recipe()),
    "w4a16": ("w4a16", Recipe()),
    "w4a16, act-order": ("w4a16", Recipe(act_order=True)),
    "gptq 4 bit": ("gptq", Recipe()),
    "gptq 4 bit, act-order": ("gptq", Recipe(act_order=True)),
    "gptq 8 bit": ("gptq", Recipe(bits=8)),
    "awq": ("awq", Recipe()),
}
Answers = list[tuple[list[int], list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="of vLLM's environment")
    parser.add_argument("--only", default="", help="formats whose name has this text")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args()
    lines = ["| format | mean difference, nats | largest | greedy tokens that agree |", "|---|---|---|---|"]
    print("\n".join(lines))
    seen = "".join(conversation.text() for conversation in itertools.islice(corpus.training(9, 10**6), 400))
    text = "".join(conversation.text() for conversation in corpus.held_out(0, 8))
    tokens = Tokenizer.load(BUNDLED_MODEL).encode(text, add_special_tokens=False)
    prompts = [tokens[begin : begin + 200] for begin in range(0, 8 * 200, 200)]
    with tempfile.TemporaryDirectory() as directory:
        for name, (target, recipe) in TARGETS.items():
            if options.only not in name:
                continue
            path = Path(directory) / name.replace(" ", "-").replace(",", "")
            convert(BUNDLED_MODEL, path, target, lambda _share: None, recipe, Calibration(seen))
            lines.append(line_of(name, by_us(path, prompts), by_vllm(options.python, path, prompts)))
            print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("".join(f"{line}\n" for line in lines))


def by_us(path: Path, prompts: list[list[int]]) -> Answers:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, prompt_logprobs=0)
    with LLM(str(path), max_model_len=512) as llm:
        done = llm.generate(prompts, sampling)
    return [
        (list(one.outputs[0].token_ids), [entry.token.logprob for entry in one.prompt_logprobs or [] if entry])
        for one in done
    ]


def by_vllm(python: Path, path: Path, prompts: list[list[int]]) -> Answers:
    """Its standard output has other lines too."""
    listed = path.with_suffix(".json")
    listed.write_text(json.dumps(prompts))
    script = Path(__file__).parent / "vllm_greedy.py"
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }  # fmt: skip
    command = [str(python), str(script), str(listed), str(NUM_TOKENS), str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    return [(tokens, logprobs) for tokens, logprobs in json.loads(line)]


def line_of(name: str, ours: Answers, theirs: Answers) -> str:
    differences, same = [], 0
    for (our_tokens, our_logprobs), (their_tokens, their_logprobs) in zip(ours, theirs, strict=True):
        differences += [abs(one - other) for one, other in zip(our_logprobs, their_logprobs, strict=True)]
        pairs = zip(our_tokens, their_tokens, strict=True)
        same += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    count = len(ours) * NUM_TOKENS
    return f"| {name} | {statistics.mean(differences):.4f} | {max(differences):.3f} | {same} of {count} |"


if __name__ == "__main__":
    main()
