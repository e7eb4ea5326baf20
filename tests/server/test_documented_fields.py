"""No field that a client's own types document is unknown here: each works, or is refused by a message of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import anthropic.types as claude
import msgspec
import ollama._types as llama
import pytest
from anthropic.types import beta, message_count_tokens_params, message_create_params
from huggingface_hub import ChatCompletionInput, FeatureExtractionInput, TextGenerationInputGenerateParameters
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import chat_completion_assistant_message_param
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from penstock.server.anthropic import schema as anthropic
from penstock.server.ollama import schema as ollama
from penstock.server.ollama.embed import EmbedRequest
from penstock.server.openai import schema as openai
from penstock.server.openai.batches import BatchRequest
from penstock.server.openai.embeddings import EmbeddingRequest
from penstock.server.openai.response_schema import ResponseRequest
from penstock.server.tgi import schema as tgi
from penstock.server.tgi.embed import TeiEmbedRequest

CASES: list[tuple[Any, type[msgspec.Struct]]] = [
    (chat_create_params.CompletionCreateParamsBase, openai.ChatRequest),
    (chat_completion_assistant_message_param.ChatCompletionAssistantMessageParam, openai.ChatMessage),
    (completion_create_params.CompletionCreateParamsBase, openai.CompletionRequest),
    (embedding_create_params.EmbeddingCreateParams, EmbeddingRequest),
    (batch_create_params.BatchCreateParams, BatchRequest),
    (response_create_params.ResponseCreateParamsBase, ResponseRequest),
    (message_create_params.MessageCreateParamsBase, anthropic.MessagesRequest),
    (beta.message_create_params.MessageCreateParamsBase, anthropic.MessagesRequest),
    (message_count_tokens_params.MessageCountTokensParams, anthropic.CountTokensRequest),
    (claude.ToolParam, anthropic.Tool),
    (claude.OutputConfigParam, anthropic.OutputConfig),
    (llama.ChatRequest, ollama.ChatRequest),
    (llama.GenerateRequest, ollama.GenerateRequest),
    (llama.EmbedRequest, EmbedRequest),
    (llama.Options, ollama.Options),
    (llama.Message, ollama.Message),
    (ChatCompletionInput, openai.ChatRequest),
    (TextGenerationInputGenerateParameters, tgi.Parameters),
    (FeatureExtractionInput, TeiEmbedRequest),
]


def documented(kind: Any) -> set[str]:
    """The fields of a pydantic model, a dataclass or a TypedDict."""
    if hasattr(kind, "model_fields"):
        return set(kind.model_fields)
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}


@pytest.mark.parametrize(("theirs", "ours"), CASES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_documented_field_is_known(theirs: Any, ours: type[msgspec.Struct]) -> None:
    assert documented(theirs)
    # Clients send these in the headers or in the path.
    assert documented(theirs) - {"betas"} - set(ours.__struct_fields__) == set()
