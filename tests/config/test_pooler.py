"""What checkpoints say about one-pass tasks, and that what cannot be honoured is refused."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.base.errors import CheckpointError
from penstock.config.model import ModelConfig
from penstock.config.pooler import classifier_of, module_list, sentence_modules

BERT: dict[str, Any] = {
    "architectures": ["BertModel"], "vocab_size": 100, "hidden_size": 60, "intermediate_size": 90,
    "num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 130,
}  # fmt: skip
MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


@pytest.mark.parametrize(
    ("architecture", "tasks"),
    [
        ("BertModel", "embed score rerank"),
        ("BertForMaskedLM", "embed score rerank"),
        ("XLMRobertaForSequenceClassification", "classify"),
    ],
)
def test_tasks_follow_from_the_architecture(architecture: str, tasks: str) -> None:
    config = ModelConfig.from_hf({**BERT, "architectures": [architecture], "pad_token_id": 1})
    assert " ".join(config.tasks) == tasks
    assert config.is_encoder
    assert config.max_context_len == (128 if architecture.startswith("XLM") else 130)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"hidden_size": 61},
        {"type_vocab_size": 0},
        {"layer_norm_eps": -1},
        {"num_attention_heads": 1, "hidden_size": 512},
        {"architectures": ["XLMRobertaModel"], "pad_token_id": 129},
        {"architectures": ["XLMRobertaModel"], "pad_token_id": True},
        {"architectures": ["BertForQuestionAnswering"]},
    ],
)
def test_encoders_that_cannot_be_served(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        ModelConfig.from_hf({**BERT, **changes})


@pytest.mark.parametrize(
    ("config", "labels", "activation"),
    [
        ({}, ("LABEL_0", "LABEL_1"), "softmax"),
        ({"id2label": {"0": "yes"}}, ("yes",), "sigmoid"),
        ({"id2label": {"1": "b", "0": "a"}, "problem_type": "multi_label_classification"}, ("a", "b"), "sigmoid"),
        ({"id2label": {"0": "a"}, "problem_type": "regression"}, ("a",), "identity"),
        ({"id2label": {"0": "a"}, "sentence_transformers": {"activation_fn": "x.Identity"}}, ("a",), "identity"),
    ],
)
def test_labels_and_their_activation(config: dict[str, Any], labels: tuple[str, ...], activation: str) -> None:
    pooler = classifier_of(config)
    assert (pooler.labels, pooler.activation) == (labels, activation)


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {}},
        {"id2label": {"5": "a"}},
        {"id2label": {"0": 1}},
        {"id2label": ["a"]},
        {"sentence_transformers": {"activation_fn": "x.Tanh"}},
    ],
)
def test_unusable_labels(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        classifier_of(config)


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
    ],
)
def test_sentence_transformers_pooling(pooling: dict[str, Any], mode: str) -> None:
    assert sentence_modules(MODULES, pooling, {}).pooling == mode
    with_norm = sentence_modules([*MODULES, NORMALIZE], pooling, {"max_seq_length": 77})
    assert (with_norm.normalize, with_norm.max_sequence) == (True, 77)


@pytest.mark.parametrize(
    ("modules", "pooling", "limits"),
    [
        ([*MODULES, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}], {"pooling_mode": "cls"}, {}),
        (MODULES[:1], {"pooling_mode": "cls"}, {}),
        (MODULES, {"pooling_mode_max_tokens": True}, {}),
        (MODULES, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {}),
        (MODULES, {}, {}),
        (MODULES, {"pooling_mode": "cls"}, {"max_seq_length": 0}),
        (MODULES, {"pooling_mode": "cls"}, {"max_seq_length": "many"}),
    ],
)
def test_what_cannot_be_honoured_is_refused(modules: Any, pooling: dict[str, Any], limits: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        sentence_modules(modules, pooling, limits)


@pytest.mark.parametrize(
    "modules", [{}, [], "text", [1], [{"path": "../x", "type": "a.Pooling"}], [{"path": "..", "type": "a"}], [{}] * 17]
)
def test_hostile_module_lists(modules: Any) -> None:
    with pytest.raises(CheckpointError):
        module_list(modules)
