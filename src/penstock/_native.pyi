# The compiled kernels. Arguments are data_ptr() integers and sizes; nothing is checked there, see kernels/native.

# The kernels of one instruction set, or of the best that works here. ValueError: not compiled in. RuntimeError: it does
# not work on this machine, and why.
def kernels(isa: str = "") -> Kernels: ...

# (name, works, why not) of every instruction set compiled in, lowest first.
def isa_statuses() -> list[tuple[str, bool, str]]: ...

# For tests: what the probe's guard makes of an illegal instruction.
def guarded_trap() -> str: ...

# Sets what kernels are tuned for, for tests and benchmarks: Zen 4, or all others (csrc/tuning.h). Results are the same.
# Returns what it was.
def tune(halves_vectors: bool) -> bool: ...

# Ends the threads that OpenMP keeps for the calling one; its next kernel starts them again.
def release_threads() -> None: ...

class Kernels:
    @property
    def isa(self) -> str: ...
    # limits
    def read_all(self, data: int, nbytes: int, num_threads: int, /) -> int: ...
    def multiply_all(self, dtype: int, steps: int, num_threads: int, /) -> int: ...
    # linear
    def linear(
        self,
        x: int,
        weight: int,
        bias: int,
        out: int,
        m: int,
        n: int,
        k: int,
        dtype: int,
        out_dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def linear_emulated_tiles(
        self, x: int, weight: int, bias: int, out: int, m: int, n: int, k: int, out_dtype: int, num_threads: int, /
    ) -> None: ...
    def pack(
        self,
        source: int,
        packed: int,
        first_row: int,
        rows: int,
        k: int,
        source_dtype: int,
        dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def embedding(
        self, ids: int, weight: int, out: int, tokens: int, k: int, dtype: int, num_threads: int, /
    ) -> None: ...
    # quantized; the layout's numbers are those of csrc/bindings/quantized.cpp
    def quantized_linear(
        self,
        layout: tuple[int, ...],
        x: int,
        weight: int,
        bias: int,
        out: int,
        m: int,
        n: int,
        k: int,
        dtype: int,
        out_dtype: int,
        num_threads: int,
        is_gated: bool,
        /,
    ) -> None: ...
    def quantized_linear_emulated_tiles(
        self,
        layout: tuple[int, ...],
        x: int,
        weight: int,
        groups: list[tuple[int, int, int, int]],
        out: int,
        m: int,
        n: int,
        k: int,
        dtype: int,
        out_dtype: int,
        num_threads: int,
        is_gated: bool,
        /,
    ) -> None: ...
    def quantized_pack(
        self,
        layout: tuple[int, ...],
        kind: int,
        source: int,
        scales: int,
        minimums: int,
        source_type: int,
        packed: int,
        first_row: int,
        rows: int,
        n: int,
        k: int,
        num_threads: int,
        /,
    ) -> None: ...
    def quantized_rows(
        self,
        layout: tuple[int, ...],
        weight: int,
        ids: int,
        first_row: int,
        count: int,
        out: int,
        n: int,
        k: int,
        out_dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    # norm, activation
    def rms_norm(
        self,
        x: int,
        residual: int,
        weight: int,
        out: int,
        tokens: int,
        size: int,
        eps: float,
        dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def layer_norm(
        self,
        x: int,
        residual: int,
        weight: int,
        bias: int,
        out: int,
        tokens: int,
        size: int,
        eps: float,
        dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def gelu(self, x: int, out: int, count: int, dtype: int, num_threads: int, /) -> None: ...
    def silu_and_mul(
        self,
        gate_up: int,
        out: int,
        tokens: int,
        size: int,
        dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    # experts; a layout is empty for floats, gate_up and down are the addresses of the addresses of weights
    def choose_experts(
        self,
        logits: int,
        experts: int,
        weights: int,
        tokens: int,
        num_experts: int,
        top_k: int,
        is_renormalized: bool,
        num_threads: int,
        /,
    ) -> None: ...
    def experts_mlp(
        self,
        gate_up_layout: tuple[int, ...],
        gate_up: int,
        down_layout: tuple[int, ...],
        down: int,
        x: int,
        experts: int,
        weights: int,
        out: int,
        tokens: int,
        num_experts: int,
        top_k: int,
        hidden: int,
        inner: int,
        dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def add_shared_expert(
        self, mixed: int, logits: int, shared: int, out: int, tokens: int, size: int, dtype: int, num_threads: int, /
    ) -> None: ...
    # rope, attention, copy
    def rope_and_cache(
        self,
        qkv: int,
        cos: int,
        sin: int,
        key_cache: int,
        value_cache: int,
        slot_mapping: int,
        q_norm: int,
        k_norm: int,
        tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        dtype: int,
        cache_dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def paged_attention(
        self,
        q: int,
        q_stride: int,
        key_cache: int,
        value_cache: int,
        block_tables: int,
        max_blocks: int,
        context_lens: int,
        query_starts: int,
        out: int,
        num_requests: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        sliding_window: int,
        dtype: int,
        cache_dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def full_attention(
        self,
        qkv: int,
        query_starts: int,
        out: int,
        num_texts: int,
        num_heads: int,
        head_dim: int,
        scale: float,
        dtype: int,
        num_threads: int,
        /,
    ) -> None: ...
    def copy_blocks(
        self,
        cache: int,
        block_bytes: int,
        sources: int,
        destinations: int,
        count: int,
        /,
    ) -> None: ...
    # scale_search
    def search_affine_scales(
        self, x: int, weight: int, scale: int, minimum: int, groups: int, size: int, top: int, num_threads: int, /
    ) -> None: ...
    def search_symmetric_scales(
        self, x: int, weight: int, scale: int, groups: int, size: int, top: int, num_threads: int, /
    ) -> None: ...
    # sampling
    def mask_logits(
        self, logits: int, row_ids: int, masks: int, masked_rows: int, vocab: int, num_threads: int
    ) -> None: ...
    def sample(
        self,
        logits: int,
        temperature: int,
        top_k: int,
        top_p: int,
        min_p: int,
        uniform: int,
        ids: int,
        rows: int,
        vocab: int,
        num_threads: int,
        /,
    ) -> None: ...
    def logprobs(
        self,
        logits: int,
        ids: int,
        logprobs: int,
        ranks: int,
        top_ids: int,
        top_logprobs: int,
        rows: int,
        vocab: int,
        top: int,
        num_threads: int,
        /,
    ) -> None: ...

# Remembers the calls of what it has the methods of (csrc/bindings/program.cpp). inputs: (address, bytes).
class Program:
    def __init__(self, kernels: Kernels, tokens: int, inputs: list[tuple[int, int]], /) -> None: ...
    # Those of Kernels, which are remembered; ValueError: one that cannot be.
    rms_norm = Kernels.rms_norm
    linear = Kernels.linear
    quantized_linear = Kernels.quantized_linear
    rope_and_cache = Kernels.rope_and_cache
    paged_attention = Kernels.paged_attention
    silu_and_mul = Kernels.silu_and_mul
    choose_experts = Kernels.choose_experts
    experts_mlp = Kernels.experts_mlp
    add_shared_expert = Kernels.add_shared_expert
    def copy_columns(self, x: int, out: int, tokens: int, row_bytes: int, out_row_bytes: int, /) -> None: ...
    def finish(self, result: int, /) -> None: ...
    def run(self, inputs: list[int], result: int, tokens: int, num_requests: int, max_blocks: int, /) -> None: ...
