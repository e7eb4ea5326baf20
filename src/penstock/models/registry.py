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
from penstock.models.llama import LlamaForCausalLM
from penstock.models.mistral import MistralForCausalLM
from penstock.models.qwen2 import Qwen2ForCausalLM
from penstock.models.qwen3 import Qwen3ForCausalLM


class CausalLM(Protocol):
    """A decoder: token ids in, logits out. It knows the step's tokens and their positions, not whose they are."""

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

    def logits(self, x_RD: Tensor, residual_RD: Tensor, ops: Ops) -> Tensor:
        """Rows of what `forward` returned -> logits [R, V] float32. Overwrites the residual."""
        ...


ARCHITECTURES: Final[dict[str, Callable[[ModelConfig, Weights, int], CausalLM]]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}
assert tuple(ARCHITECTURES) == SUPPORTED_ARCHITECTURES


def is_ignored_tensor(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints carry and no model needs: stored rotary tables, the copy of a tied head."""
    return name.endswith(("rotary_emb.inv_freq", "rope_freqs.weight")) or (
        config.tie_word_embeddings and name == "lm_head.weight"
    )
