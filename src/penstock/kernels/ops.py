"""The op table: every operation a model's forward pass is made of, with its signature and meaning.

`load` gives one `Ops` object, which is passed explicitly to whatever computes. Its implementation is "native" (csrc/,
through penstock._native), "triton" (GPUs) or "reference" (torch; always right, and what the others are tested against).
Shapes: T tokens of the step, K inputs, N outputs, H query heads, G key/value heads, D head size, V vocabulary, R rows.
Activations are contiguous and of the model's dtype, bfloat16 or float32, unless said otherwise; sums are in float32.
A row's result never depends on the other rows.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Protocol

import torch

from penstock.base.errors import ConfigError
from penstock.kernels.layouts import HostLayouts, Layouts, TorchLayouts
from penstock.kernels.reference.experts import ReferenceExperts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from penstock.kernels.expert_stack import ExpertStack
    from penstock.kernels.packed import PackedLinear
    from penstock.kernels.quantized import QuantizedLinear
    from penstock.kernels.rounded import ActivationForm, RoundedActivations


HOST: Final = torch.device("cpu")


class Layers(Protocol):
    """The layers of a decoder: what is to be added to the residual [T, D] after them all; it changes in place.

    step: cosines and sines [T, E / 2], slot mapping [T], block tables [R, W], context lengths [R], query starts [R + 1]
    of the step. caches: of all layers.
    """

    def __call__(self, ops: Ops, residual_TD: Tensor, step: tuple[Tensor, ...], caches: Sequence[Tensor]) -> Tensor: ...


class LayerRecordings(Protocol):
    """is_on: to be set where weights stay where they are, and layers are nothing but ops."""

    is_on: bool

    def run(
        self, layers: Layers, residual_TD: Tensor, step: tuple[Tensor, ...], caches: Sequence[Tensor]
    ) -> Tensor | None:
        """What layers(...) gives, or None: they have to be run as they are."""


class ExpertOps(Protocol):
    """What a mixture of experts is made of. P = T K pairs of a token and one of its K experts, in the tokens' order."""

    def choose(self, logits_TE: Tensor, top_k: int, *, is_renormalized: bool) -> tuple[Tensor, Tensor]:
        """(experts [T, K] int32, their softmax weights [T, K] float32), the most probable first, of equals the lower
        number. logits: float32. is_renormalized: the weights are divided by their sum."""
        ...

    def combine(self, pairs_PN: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of each token's pairs, in float32 and in order, rounded once -> [T, N]."""
        ...

    def mlp(
        self,
        x_TD: Tensor,
        chosen: tuple[Tensor, Tensor],
        gate_up: PackedLinear | QuantizedLinear,
        down: PackedLinear | QuantizedLinear,
        num_experts: int,
    ) -> Tensor:
        """combine(down(silu_and_mul(gate_up(x)))) of each token's experts -> [T, D]. chosen: of `choose`.

        gate_up [experts * 2 I, D], down [experts * D, I]: the experts below each other (Layouts.stacks_experts).
        """
        ...

    def mlp_of_each(
        self, x_TD: Tensor, chosen: tuple[Tensor, Tensor], gate_up: ExpertStack, down: ExpertStack
    ) -> Tensor:
        """The same of experts that are weights of their own: gate_up [2 I, D], down [D, I] of each."""
        ...

    def add_shared(self, mixed_TD: Tensor, logits_T1: Tensor, shared_TD: Tensor) -> Tensor:
        """mixed + sigmoid(logit) * shared of each token in float32, rounded once -> [T, D]. logits: float32."""
        ...


class RoundedOps(Protocol):
    """Norms and activations that end in the rounding of the linear behind them, bit for bit as that would round."""

    def form(self, weight: PackedLinear | QuantizedLinear) -> ActivationForm | None:
        """What the linear of a weight rounds its inputs to; None: it takes them as they are."""
        ...

    def linear(
        self,
        x: RoundedActivations,
        weight: PackedLinear | QuantizedLinear,
        bias_N: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Ops.linear of inputs in the form of `weight`. out_dtype: the weight's (default) or float32."""
        ...

    def rms_norm(
        self, x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, eps: float, form: ActivationForm
    ) -> RoundedActivations:
        """Ops.rms_norm, rounded."""
        ...

    def silu_and_mul(self, gate_up_TJ: Tensor, form: ActivationForm) -> RoundedActivations:
        """Ops.silu_and_mul, rounded."""
        ...


class ScaleSearch(Protocol):
    """What encoding GGUF's K types takes (kernels/native/scale_search.py, kernels/reference/scale_search.py).

    x, weight: float32, contiguous, [N, G, E] with groups of E = 16 or 32 values. weight: how much the error of each
    value counts.
    """

    def affine(self, x_NGE: Tensor, weight_NGE: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """(scales, minimums >= 0), both [N, G]: x = scale * code - minimum, codes 0 to top, with the least error."""
        ...

    def symmetric(self, x_NGE: Tensor, weight_NGE: Tensor, half: int) -> Tensor:
        """The same without minimums: x = scale * code, codes -half to half - 1 -> [N, G]."""
        ...


class Ops(ABC):
    """One implementation of every op.

    kind: "native", "triton" or "reference". isa: the instruction set of the native kernels, or what else they run on.
    layouts: how weights and caches lie, and on which device.
    recordings: of the ops that layers are made of, where this implementation can repeat them by itself.
    rounded: the ops that round their results for the next linear, where this implementation has them.
    experts: the ops of mixtures of experts. scale_search: what encoding GGUF's K types takes.
    """

    __slots__ = ("experts", "isa", "kind", "layouts", "num_threads", "recordings", "rounded", "scale_search")
    scale_search: ScaleSearch

    def __init__(self, kind: str, isa: str, num_threads: int, layouts: Layouts) -> None:
        self.kind = kind
        self.isa = isa
        self.num_threads = num_threads
        self.layouts = layouts
        self.experts: ExpertOps = ReferenceExperts(self)
        self.recordings: LayerRecordings | None = None
        self.rounded: RoundedOps | None = None

    # ---- linear, embedding (kernels/native/linear.py, kernels/reference/linear.py, csrc/ops/linear.cpp)

    @abstractmethod
    def pack_into(self, packed: PackedLinear, first_row: int, source: Tensor) -> None:
        """Convert source [rows, K] (float32, bfloat16 or float16; may be a mapped file's) into rows of `packed`."""

    @abstractmethod
    def linear(
        self,
        x_TK: Tensor,
        weight: PackedLinear | QuantizedLinear,
        bias_N: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x @ weight.T + bias -> [T, N]. The bias is added in float32. out_dtype: x's (default) or float32.

        Where a quantised weight's layout asks for it, x is rounded to 8 bits first (kernels/quantized.py).
        """

    def gated_linear(
        self, x_TK: Tensor, weight: PackedLinear | QuantizedLinear, bias_N: Tensor | None = None
    ) -> Tensor:
        """silu_and_mul of linear's columns -> [T, N / 2], bit for bit. An implementation may do both in one pass."""
        return self.silu_and_mul(self.linear(x_TK, weight, bias_N))

    @abstractmethod
    def embedding(self, ids_T: Tensor, weight: PackedLinear | QuantizedLinear) -> Tensor:
        """Rows of a packed [V, K] -> [T, K] of the weight's dtype. ids: int64, each in [0, V)."""

    # ---- quantised weights (kernels/quantized.py has the layouts; csrc/ops/quantized*.cpp)

    @abstractmethod
    def pack_parts(
        self,
        packed: QuantizedLinear,
        first_row: int,
        codes_RK: Tensor,
        scales_RG: Tensor,
        minimums_RG: Tensor | None = None,
    ) -> None:
        """Pack rows of codes (uint8, one a byte) with a scale, and a minimum or point, for each of G groups of a row.

        scales and minimums: float32, rounded to the layout's storage. Not for layouts of "super" scales.
        """

    @abstractmethod
    def pack_gguf(self, packed: QuantizedLinear, first_row: int, blocks_RN: Tensor, ggml_type: int) -> None:
        """Pack rows of GGUF blocks (uint8, N bytes a row, may be a mapped file's). The layout is the type's."""

    @abstractmethod
    def quantize_into(self, packed: QuantizedLinear, first_row: int, source: Tensor) -> None:
        """Round float rows [R, K] (float32, bfloat16, float16) to codes: symmetric integers of 4 (Q4_0) or 8 bits."""

    @abstractmethod
    def dequantize(self, packed: QuantizedLinear, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows of a weight (None: all from the first), float32."""

    # ---- norms and activation (norm, activation in kernels/native, kernels/reference, csrc/ops)

    @abstractmethod
    def rms_norm(self, x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, eps: float) -> Tensor:
        """y / sqrt(mean(y^2) + eps) * weight in float32, rounded once -> [T, K].

        y: x; or the residual, after residual += x in place, rounded to its dtype. Published model code rounds before
        the weight too, which costs several times the divergence from float.
        """

    @abstractmethod
    def layer_norm(
        self, x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, bias_K: Tensor, eps: float
    ) -> Tensor:
        """(y - mean(y)) / sqrt(var(y) + eps) * weight + bias in float32, rounded once -> [T, K].

        y: x, or x + residual rounded to their dtype.
        """

    @abstractmethod
    def gelu(self, x_TI: Tensor) -> Tensor:
        """x * Phi(x) with the normal distribution itself (no tanh), in float32, rounded once -> [T, I]."""

    @abstractmethod
    def silu_and_mul(self, gate_up_TJ: Tensor) -> Tensor:
        """[T, 2 I], gate then up -> [T, I]: silu(gate) in float32, rounded to the dtype, times up."""

    # ---- attention and its cache (kernels/kv_layout.py has the layouts; csrc/ops/rope.cpp, attention.cpp, copy.cpp)

    @abstractmethod
    def rope_and_cache(
        self,
        qkv_TS: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping_T: Tensor,
        qk_norm: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        """Rotate q in place; write rotated keys and values to their slots. S = (H + 2 G) D, E = D / 2.

        The caches are of q's dtype, or of int8 or float8_e4m3fn: then each token's key and value of a head are rounded
        to codes with a scale of their own.

        cos, sin: float32, of each token's position; dimension d turns with d + D / 2. slot_mapping: int64, block * 16 +
        offset; a negative one is not written. qk_norm: (q weight [D], k weight [D], eps), a norm per head before the
        rotation, or None.
        """

    @abstractmethod
    def paged_attention(
        self,
        q_THD: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables_RW: Tensor,
        context_lens_R: Tensor,
        query_starts: Tensor,
        scale: float,
        sliding_window: int = 0,
    ) -> Tensor:
        """Causal attention of each request's new tokens over its context -> [T, H * D].

        q: may be a view with a longer token stride. All tables int32: query_starts [R + 1], the requests' first tokens;
        context_lens, the step's tokens included. The row at position p sees (p - sliding_window, p], or all up to p if
        that is 0; nothing else in the cache influences it, not even a NaN. A row's bits do not depend on the batch, on
        how its request was cut into steps, or on the number of threads.
        """

    @abstractmethod
    def full_attention(self, qkv_TS: Tensor, query_starts: Tensor, num_heads: int, scale: float) -> Tensor:
        """Attention of each token over all tokens of its own text, without a cache -> [T, H * D]. S = 3 H D.

        qkv: all query heads, then all keys, then all values. query_starts [R + 1] int32: the texts' first tokens.
        """

    @abstractmethod
    def copy_blocks(self, caches: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
        """In each cache [B, ...], copy blocks sources[i] to destinations[i] (int64; no block is both)."""

    # ---- sampling (kernels/native/sampling.py, kernels/reference/sampling.py, csrc/ops/sampling.cpp)

    @abstractmethod
    def sample(
        self,
        logits_RV: Tensor,
        temperature_R: Tensor,
        top_k_R: Tensor,
        top_p_R: Tensor,
        min_p_R: Tensor,
        uniform_R: Tensor,
    ) -> Tensor:
        """Token ids [R] int64, each a function of its own row and uniform number alone.

        logits: float32, penalties applied; -inf excludes a token. temperature, top_p, min_p: float32; top_k: int32;
        uniform: float64 in [0, 1). Order: temperature (0: the largest logit, of equals the lowest id); top_k (off
        outside [1, V); equals of the k-th stay); top_p (off from 1), the smallest set of what top_k left that holds at
        least that share of its probability, of equals the lower ids; min_p, relative to the most probable. Then the
        first id, in rising order, at which the cumulative probability exceeds uniform.
        -1 for a row that has a NaN or +inf, or nothing finite.
        """

    @abstractmethod
    def mask_logits(self, logits_RV: Tensor, rows: Sequence[int], masks_KW: NDArray[np.int32]) -> None:
        """Sets to -inf, in the given rows, every logit whose bit (i % 32 of word i // 32) is 0 in the row's mask.

        logits: float32, contiguous. masks: [K, ceil(V / 32)] int32, one for each of the rows.
        """

    def apply_penalties(
        self, logits_RV: Tensor, rows_N: Tensor, token_ids_N: Tensor, counts_N: Tensor, penalties_R3: Tensor
    ) -> None:
        """Penalises float32 logits in place; entry n is one distinct token of row rows[n]. No (row, token) twice.

        rows, token_ids: int64. counts: float32, how often the token stands in the row's output (0: in its prompt only).
        penalties: float32, a row's (repetition, frequency, presence); (1, 0, 0) changes nothing. In torch but on GPUs:
        a CPU's rows are penalised as they are sampled (sampling/penalties.py).
        """
        values = logits_RV[rows_N, token_ids_N]
        repetition, frequency, presence = penalties_R3[rows_N].unbind(1)
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits_RV[rows_N, token_ids_N] = values - frequency * counts_N - presence * (counts_N > 0)

    @abstractmethod
    def top_logprobs(self, logits_RV: Tensor, ids_R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log-probabilities [R] of `ids`, their ranks [R] int32, ids [R, k] int64 and log-probabilities [R, k]).

        A rank is 1 + how many logits are larger. The k best fall by logit, of equals the lower id first.
        """


def pack_linear(ops: Ops, weights: Sequence[Tensor], dtype: torch.dtype) -> PackedLinear:
    """Pack weights [N_i, K], stacked by rows (fused q, k, v; gate, up), as one [sum N_i, K] of `dtype`."""
    packed = ops.layouts.empty_linear(sum(weight.shape[0] for weight in weights), weights[0].shape[1], dtype)
    first_row = 0
    for weight in weights:
        ops.pack_into(packed, first_row, weight)
        first_row += weight.shape[0]
    return packed


def load(
    kind: str,
    num_threads: int,
    isa: str | None = None,
    device: torch.device = HOST,
    *,
    batch_invariant: bool = False,
) -> Ops:
    """Build the op table. isa: force an instruction set (default: PENSTOCK_ISA, else the best that works here).

    batch_invariant: a row's bits depend on its own request alone. The native kernels always have that, torch never.
    ConfigError: the native core or Triton is missing, or the forced instruction set does not work on this machine.
    """
    assert num_threads >= 1, num_threads
    if kind == "reference":
        from penstock.kernels.reference.table import ReferenceOps

        return ReferenceOps(num_threads, layouts(kind, device))
    if kind == "triton":
        return _triton_ops(num_threads, device, batch_invariant=batch_invariant)
    assert kind == "native", kind
    try:
        from penstock import _native
    except ImportError as error:
        raise ConfigError(
            f"The native core cannot be loaded ({error}).",
            remedy="Build it with `pip install .`, or choose the reference kernels.",
        ) from error
    from penstock.kernels.native.table import NativeOps

    try:
        kernels = _native.kernels(os.environ.get("PENSTOCK_ISA", "") if isa is None else isa)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"PENSTOCK_ISA: {error}.", remedy="Unset it to use the best one that works.") from error
    return NativeOps(kernels, num_threads)


def _triton_ops(num_threads: int, device: torch.device, *, batch_invariant: bool) -> Ops:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("Triton is not installed.", remedy="Install `penstock[gpu]`, or serve with --device cpu.")
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not is_interpreted and not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
        raise ConfigError(
            "Triton builds what starts its kernels with a C compiler, and none is found.",
            remedy="Install gcc and Python's headers (apt install gcc python3-dev), or name a compiler in CC.",
        )
    if device.type == "cpu" and not is_interpreted:
        raise ConfigError(
            "The Triton kernels run on a GPU, and this engine is on the CPU.",
            remedy="Leave --kernels out, or give --device cuda. (For tests: TRITON_INTERPRET=1 interprets them.)",
            param="kernels",
        )
    from penstock.kernels.triton.table import RowInvariantOps, TritonOps

    return (RowInvariantOps if batch_invariant else TritonOps)(num_threads, layouts("triton", device))


def layouts(kind: str, device: torch.device = HOST) -> Layouts:
    """The layouts of an op table that need not be loaded for it."""
    if kind == "triton":
        from penstock.kernels.triton.layouts import TritonLayouts

        return TritonLayouts(device)
    return HostLayouts() if device.type == "cpu" else TorchLayouts(device)
