"""A GGUF checkpoint under the names and in the shapes that models ask for, and its configuration.

GGUF renames tensors and, for the architecture "llama", reorders the rows of q and k within each head, so that rotary
pairs lie side by side. Both are undone here: what reads weights sees no difference to safetensors but their types.

Owns: the mappings of its files.
Never: touches the bytes of a block.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from penstock.base.errors import CheckpointError
from penstock.config.model import ModelConfig
from penstock.loader.gguf_file import GGUFFile, split_paths
from penstock.loader.mapped_tensor import TensorView

# general.architecture -> the name in config.json. Mistral's are written as "llama", and Mixtral's, with experts.
ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
_RENORMALIZED: Final = ("qwen3moe",)  # what llama.cpp takes each to be, for files that do not say
_MAX_EXPERTS: Final = 1024
_MAX_LAYERS: Final = 1024
ROPE_FACTORS: Final = "rope_freqs.weight"  # a divisor for each pair's frequency: Llama 3's scaling, worked out

_NAMES: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Of a mixture. With an expert's number left open: the experts' matrices, which GGUF stacks.
_QWEN_EXPERTS: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL_EXPERTS: Final = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_EXPERT: Final = re.compile(r"\.experts\.\d+\.", re.ASCII)
_LAYER_TENSOR: Final = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", re.ASCII)
_TENSOR: Final = re.compile(r"(\w+)\.(weight|bias)", re.ASCII)
_TURNED: Final = re.compile(r"\.(q|k)_proj\.")
# Ends of a turn that chat models stop at beside their eos, as llama.cpp knows them too.
_END_TOKENS: Final = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<EOT>"}
)
_CONTROL: Final = 3
_FLOAT_TYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def hf_name(name: str, architecture: str = "llama") -> str:
    """The name of a GGUF tensor in a Hugging Face checkpoint, itself if it has none. A stack's has a {} in it."""
    match = _LAYER_TENSOR.fullmatch(name)
    names = _LAYER_NAMES | (_MIXTRAL_EXPERTS if architecture == "llama" else _QWEN_EXPERTS)
    if match is not None and match[2] in names:
        return f"model.layers.{int(match[1])}.{names[match[2]]}.{match[3]}"
    match = _TENSOR.fullmatch(name)
    return f"{_NAMES[match[1]]}.{match[2]}" if match is not None and match[1] in _NAMES else name


def gguf_name(name: str) -> str | None:
    """The inverse of `hf_name`: None for a tensor that GGUF has no place for; of any expert's, the stack's."""
    stem, _, suffix = name.rpartition(".")
    stem = _EXPERT.sub(".experts.{}.", stem)
    for theirs, ours in _NAMES.items():
        if stem == ours:
            return f"{theirs}.{suffix}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem, re.ASCII)
    for names in (_LAYER_NAMES, _QWEN_EXPERTS, _MIXTRAL_EXPERTS):
        for theirs, ours in names.items():
            if match is not None and match[2] == ours:
                return f"blk.{match[1]}.{theirs}.{suffix}"
    return None


def turned_rows(head_dim: int, begin: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where rows [begin, end) of q or k lie in a "llama" file: within a head, row (half, pair) is at (pair, half)."""
    rows = np.arange(begin, end)
    head, inside = rows // head_dim, rows % head_dim
    half, pair = inside // (head_dim // 2), inside % (head_dim // 2)
    return head * head_dim + pair * 2 + half


class GGUFCheckpoint:
    """The tensors of a GGUF (all its parts) by their Hugging Face names. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[GGUFFile] = []
        self._place: dict[str, tuple[GGUFFile, str]] = {}
        for part in split_paths(path):
            self._files.append(GGUFFile(part))
        self.head = self._files[0]
        self.architecture = self.head.text("general.architecture")
        for file in self._files:
            for name in list(file.tensors):
                self._add(file, name)
        self._head_dim = self._read_head_dim() if self.architecture == "llama" else 0

    def _add(self, file: GGUFFile, name: str) -> None:
        ours = hf_name(name, self.architecture)
        if ours.endswith(".shared_expert_gate.weight"):
            file.as_row(name)
        if "{}" not in ours:
            places = {ours: (file, name)}
        elif file.tensors[name].shape[0] > _MAX_EXPERTS:
            raise CheckpointError(f"{self.path.name}: {name!r} claims more than {_MAX_EXPERTS} experts.")
        else:
            places = {ours.format(expert): (file, own) for expert, own in enumerate(file.part_stack(name))}
        if places.keys() & self._place.keys():
            raise CheckpointError(f"Tensor {name!r} is in two parts of {self.path.name}.")
        self._place |= places

    def _read_head_dim(self) -> int:
        rotated = self.head.integer("llama.rope.dimension_count", 0)
        if rotated:
            return rotated
        heads = self.head.integer("llama.attention.head_count")
        return self.head.integer("llama.embedding_length") // max(heads, 1)

    def names(self) -> set[str]:
        return set(self._place)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def tensor_type(self, name: str) -> str:
        """The type of a tensor that is there: "F32", "Q4_K", ..."""
        file, theirs = self._place[name]
        return file.tensors[theirs].type

    def shape(self, name: str) -> tuple[int, ...]:
        file, theirs = self._place[name]
        return file.tensors[theirs].shape

    def size_bytes(self, name: str) -> int:
        shape = self.shape(name)
        return (shape[0] if shape else 1) * self.row_bytes(name)

    def row_bytes(self, name: str) -> int:
        file, theirs = self._place[name]
        return file.tensors[theirs].row_bytes

    def read(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> TensorView:
        """Rows [begin, end) of `name`, which must have `shape`: a view of the file where its order allows."""
        if name not in self._place:
            raise CheckpointError(f"{self.path.name} lacks the tensor {name!r}.")
        file, theirs = self._place[name]
        if self.shape(name) != shape:
            raise CheckpointError(
                f"Tensor {theirs!r} has the shape {list(self.shape(name))}; the metadata imply {list(shape)}.",
                remedy="The file is damaged or of another kind of model: download or convert it again.",
            )
        if not self._head_dim or _TURNED.search(name) is None:
            return file.read(theirs, begin, end)
        end = shape[0] if end is None else end
        first, last = begin // self._head_dim * self._head_dim, -(-end // self._head_dim) * self._head_dim
        view = file.read(theirs, first, last)
        rows = np.frombuffer(view.data, np.uint8).reshape(last - first, -1)
        ordered = rows[turned_rows(self._head_dim, begin, end) - first]
        return TensorView(view.dtype, (end - begin, *shape[1:]), memoryview(ordered).cast("B"))

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Gives the pages of rows [begin, end) back to the system once they have been copied."""
        file, theirs = self._place[name]
        file.release(theirs, begin, end)

    def close(self) -> None:
        for file in self._files:
            # A view that is still held (by the traceback of a failed load) keeps its mapping until it goes too.
            with contextlib.suppress(BufferError):
                file.close()

    def model_config(self) -> ModelConfig:
        """The model that the metadata describe. Raises CheckpointError naming the key that is missing or wrong."""
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path.name} is of the architecture {self.architecture[:40]!r}, which is not supported.",
                remedy=f"Supported: {', '.join(ARCHITECTURES)}.",
            )
        try:
            config = ModelConfig.from_hf(self.config_json())
        except CheckpointError as error:
            raise CheckpointError(error.message.replace("config.json", self.path.name), remedy=error.remedy) from error
        if self.architecture == "llama" and config.head_dim != self._head_dim:
            raise CheckpointError(f"{self.path.name}: rotating a part of each head is not supported.")
        return msgspec.structs.replace(config, attention_bias=self._has("self_attn.q_proj.bias"))

    def _has(self, suffix: str) -> bool:
        return f"model.layers.0.{suffix}" in self._place

    def config_json(self) -> dict[str, Any]:
        """What a config.json would say. Raises CheckpointError for a key that is missing or wrong."""
        head, prefix = self.head, self.architecture
        embedding = "model.embed_tokens.weight"
        if embedding not in self._place or len(self.shape(embedding)) != 2:
            raise CheckpointError(f"{self.path.name} lacks the embedding token_embd.weight.")
        heads = head.integer(f"{prefix}.attention.head_count")
        hidden = head.integer(f"{prefix}.embedding_length")
        return {
            "architectures": [self._family],
            "vocab_size": self.shape(embedding)[0],
            "hidden_size": hidden,
            "intermediate_size": head.integer(f"{prefix}.feed_forward_length"),
            "num_hidden_layers": head.integer(f"{prefix}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": head.integer(f"{prefix}.attention.head_count_kv", heads),
            "head_dim": head.integer(f"{prefix}.attention.key_length", hidden // max(heads, 1)),
            "max_position_embeddings": head.integer(f"{prefix}.context_length"),
            "rms_norm_eps": head.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "lm_head.weight" not in self._place,
            "attention_bias": self._has("self_attn.o_proj.bias"),
            "mlp_bias": self._has("mlp.down_proj.bias"),
            "torch_dtype": _FLOAT_TYPES.get(self.tensor_type(embedding), "bfloat16"),
            "rope_parameters": self._rope(),
            "eos_token_id": self.end_token_ids(),
            **self._experts(),
        }

    @property
    def _family(self) -> str:
        is_mixtral = self.architecture == "llama" and self.head.integer("llama.expert_count", 0) > 0
        return "MixtralForCausalLM" if is_mixtral else ARCHITECTURES[self.architecture]

    def _experts(self) -> dict[str, Any]:
        """Of a mixture. Layers without a router are dense; what an expert's size is, its matrices say."""
        head, prefix = self.head, self.architecture
        if not head.integer(f"{prefix}.expert_count", 0):
            return {}
        names = _MIXTRAL_EXPERTS if prefix == "llama" else _QWEN_EXPERTS
        num_layers = min(head.integer(f"{prefix}.block_count"), _MAX_LAYERS)
        in_layer = [
            {theirs: f"model.layers.{layer}.{ours.format(0)}.weight" for theirs, ours in names.items()}
            for layer in range(num_layers)
        ]
        sparse = [layer for layer in range(num_layers) if in_layer[layer]["ffn_gate_exps"] in self._place]
        if not sparse:
            raise CheckpointError(
                f"{self.path.name} lacks its experts, ffn_gate_exps.",
                remedy="Files of 2023 and before, which keep experts one by one, have to be converted again.",
            )
        first = in_layer[sparse[0]]
        shared = first.get("ffn_gate_shexp")
        return {
            "num_local_experts": head.integer(f"{prefix}.expert_count"),
            "num_experts_per_tok": head.integer(f"{prefix}.expert_used_count"),
            "norm_topk_prob": head.flag(f"{prefix}.expert_weights_norm", prefix in _RENORMALIZED),
            "mlp_only_layers": [layer for layer in range(num_layers) if layer not in sparse],
            "moe_intermediate_size": self.shape(first["ffn_gate_exps"])[0],
            "shared_expert_intermediate_size": self.shape(shared)[0] if shared in self._place else None,
        }

    def _rope(self) -> dict[str, Any]:
        head, prefix = self.head, self.architecture
        rope: dict[str, Any] = {"rope_theta": head.number(f"{prefix}.rope.freq_base", 10_000.0)}
        kind = head.text(f"{prefix}.rope.scaling.type", "none")
        original = head.integer(f"{prefix}.rope.scaling.original_context_length", 0)
        if ROPE_FACTORS in self._place:
            view = self.read(ROPE_FACTORS, self.shape(ROPE_FACTORS))
            if view.dtype != "F32":
                raise CheckpointError(f"{ROPE_FACTORS} is stored as {view.dtype}, not F32.")
            factors = np.frombuffer(view.data, np.float32).tolist()
            # "longrope" with one list for all lengths is exactly a divisor for each pair's frequency.
            return rope | {
                "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
                "attention_factor": 1.0, "original_max_position_embeddings": 2,
            }  # fmt: skip
        if kind == "none":
            return rope
        rope |= {"rope_type": kind, "factor": head.number(f"{prefix}.rope.scaling.factor")}
        if original:
            rope["original_max_position_embeddings"] = original
        return rope

    def end_token_ids(self) -> list[int]:
        """The ids that end an output: eos, end of turn, and control tokens that are known to be one."""
        ids = [self.head.integer(f"tokenizer.ggml.{name}_token_id", -1) for name in ("eos", "eot", "eom")]
        tokens, types = self.head.strings("tokenizer.ggml.tokens"), self.head.numbers("tokenizer.ggml.token_type")
        if types is not None and len(types) == len(tokens):
            ids += [int(index) for index in np.flatnonzero(types == _CONTROL) if tokens[index] in _END_TOKENS]
        return [token_id for token_id in dict.fromkeys(ids) if token_id >= 0]
