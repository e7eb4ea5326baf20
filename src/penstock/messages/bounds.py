"""One table of every bound on a request. A field without a row here may not exist on a request."""

from __future__ import annotations

from typing import Final

# name: (lowest, highest), inclusive. Floats must also be finite.
BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "n": (1, 128),
    "temperature": (0.0, 2.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.0, 1.0),  # 0 itself is refused in SamplingParams.validate: it would keep no token
    "min_p": (0.0, 1.0),
    "top_n_sigma": (0.0, 100.0),
    "typical_p": (0.0, 1.0),  # 0 itself is refused, as with top_p
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "dynatemp_range": (0.0, 2.0),
    "dynatemp_exponent": (0.01, 10.0),
    "mirostat": (0, 2),  # 1 is refused in SamplingParams.validate
    "mirostat_tau": (0.0, 100.0),
    "mirostat_eta": (0.0, 1.0),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 10.0),
    "dry_allowed_length": (1, 64),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "seed": (-(2**63), 2**63 - 1),
    "logit_bias": (-100.0, 100.0),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "max_tokens": (1, 2**24),
    "min_tokens": (0, 2**24),
    "beam_width": (1, 16),
    "length_penalty": (-10.0, 10.0),
    "thinking_token_budget": (1, 2**24),
    "priority": (-1000, 1000),
    "timeout_s": (0.001, 86_400.0),
    "dimensions": (1, 131_072),  # and at most the model's vectors have: PoolingParams.validate
    "truncate_prompt_tokens": (-1, 2**24),  # -1: to the context; 0 is refused in server.one_pass
    "top_n": (1, 2**24),
}

# Requests of this priority run after all others, also where priorities count for nothing else.
BACKGROUND_PRIORITY: Final = 1000

# name: most entries (or characters, for *_chars)
MAX_ENTRIES: Final[dict[str, int]] = {
    "logit_bias": 1024,
    "stop": 16,
    "stop_chars": 1024,
    "stop_token_ids": 128,
    "bad_words": 128,
    "bad_words_chars": 256,
    "dry_sequence_breakers": 16,
    "dry_sequence_breakers_chars": 40,
    "messages": 4096,
    "prompts": 1024,
    "inputs": 2048,
    "sequences": 1024,
    "tools": 512,
    "namespace_chars": 256,
    "request_id_chars": 128,
    "metadata": 16,
    "user_chars": 512,
    "grammar_chars": 512 * 1024,
    "choices": 10_000,
}

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_JSON_DEPTH: Final = 64
MAX_HEAD_BYTES: Final = 64 * 1024  # request line and headers
