"""Greedy tokens and log-probabilities of a checkpoint as vLLM computes them. Runs in vLLM's environment.

    PEER_PYTHON benchmarks/peers/vllm_greedy.py PROMPTS.json NUM_TOKENS CHECKPOINT

PROMPTS.json: a list of lists of token ids. Prints a list with, for each prompt, [tokens, log-probabilities of the
prompt's tokens after the first].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import vllm

    prompts, count = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    longest = max(map(len, prompts)) + count
    llm = vllm.LLM(
        model=sys.argv[3], dtype="bfloat16", max_model_len=longest, enable_prefix_caching=False, enforce_eager=True
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, prompt_logprobs=0)
    found = []
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
        entries = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append([list(output.outputs[0].token_ids), [entry[token].logprob for token, entry in entries]])
    print(json.dumps(found))


# vLLM starts its engine process by spawning, which imports this file again.
if __name__ == "__main__":
    main()
