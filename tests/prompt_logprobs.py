"""Log-probabilities of one prompt's tokens, ours and those of a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from penstock import LLM, SamplingParams

# Of a model for every quantised format: no side is smaller than a block of any.
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "initializer_range": 0.05,
}
PROMPT = [5, 9, 200, 31, 7, 77, 120, 8, 33, 4]


def our_logprobs(path: Path, dtype: str) -> list[float]:
    """Of each prompt token given those before it. The model has a tokenizer."""
    with LLM(str(path), dtype=dtype, max_model_len=64, max_memory=1 << 30) as llm:
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        [generation] = llm.generate([PROMPT], parameters)
    assert generation.prompt_logprobs is not None
    return [entry.token.logprob for entry in generation.prompt_logprobs if entry is not None]


@torch.inference_mode()
def their_logprobs(model: Any) -> list[float]:
    rows = model.eval()(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    return [rows[position, token].item() for position, token in enumerate(PROMPT[1:])]
