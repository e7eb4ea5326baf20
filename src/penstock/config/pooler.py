"""What a checkpoint says about its one-pass tasks: how vectors are pooled, what its labels are called.

Owns: nothing (values only).
Never: imports torch; trusts a number of a downloaded file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from penstock.base.errors import CheckpointError

Pooling = Literal["cls", "mean", "last"]
Activation = Literal["softmax", "sigmoid", "identity"]

# What can be asked of a model, by what its checkpoint is. "score" and "rerank" compare two texts: by the cosine of
# their vectors, or by a classifier with one label that reads both at once (a cross-encoder).
GENERATE_TASKS: Final = ("generate", "embed", "score", "rerank")
EMBED_TASKS: Final = ("embed", "score", "rerank")
CROSS_ENCODER_TASKS: Final = ("classify", "score", "rerank")
CLASSIFY_TASKS: Final = ("classify",)

_MAX_LABELS: Final = 65_536
_MAX_MODULES: Final = 16
_MAX_SEQUENCE: Final = 16_777_216
# sentence-transformers' names of pooling modes, old (a flag each) and new (one value), to ours.
_POOLING_FLAGS: Final[dict[str, Pooling]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES: Final[dict[str, Pooling]] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_ACTIVATIONS: Final[dict[str, Activation]] = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}


class PoolerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How hidden states become one vector or one score a label.

    pooling: the state of the first token, of the last, or the mean of all. normalize: to unit length. labels: of a
    classifier, in the order of its outputs; empty for models that are none. activation: from logits to scores.
    """

    pooling: Pooling = "last"
    normalize: bool = True
    labels: tuple[str, ...] = ()
    activation: Activation = "identity"


class SentenceModules(msgspec.Struct, frozen=True, kw_only=True):
    """What sentence-transformers' files say. max_sequence: tokens it cuts texts to, None when it names no limit."""

    pooling: Pooling
    normalize: bool
    max_sequence: int | None


def classifier_of(config: Mapping[str, Any]) -> PoolerConfig:
    """Labels and activation of a *ForSequenceClassification config.json. Raises CheckpointError."""
    names = config.get("id2label")
    if names is None:
        names = {str(index): f"LABEL_{index}" for index in range(2)}  # transformers' default
    if not isinstance(names, Mapping) or not 1 <= len(names) <= _MAX_LABELS:
        raise CheckpointError(f"config.json: id2label is unusable: it needs 1 to {_MAX_LABELS} labels.")
    labels = [names.get(str(index)) for index in range(len(names))]
    if not all(isinstance(label, str) for label in labels):
        raise CheckpointError("config.json: id2label is unusable: its keys are not 0, 1, 2, ... with texts.")
    return PoolerConfig(
        pooling="last", labels=tuple(str(label) for label in labels), activation=_activation(config, len(labels))
    )


def _activation(config: Mapping[str, Any], num_labels: int) -> Activation:
    """What sentence-transformers wrote down, else what the problem implies; a lone label is a yes or no."""
    own = config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if named is not None:
        activation = _ACTIVATIONS.get(str(named).rpartition(".")[2])
        if activation is None:
            raise CheckpointError(f"config.json names the activation {str(named)[:60]!r}, which is not supported.")
        return activation
    match config.get("problem_type"):
        case "regression":
            return "identity"
        case "multi_label_classification":
            return "sigmoid"
        case _:
            return "sigmoid" if num_labels == 1 else "softmax"


def sentence_modules(modules: object, pooling: Mapping[str, Any], sentence_bert: Mapping[str, Any]) -> SentenceModules:
    """Reads modules.json, the pooling module's config.json and sentence_bert_config.json. Raises CheckpointError."""
    kinds = [kind for kind, _ in module_list(modules)]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown or kinds[:2] != ["Transformer", "Pooling"]:
        raise CheckpointError(
            f"modules.json asks for {' + '.join(kinds)[:80]}.",
            remedy="Transformer + Pooling, with an optional Normalize, are supported.",
        )
    longest = sentence_bert.get("max_seq_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise CheckpointError("sentence_bert_config.json: max_seq_length is unusable.")
    return SentenceModules(
        pooling=_pooling(pooling),
        normalize="Normalize" in kinds,
        max_sequence=None if longest is None else min(longest, _MAX_SEQUENCE),
    )


def module_list(modules: object) -> list[tuple[str, str]]:
    """(kind, folder) of each entry of modules.json, in its order. Raises CheckpointError."""
    if not isinstance(modules, Sequence) or not 1 <= len(modules) <= _MAX_MODULES:
        raise CheckpointError("modules.json is no list of modules.")
    entries: list[tuple[str, str]] = []
    for module in modules:
        kind, folder = (module.get("type"), module.get("path")) if isinstance(module, Mapping) else (None, None)
        if not isinstance(kind, str) or not isinstance(folder, str) or "/" in folder or folder in (".", ".."):
            raise CheckpointError("modules.json has a malformed module.")
        entries.append((kind.rpartition(".")[2], folder))
    return entries


def _pooling(config: Mapping[str, Any]) -> Pooling:
    named = config.get("pooling_mode")
    if named is not None:
        modes = named if isinstance(named, list) else [named]
        chosen = [_POOLING_NAMES.get(str(mode)) for mode in modes]
    else:
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        chosen = [_POOLING_FLAGS.get(flag) for flag in flags]
    if len(chosen) != 1 or chosen[0] is None:
        raise CheckpointError(
            "The checkpoint's pooling module combines or names modes that are not supported.",
            remedy="Supported is one of: cls, mean, last token.",
        )
    return chosen[0]
