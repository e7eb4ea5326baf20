"""The schema itself: a field that nobody bounds or honours cannot slip in."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.messages.bounds import BOUNDS
from penstock.server.cohere.rerank import RerankRequest
from penstock.server.openai.embeddings import EmbeddingRequest
from penstock.server.openai.schema import NO_OP_VALUES, ChatRequest, CompletionRequest
from penstock.server.vllm.classify import ClassifyRequest
from penstock.server.vllm.score import ScoreRequest


def test_every_number_in_a_request_has_a_bound() -> None:
    """A numeric field without a row in BOUNDS (or a fixed meaning) may not exist."""
    renamed = {"top_logprobs": "logprobs", "max_completion_tokens": "max_tokens", "best_of": "n"}
    for struct in (ChatRequest, CompletionRequest, EmbeddingRequest, ScoreRequest, ClassifyRequest, RerankRequest):
        for field in msgspec.structs.fields(struct):
            kinds = getattr(field.type, "__args__", (field.type,))
            if int in kinds or float in kinds:
                assert renamed.get(field.name, field.name) in BOUNDS, field.name


def test_every_untyped_field_has_its_no_op_values() -> None:
    for struct in (ChatRequest, CompletionRequest):
        for field in msgspec.structs.fields(struct):
            assert field.type is not Any or field.name in NO_OP_VALUES, f"{field.name} would be ignored"
