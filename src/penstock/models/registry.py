"""The architectures that can run, and what they have in common. To add one: a file, a line here, a line in
config.model.SUPPORTED_ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from torch import Tensor

from penstock.config.model import SUPPORTED_ARCHITECTURES, ModelConfig
from penstock.kernels.ops import Ops
from penstock.layers import AttentionMetadata, KVCache, Weights
from penstock.models.bert import PREFIXES, BertModel
from penstock.models.llama import LlamaForCausalLM
from penstock.models.mistral import MistralForCausalLM
from penstock.models.mixtral import MixtralForCausalLM
from penstock.models.qwen2 import Qwen2ForCausalLM
from penstock.models.qwen3 import Qwen3ForCausalLM
from penstock.models.qwen_moe import QwenMoeForCausalLM


class LanguageModel(Protocol):
    """Token ids in, hidden states and logits out. It knows the step's tokens and their positions, not whose they are.

    Encoders get no caches. Their logits, as those of a decoder that is a classifier, are of the labels.
    """

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        kv_caches: Sequence[KVCache],
        metadata: AttentionMetadata,
        ops: Ops,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and positions (int64) -> (x, residual), whose sum is the last layer's output, each [T, D]."""
        ...

    def hidden(self, x_RD: Tensor, residual_RD: Tensor, ops: Ops) -> Tensor:
        """Rows of what `forward` returned -> last hidden states [R, D]. Overwrites the residual."""
        ...

    def logits(self, x_RD: Tensor, residual_RD: Tensor, ops: Ops) -> Tensor:
        """Rows of what `forward` returned -> logits [R, V] float32. Overwrites the residual."""
        ...


ARCHITECTURES: Final[dict[str, Callable[[ModelConfig, Weights, int], LanguageModel]]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen2MoeForCausalLM": QwenMoeForCausalLM,
    "Qwen3MoeForCausalLM": QwenMoeForCausalLM,
    "BertModel": BertModel,
    "RobertaModel": BertModel,
    "XLMRobertaModel": BertModel,
}
assert tuple(ARCHITECTURES) == SUPPORTED_ARCHITECTURES


def is_ignored_tensor(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints carry and no model needs: stored tables, the copy of a tied head, heads of tasks
    that the checkpoint is not served for."""
    if name.endswith(("rotary_emb.inv_freq", "rope_freqs.weight", "embeddings.position_ids")):
        return True
    if config.is_encoder:
        has_pooler = bool(config.pooler.labels) and config.architecture == "BertModel"
        return name.startswith(("cls.", "lm_head.")) or ("pooler." in name and not has_pooler)
    return name == "lm_head.weight" and (config.tie_word_embeddings or "generate" not in config.tasks)


def base_prefix(architecture: str) -> str:
    """What the names of the body's tensors begin with, unless the checkpoint is of the body alone."""
    return PREFIXES.get(architecture, "model.")
