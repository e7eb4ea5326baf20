"""The frozen configuration that one engine is built from. Every value is resolved: nothing here means 'auto'."""

from __future__ import annotations

import msgspec

from penstock.config.model import ModelConfig


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """num_blocks: blocks of `block_size` tokens in the pool. enable_prefix_caching: keep finished blocks for reuse.

    dtype: "model" (as activations are), "int8" or "fp8". num_host_blocks: blocks that the host's memory keeps of what a
    device's pool gives up. host_memory_bytes: what the memory plan may make these of; None: it decides.
    """

    block_size: int
    num_blocks: int
    enable_prefix_caching: bool = True
    dtype: str = "model"
    num_host_blocks: int = 0
    host_memory_bytes: int | None = 0


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits the scheduler keeps.

    max_num_batched_tokens: token budget of a step. watermark_blocks: blocks kept free when admitting a request, so
    that running ones can grow. max_preemptions: after that many a request is not preempted again. policy: "fcfs" or
    "priority". target_step_s: steps with decodes in them take only so much prefill that they last about this long, or
    twice a step of decodes alone if that is longer; learnt from measured steps. 0: only the token budget bounds a
    step. is_encoder: every token sees every other, so a text runs whole in one step and keeps nothing in the KV cache.
    pools_every_token: vectors need all positions computed, so one-pass requests use no cached prefix.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_queued_requests: int
    max_num_queued_tokens: int
    watermark_blocks: int
    max_preemptions: int = 2
    policy: str = "fcfs"
    target_step_s: float = 0.0
    is_encoder: bool = False
    pools_every_token: bool = False


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine needs to start. It travels to the engine process as JSON.

    model_path: a local directory, or a GGUF file. quantization: what linears stored in floats are rounded to while they
    load, or None. activations: "int8": linears of integers round their inputs, too; None: as their format says.
    load_format: "safetensors" or "dummy". dtype: "bfloat16" or "float32".
    max_memory_bytes: what all of the engine's tensors may take; 0: the
    memory plan decides from what is free. num_threads: of the compute pool.
    device: "cpu", "cuda", "rocm", "xpu" or "mps". kernels: "native", "triton" or "reference".
    Of `cache`, num_blocks 0 means: the memory plan decides; the engine replaces it (and the watermark) before
    anything is built. max_model_len_is_auto: the user left it open, so the plan may lower it to what fits.
    step_log: directory to write what each step held and took; "" for none. capture_graphs: on a GPU, steps of shapes
    that recur are captured and replayed. batch_invariant: of the Triton kernels.
    """

    model_path: str
    model: ModelConfig
    load_format: str
    dtype: str
    seed: int
    num_threads: int
    kernels: str
    max_memory_bytes: int
    cache: CacheConfig
    scheduler: SchedulerConfig
    max_model_len_is_auto: bool = False
    device: str = "cpu"
    quantization: str | None = None
    activations: str | None = None
    step_log: str = ""
    capture_graphs: bool = True
    batch_invariant: bool = False
