"""The architectures that can run, and what they have in common. To add one: a file, a line here, a line in
config.model.SUPPORTED_ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

from torch import Tensor

from penstock.config.model import SUPPORTED_ARCHITECTURES, ModelConfig
from penstock.kernels.ops import Ops
from penstock.layers import AttentionMetadata, KVCache, Weights
from penstock.models.bert import PREFIXES, BertModel
from penstock.models.decoder import Decoder
from penstock.models.llama import llama_layer
from penstock.models.mistral import mistral_layer
from penstock.models.mixtral import mixtral_layer
from penstock.models.qwen2 import qwen2_layer
from penstock.models.qwen3 import qwen3_layer
from penstock.models.qwen_moe import qwen_moe_layer


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
    "LlamaForCausalLM": partial(Decoder, llama_layer),
    "MistralForCausalLM": partial(Decoder, mistral_layer),
    "Qwen2ForCausalLM": partial(Decoder, qwen2_layer),
    "Qwen3ForCausalLM": partial(Decoder, qwen3_layer),
    "MixtralForCausalLM": partial(Decoder, mixtral_layer),
    "Qwen2MoeForCausalLM": partial(Decoder, qwen_moe_layer),
    "Qwen3MoeForCausalLM": partial(Decoder, qwen_moe_layer),
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
