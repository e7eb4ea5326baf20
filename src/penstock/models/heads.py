"""What turns a decoder's last states into what it is asked for: the vocabulary's logits, or scores of its labels."""

from __future__ import annotations

from penstock.config.model import ModelConfig
from penstock.layers import Embedding, Linear, Weights


def output_head(config: ModelConfig, weights: Weights, name: str, embedding: Embedding) -> Linear | None:
    """The head `name`, the embedding where that is tied to it, a classifier's `score`, or None for a bare model."""
    if config.pooler.labels:
        return weights.linear(["score"], [len(config.pooler.labels)], config.hidden_size)
    if "generate" not in config.tasks:
        return None
    if config.tie_word_embeddings:
        return embedding.as_head()
    return weights.linear([name], [config.vocab_size], config.hidden_size)
