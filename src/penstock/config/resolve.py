"""From what a user asked for to an EngineConfig in which nothing is left to guess. Pure: facts are passed in."""

from __future__ import annotations

import msgspec

from penstock.base.errors import ConfigError
from penstock.config.engine import CacheConfig, EngineConfig, SchedulerConfig
from penstock.config.model import ModelConfig

BLOCK_SIZE = 16
# Of a step, where nothing was asked for: sequences, tokens. A GPU computes hundreds of rows in the time of one.
CPU_LIMITS = (64, 512)
GPU_LIMITS = (256, 8192)
# Steps that decode take only so much prefill beside it that streams keep about this pace (or half their own speed).
TARGET_STEP_S = 0.25
WATERMARK_FRACTION = 0.01
# Devices that Triton compiles for here; the others run the torch references.
TRITON_DEVICES = ("cuda", "rocm")
# Devices whose memory is not the host's, and that copy by themselves (torch.cuda's streams).
HOST_TIER_DEVICES = ("cuda", "rocm")


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A user's wishes for an engine; 0 and "auto" mean: choose (of host_kv_memory: None). Field names equal the
    settings' names."""

    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str = "none"
    activations: str = "auto"
    seed: int = 0
    num_threads: int = 0
    kernels: str = "auto"
    max_memory: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    max_num_queued_requests: int = 10_000
    max_num_queued_tokens: int = 50_000_000
    scheduling_policy: str = "fcfs"
    kv_cache_dtype: str = "model"
    capture_graphs: bool = True
    enable_prefix_caching: bool = True
    host_kv_memory: int | None = None
    batch_invariant: bool = False


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """num_cores: that this process may use. has_native: the compiled kernels can be imported.

    accelerator: what "auto" takes as the device, "cuda" or "rocm"; empty when there is none.
    """

    num_cores: int
    has_native: bool = True
    accelerator: str = ""


def resolve_engine_config(
    model_path: str,
    model: ModelConfig,
    options: EngineOptions,
    machine: MachineFacts,
    target_step_s: float = TARGET_STEP_S,
) -> EngineConfig:
    """Chooses every value that `options` leaves open. Raises ConfigError when two wishes contradict each other.

    target_step_s: seconds; 0 where nobody watches a stream and the largest steps are the best.
    """
    max_model_len = options.max_model_len or model.max_context_len
    if max_model_len > model.max_context_len:
        raise ConfigError(
            f"max_model_len ({max_model_len}) exceeds what the model was made for ({model.max_context_len}).",
            remedy=f"Use at most {model.max_context_len}.",
            param="max_model_len",
        )
    device = options.device if options.device != "auto" else machine.accelerator or "cpu"
    options = with_limits(options, device)
    # An encoder's texts run whole: a step must hold the longest.
    step_tokens = max(options.max_num_batched_tokens, options.max_num_seqs, max_model_len if model.is_encoder else 0)
    kernels = _resolve_kernels(options.kernels, device, machine)
    if options.batch_invariant and kernels == "reference":
        raise ConfigError(
            "The reference kernels are not batch-invariant: torch's own products depend on the number of rows.",
            remedy="Use the native kernels (a CPU) or the Triton ones (cuda, rocm), or leave --batch-invariant out.",
            param="batch_invariant",
        )
    return EngineConfig(
        model_path=model_path,
        model=model,
        load_format="safetensors" if options.load_format == "auto" else options.load_format,
        dtype=_resolve_dtype(options.dtype, model.dtype),
        quantization=None if options.quantization == "none" else options.quantization,
        activations=_resolve_activations(options.activations),
        seed=options.seed,
        num_threads=options.num_threads or machine.num_cores,
        kernels=kernels,
        max_memory_bytes=options.max_memory,
        cache=CacheConfig(
            block_size=BLOCK_SIZE,
            num_blocks=0,
            enable_prefix_caching=options.enable_prefix_caching,
            dtype=options.kv_cache_dtype,
            host_memory_bytes=_resolve_host_memory(options, model, device),
        ),
        scheduler=scheduler_config(options, max_model_len, step_tokens, target_step_s),
        max_model_len_is_auto=options.max_model_len == 0,
        device=device,
        capture_graphs=options.capture_graphs,
        batch_invariant=options.batch_invariant,
    )


def with_limits(options: EngineOptions, device: str = "cpu") -> EngineOptions:
    """With the most sequences and tokens of a step, where they were left open."""
    num_seqs, num_tokens = GPU_LIMITS if device in TRITON_DEVICES else CPU_LIMITS
    return msgspec.structs.replace(
        options,
        max_num_seqs=options.max_num_seqs or num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens or num_tokens,
    )


def scheduler_config(
    options: EngineOptions, max_model_len: int, max_num_batched_tokens: int, target_step_s: float = TARGET_STEP_S
) -> SchedulerConfig:
    """Of an engine, or of a simulated one; the watermark follows from the number of blocks."""
    return SchedulerConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_num_queued_requests=options.max_num_queued_requests,
        max_num_queued_tokens=options.max_num_queued_tokens,
        watermark_blocks=0,
        policy=options.scheduling_policy,
        target_step_s=target_step_s,
    )


def watermark_blocks(num_blocks: int) -> int:
    """Blocks that admission leaves for running requests to grow into."""
    return max(1, int(num_blocks * WATERMARK_FRACTION))


def _resolve_kernels(wish: str, device: str, machine: MachineFacts) -> str:
    """Raises ConfigError for kernels that the device cannot run."""
    if wish == "native" and device != "cpu":
        raise ConfigError(
            f"The native kernels are the CPU's, and the device is {device}.",
            remedy="Leave --kernels out, or give --device cpu.",
            param="kernels",
        )
    if wish == "native" and not machine.has_native:
        raise ConfigError(
            "The native kernels are not installed.",
            remedy="Install with a C++ compiler present, or use --kernels reference.",
            param="kernels",
        )
    if wish != "auto":
        return wish
    if device == "cpu":
        return "native" if machine.has_native else "reference"
    return "triton" if device in TRITON_DEVICES else "reference"


def _resolve_activations(wish: str) -> str | None:
    if wish not in ("auto", "int8"):
        raise ConfigError(f"activations is {wish[:20]!r}.", remedy="It is 'auto' or 'int8'.", param="activations")
    return None if wish == "auto" else wish


def _resolve_host_memory(options: EngineOptions, model: ModelConfig, device: str) -> int | None:
    """None: the memory plan decides. Raises ConfigError where there is nothing to copy to and fro."""
    if device not in HOST_TIER_DEVICES and options.host_kv_memory:
        raise ConfigError(
            f"--host-kv-memory is for GPUs with a stream beside the steps, and the device is {device}.",
            remedy="Leave it out." if device != "cpu" else "Leave it out; --max-memory bounds the KV cache of a CPU.",
            param="host_kv_memory",
        )
    is_useful = device in HOST_TIER_DEVICES and options.enable_prefix_caching and not model.is_encoder
    return options.host_kv_memory if is_useful else 0


def _resolve_dtype(wish: str, checkpoint_dtype: str) -> str:
    """float16 checkpoints run in bfloat16: the CPU kernels have no float16 arithmetic, and bf16's range is safe."""
    if wish != "auto":
        return wish
    return "float32" if checkpoint_dtype == "float32" else "bfloat16"
