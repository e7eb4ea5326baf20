"""The keys of a GGUF for a Hugging Face checkpoint: architecture, tokenizer, chat template.

The vocabulary is written as llama.cpp's converter does. A pre-tokenizer that GGUF has no name for is carried as the
whole tokenizer.json beside it (the format's own key for that): Penstock reads it exactly, other tools approximately.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from penstock.base.errors import CheckpointError
from penstock.config.model import ModelConfig
from penstock.frontend.gguf_tokenizer import EMBEDDED_TOKENIZER, PATTERNS
from penstock.frontend.text_files import TextFiles
from penstock.loader.gguf_checkpoint import ARCHITECTURES

_GGUF_ARCHITECTURES: Final = {
    **{ours: theirs for theirs, ours in ARCHITECTURES.items()},
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_MERGELESS_SCORE: Final = -1e6
_CONTRACTIONS: Final = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")


def metadata(path: Path, model: ModelConfig, file_type: int) -> dict[str, Any]:
    """Keys and values for the checkpoint directory `path`. Raises CheckpointError for what GGUF cannot say."""
    if model.architecture not in _GGUF_ARCHITECTURES:
        raise CheckpointError(f"{model.architecture} cannot be written as GGUF.")
    values = _architecture(path, model, file_type)
    values.update(_rope(model, values["general.architecture"]))
    values.update(_tokenizer(path, model))
    return values


def _architecture(path: Path, model: ModelConfig, file_type: int) -> dict[str, Any]:
    name = _GGUF_ARCHITECTURES[model.architecture]
    if any(model.sliding_windows) and name != "llama":
        raise CheckpointError("Sliding windows by layer cannot be written as GGUF.")
    return {
        "general.architecture": name,
        "general.name": path.name,
        "general.type": "model",
        "general.file_type": file_type,
        "general.quantization_version": 2,
        f"{name}.context_length": model.max_position_embeddings,
        f"{name}.embedding_length": model.hidden_size,
        f"{name}.block_count": model.num_layers,
        f"{name}.feed_forward_length": model.intermediate_size,
        f"{name}.attention.head_count": model.num_heads,
        f"{name}.attention.head_count_kv": model.num_kv_heads,
        f"{name}.attention.key_length": model.head_dim,
        f"{name}.attention.value_length": model.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": model.rms_norm_eps,
        f"{name}.rope.dimension_count": model.head_dim,
        f"{name}.vocab_size": model.vocab_size,
        **_experts(name, model),
    }


def _experts(name: str, model: ModelConfig) -> dict[str, Any]:
    experts = model.experts
    if experts is None:
        return {}
    values: dict[str, Any] = {f"{name}.expert_count": experts.count, f"{name}.expert_used_count": experts.per_token}
    if name != "llama":  # Mixtral's are of the size of a dense block, and always renormalised
        values[f"{name}.expert_feed_forward_length"] = experts.intermediate_size
        values[f"{name}.expert_weights_norm"] = experts.is_renormalized
    if experts.shared_intermediate_size:
        values[f"{name}.expert_shared_feed_forward_length"] = experts.shared_intermediate_size
    return values


def _rope(model: ModelConfig, name: str) -> dict[str, Any]:
    """Llama 3's and longrope's scalings become a tensor (convert.py writes it)."""
    rope = model.rope
    values: dict[str, Any] = {f"{name}.rope.freq_base": rope.rope_theta}
    match rope.rope_type:
        case "linear":
            values |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": rope.factor}
        case "yarn":
            if rope.attention_factor is not None or rope.mscale or rope.beta_fast != 32 or rope.beta_slow != 1:
                raise CheckpointError("This variant of yarn cannot be written as GGUF.")
            values |= {
                f"{name}.rope.scaling.type": "yarn",
                f"{name}.rope.scaling.factor": rope.factor,
                f"{name}.rope.scaling.original_context_length": rope.original_max_position_embeddings,
            }
        case "dynamic" | "longrope":
            raise CheckpointError(f"Rope scaling of the type {rope.rope_type} cannot be written as GGUF.")
    return values


def _tokenizer(path: Path, model: ModelConfig) -> dict[str, Any]:
    files = TextFiles.read(path)
    try:
        state = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"tokenizer.json of {path} cannot be read: {error}.") from error
    if state["model"]["type"] != "BPE":
        raise CheckpointError(f"A {state['model']['type']} tokenizer cannot be written as GGUF; BPE can.")
    tokens, types = _vocabulary(state, files, model.vocab_size)
    values: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in state["model"]["merges"]]
    if state["model"].get("byte_fallback"):
        values |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        values |= {"tokenizer.ggml.scores": _scores(tokens, merges)}
        values |= {"tokenizer.ggml.add_space_prefix": "Prepend" in json.dumps(state.get("normalizer"))}
    else:
        values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [" ".join(merge) for merge in merges]}
        values |= {"tokenizer.ggml.pre": _pre_name(state) or "default"}
    if state["model"].get("byte_fallback") or _pre_name(state) is None:
        values[EMBEDDED_TOKENIZER] = json.dumps(state, ensure_ascii=False)
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        content = files.special_tokens.get(f"{ours}_token")
        if content in ids:
            values[f"tokenizer.ggml.{theirs}_token_id"] = ids[content]
    if files.eos_token_ids:
        values.setdefault("tokenizer.ggml.eos_token_id", files.eos_token_ids[0])
        values["tokenizer.ggml.eot_token_id"] = files.eos_token_ids[0]
    bos = files.special_tokens.get("bos_token")
    values["tokenizer.ggml.add_bos_token"] = bos is not None and bos in json.dumps(state.get("post_processor"))
    values |= {f"tokenizer.chat_template{'' if name == 'default' else '.' + name}": text for name, text in
               files.templates.items()}  # fmt: skip
    return values


def _vocabulary(state: dict[str, Any], files: TextFiles, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; what the embedding has beyond them is padding."""
    by_id = {token_id: token for token, token_id in state["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, _NORMAL)
    if state["model"].get("byte_fallback"):
        types.update({i: _BYTE for i, token in by_id.items() if len(token) == 6 and token.startswith("<0x")})
    declared = {token_id: (content, flags.get("special", False)) for token_id, content, flags in files.added_tokens}
    added = {token["id"]: (token["content"], token["special"]) for token in state["added_tokens"]}
    for token_id, (content, is_special) in {**added, **declared}.items():
        by_id[token_id] = content
        types[token_id] = _CONTROL if is_special else _USER_DEFINED
    unknown = files.special_tokens.get("unk_token")
    types.update(
        {i: _UNKNOWN for i, token in by_id.items() if token == unknown and state["model"].get("byte_fallback")}
    )
    if max(by_id) >= vocab_size:
        raise CheckpointError(f"The tokenizer has ids up to {max(by_id)}, the embedding {vocab_size} rows.")
    return (
        [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)],
        [types.get(token_id, _UNUSED) for token_id in range(vocab_size)],
    )


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Minus the rank of the first merge that makes a piece."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else _MERGELESS_SCORE for token in tokens]


def _pre_name(state: dict[str, Any]) -> str | None:
    """GGUF's name for the pre-tokenizer in a tokenizer.json, None if it has none."""
    pre = state.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    found = [_spelled(step["pattern"].get("Regex", "")) for step in steps if step.get("type") == "Split"]
    others = [step for step in steps if step.get("type") != "Split"]
    if len(others) != 1 or others[0].get("type") != "ByteLevel" or others[0].get("add_prefix_space"):
        return None
    if others[0].get("use_regex", True):
        return "gpt-2" if not found else None
    whole_words = bool(state["model"].get("ignore_merges"))
    for name, patterns in PATTERNS.items():
        if found == [_spelled(pattern) for pattern in patterns]:
            return name if name != "smaug-bpe" or not whole_words else "llama-bpe"
    return None


def _spelled(pattern: str) -> str:
    """One spelling of the contractions, so that equal patterns compare equal."""
    return pattern.replace(_CONTRACTIONS[1], _CONTRACTIONS[0])
