"""The memory plan: weights + activations + key/value cache against what is free, before a weight is read.

The cache gets enough for max_num_seqs sequences of max_model_len tokens, but when no limit was set at most half of what
is free beside weights and activations: a default must not take a whole machine. Under a limit (max_memory_bytes) it
may take all that is left, and on a GPU it does: a card's memory is for nobody else. On a CPU its pages become resident
only as they are used. A max_model_len that the user left open is lowered until one sequence of that length fits the
cache's share; one that was asked for is refused instead.

Owns: nothing.
Never: allocates; reads weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import torch

from penstock.base.errors import MemoryPlanError
from penstock.config.defaults import available_memory_bytes
from penstock.config.engine import EngineConfig, SchedulerConfig
from penstock.kernels import ops as op_table
from penstock.kernels.devices import open_device
from penstock.kernels.layouts import Layouts
from penstock.kernels.reference.table import ReferenceOps
from penstock.layers.mlp import MAX_TOKENS_AT_ONCE
from penstock.runner.graph_policy import GRAPH_BYTES
from penstock.runner.host_blocks import staging_nbytes
from penstock.runner.kv_pool import block_nbytes, cache_dtype
from penstock.runner.loading import torch_dtype, weights_nbytes

# Left to the interpreter, torch's libraries, the server process and the system when the limit is what is free.
RESERVED_BYTES: Final = 768 << 20
KV_SHARE_OF_FREE: Final = 0.5
# On a card: captured steps, CUDA and Triton themselves, what the allocator cannot use of its segments. Not measured.
CARD_RESERVED_BYTES: Final = GRAPH_BYTES + (2 << 30)
# On a card, after the largest step was run: kernels that are compiled later, and rounding. Not measured.
LATER_BYTES: Final = 512 << 20
# Pinning takes a while at the start (guessed at some GB/s, not measured), so more is for the user to ask for.
HOST_TIER_BYTES: Final = 16 << 30
# Contexts are lowered to a multiple of this; below it a plan is not worth having.
CONTEXT_STEP: Final = 128


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by purpose. limit_bytes: what they may take together. num_blocks: of the KV pool. num_host_blocks: of its
    host tier, in other memory than the rest. free_bytes: of a card, when this was planned; 0 on a CPU. table: for
    people."""

    limit_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_bytes: int
    num_blocks: int
    num_host_blocks: int
    block_size: int
    max_model_len: int
    table: str
    free_bytes: int = 0


def plan_memory(config: EngineConfig, free_bytes: int | None = None) -> MemoryPlan:
    """Decides the size of the KV pool from shapes alone. Raises MemoryPlanError naming what would fit.

    On a card that is only what decides whether it can be served, and in which context: see plan_profiled.
    config.max_memory_bytes 0: the limit is what is free here (or in this container) now; free_bytes replaces the
    measurement. config.cache.num_blocks above 0 asks for exactly that pool.
    """
    ops = ReferenceOps(1, op_table.layouts(config.kernels))  # sizes are the same wherever the memory is
    device = open_device(config.device)
    needs = _Needs(config, weights_nbytes(config, ops), ops.layouts)
    is_measured = config.max_memory_bytes <= 0
    is_card = device.type == "cuda"
    free = _free_bytes(device) if free_bytes is None else free_bytes
    if is_measured:
        reserved, share = (CARD_RESERVED_BYTES, 1.0) if is_card else (RESERVED_BYTES, KV_SHARE_OF_FREE)
        limit = max(free - reserved, 0)
    else:
        limit, share = config.max_memory_bytes, 1.0
    length = config.scheduler.max_model_len
    if config.max_model_len_is_auto:
        length = needs.longest_context(config, limit, share) or length
        config = _with_limits(config, max_model_len=length)
    left = limit - needs.weights - needs.activations(config)
    asked = 0 if config.model.is_encoder else config.cache.num_blocks
    least = asked or needs.least_blocks(length)
    if left < least * needs.block:
        raise _refusal(config, needs, limit)
    most = config.scheduler.max_num_seqs * needs.least_blocks(length)
    if is_card and not config.model.is_encoder:
        most = max(most, left // needs.block)  # what no request runs in keeps prefixes
    num_blocks = asked or max(least, min(most, int(left * share) // max(needs.block, 1)))
    parts = {
        "limit_bytes": limit,
        "weights_bytes": needs.weights,
        "activation_bytes": needs.activations(config),
        "kv_bytes": num_blocks * needs.block,
    }
    plan = _plan(config, parts, num_blocks, needs.block)
    return msgspec.structs.replace(plan, free_bytes=free if is_card else 0)


def plan_profiled(config: EngineConfig, plan: MemoryPlan, taken_bytes: int) -> MemoryPlan:
    """The plan of a card on which weights were loaded and the largest step was run: the KV cache gets what is left.

    config: as it was asked for. plan: what plan_memory made of it. taken_bytes: of plan.free_bytes, by then. Kept back:
    the captured steps and their logits, the host tier's staging, and LATER_BYTES. Raises MemoryPlanError.
    """
    config = _with_limits(config, max_model_len=plan.max_model_len)
    block = plan.kv_bytes // plan.num_blocks
    limits, later = config.scheduler, LATER_BYTES
    if config.capture_graphs:
        later += GRAPH_BYTES + 4 * limits.max_num_seqs * config.model.vocab_size
    if plan.num_host_blocks:
        later += staging_nbytes(block)
    limit = config.max_memory_bytes if config.max_memory_bytes > 0 else plan.free_bytes
    num_blocks = (limit - taken_bytes - later) // block
    least = -(-plan.max_model_len // config.cache.block_size) + 1
    if num_blocks < least:
        raise MemoryPlanError(
            f"Weights and the largest step took {_gib(taken_bytes)} GiB, {_gib(later)} GiB are kept back, and "
            f"{_gib(least * block)} GiB are needed for one sequence of {plan.max_model_len} tokens; {_gib(limit)} GiB "
            f"may be used.",
            remedy="Give a smaller --max-num-batched-tokens, --max-num-seqs or --max-model-len.",
            param="max_num_batched_tokens",
        )
    parts = {
        "limit_bytes": limit,
        "weights_bytes": plan.weights_bytes,
        "activation_bytes": max(taken_bytes - plan.weights_bytes, 0) + later,
        "kv_bytes": num_blocks * block,
    }
    return msgspec.structs.replace(_plan(config, parts, num_blocks, block), free_bytes=plan.free_bytes)


def _plan(config: EngineConfig, parts: dict[str, int], num_blocks: int, block_bytes: int) -> MemoryPlan:
    num_host_blocks = _host_blocks(config, parts["kv_bytes"], block_bytes)
    tokens = num_blocks * config.cache.block_size
    table = _table(parts, f"{num_blocks} blocks, {tokens} tokens", config.max_memory_bytes <= 0)
    if num_host_blocks:
        tokens = num_host_blocks * config.cache.block_size
        table += f"\nhost tier   {_gib(num_host_blocks * block_bytes):>8} GiB  of the host's memory, {tokens} tokens"
    return MemoryPlan(
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        block_size=config.cache.block_size,
        max_model_len=config.scheduler.max_model_len,
        table=table,
        **parts,
    )


def _host_blocks(config: EngineConfig, kv_bytes: int, block_bytes: int) -> int:
    """Of the host tier. Left open: as large as the pool, within a quarter of the host's free memory and a limit."""
    cache = config.cache
    if cache.num_host_blocks or cache.host_memory_bytes == 0:
        return cache.num_host_blocks
    free = available_memory_bytes()
    if cache.host_memory_bytes is None:
        return min(kv_bytes, free // 4, HOST_TIER_BYTES) // block_bytes
    if cache.host_memory_bytes > free:
        message = f"A host tier of {_gib(cache.host_memory_bytes)} GiB does not fit; {_gib(free)} GiB are free."
        raise MemoryPlanError(message, remedy="Give --host-kv-memory less.", param="host_kv_memory")
    return cache.host_memory_bytes // block_bytes


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.xpu.mem_get_info(device)[0] if device.type == "xpu" else available_memory_bytes()


class _Needs:
    """Sizes in bytes that the plan is made of."""

    def __init__(self, config: EngineConfig, weights: int, layouts: Layouts) -> None:
        self.weights = weights
        self.block = block_nbytes(config.model, config.cache.block_size, cache_dtype(config, layouts), layouts)
        self._block_size = config.cache.block_size
        self._is_encoder = config.model.is_encoder
        self._has_host_tier = config.cache.num_host_blocks > 0 or config.cache.host_memory_bytes != 0

    def least_blocks(self, max_model_len: int) -> int:
        """One sequence of full length must be able to run, with a block to copy a partial prefix hit into."""
        if self._is_encoder:
            return 0
        return -(-max_model_len // self._block_size) + 1

    def activations(self, config: EngineConfig) -> int:
        """The widest moment of a step, its logits, and the tables that live as long as the engine."""
        model, limits = config.model, config.scheduler
        item = torch_dtype(config.dtype).itemsize
        queries = model.num_heads * model.head_dim
        keys = model.num_kv_heads * model.head_dim
        tokens = limits.max_num_batched_tokens
        attention = tokens * (2 * queries + 2 * keys)
        mlp = (min(tokens, MAX_TOKENS_AT_ONCE) if config.device == "cpu" else tokens) * _mlp_width(config)
        step = (max(attention, mlp) + tokens * 4 * model.hidden_size) * item + tokens * model.head_dim * 4
        logits = 2 * min(limits.max_num_seqs, limits.max_num_batched_tokens) * model.vocab_size * 4
        rotary = limits.max_model_len * model.head_dim * 4
        return step + logits + rotary + (staging_nbytes(self.block) if self._has_host_tier else 0)

    def longest_context(self, config: EngineConfig, limit: int, share: float) -> int:
        """The longest max_model_len, at most the configured one, of which one sequence fits the cache's share.

        Rounded down to CONTEXT_STEP; 0 if none is worth having.
        """

        def fits(length: int) -> bool:
            left = limit - self.weights - self.activations(_with_limits(config, max_model_len=length))
            blocks = config.cache.num_blocks or int(max(left, 0) * share) // max(self.block, 1)
            return blocks * self.block <= left and self.least_blocks(length) <= blocks

        low, high = 0, config.scheduler.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low if low == config.scheduler.max_model_len else low // CONTEXT_STEP * CONTEXT_STEP


def _mlp_width(config: EngineConfig) -> int:
    """Elements that a feed-forward block holds for a token at its widest."""
    model, experts = config.model, config.model.experts
    width = 3 * model.intermediate_size
    if experts is None:
        return width
    # Of all pairs of a token and one of its experts, what is between inputs and outputs, and these; a CPU at worst has
    # inputs and outputs in two orders, or inputs and their codes.
    inner = 3 * experts.intermediate_size
    pairs = experts.per_token * model.hidden_size
    mixture = (3 if config.device == "cpu" else 1) * pairs + experts.per_token * inner
    return max(width, 3 * experts.shared_intermediate_size, mixture + 2 * model.hidden_size)  # the sum, in float32


def _refusal(config: EngineConfig, needs: _Needs, limit: int) -> MemoryPlanError:
    """The error, with the configuration nearest to the one asked for that would fit, if there is one."""
    length, blocks = config.scheduler.max_model_len, config.cache.num_blocks
    purpose = f"{blocks} blocks" if blocks else f"one sequence of {length} tokens"
    cache = (blocks or needs.least_blocks(length)) * needs.block
    activations = needs.activations(config)
    message = (
        f"{_gib(needs.weights + activations + cache)} GiB are needed ({_gib(needs.weights)} weights, "
        f"{_gib(activations)} activations, {_gib(cache)} cache for {purpose}); {_gib(limit)} GiB may be used."
    )
    return MemoryPlanError(message, remedy=_remedy(config, needs, limit), param="max_model_len")


def _remedy(config: EngineConfig, needs: _Needs, limit: int) -> str:
    limits = config.scheduler
    config = msgspec.structs.replace(config, cache=msgspec.structs.replace(config.cache, num_blocks=0))
    for num_tokens in (limits.max_num_batched_tokens, 512, 128):
        for num_seqs in (limits.max_num_seqs, 8, 1):
            if num_tokens > limits.max_num_batched_tokens or num_seqs > limits.max_num_seqs:
                continue
            smaller = _with_limits(config, max_num_batched_tokens=num_tokens, max_num_seqs=num_seqs)
            length = needs.longest_context(smaller, limit, 1.0)
            if length:
                return f"This would fit: {_flags(limits, _with_limits(smaller, max_model_len=length).scheduler)}."
    if config.dtype == "float32":
        return "The weights take half in --dtype bfloat16."
    return f"The weights alone take {_gib(needs.weights)} GiB: use a smaller model or a machine with more memory."


def _flags(before: SchedulerConfig, after: SchedulerConfig) -> str:
    """The settings that differ, as they are given on the command line."""
    names = ("max_model_len", "max_num_batched_tokens", "max_num_seqs")
    changed = [name for name in names if getattr(before, name) != getattr(after, name)]
    return " ".join(f"--{name.replace('_', '-')} {getattr(after, name)}" for name in changed)


def _with_limits(config: EngineConfig, **limits: int) -> EngineConfig:
    return msgspec.structs.replace(config, scheduler=msgspec.structs.replace(config.scheduler, **limits))


def _table(parts: dict[str, int], cache: str, is_measured: bool) -> str:
    used = parts["weights_bytes"] + parts["activation_bytes"] + parts["kv_bytes"]
    rows = [
        ("weights", parts["weights_bytes"], ""),
        ("activations", parts["activation_bytes"], "largest step"),
        ("KV cache", parts["kv_bytes"], cache),
        ("together", used, ""),
        ("limit", parts["limit_bytes"], "free now, less a reserve" if is_measured else "--max-memory"),
    ]
    return "\n".join(f"{name:<12}{_gib(size):>8} GiB  {note}".rstrip() for name, size, note in rows)


def weights_table(held: Mapping[str, int]) -> str:
    """held: bytes by how they are held, the largest first."""
    largest_first = sorted(held.items(), key=lambda item: -item[1])
    return "\n".join(f"{_gib(size):>8} GiB  {name}" for name, size in largest_first)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f}"
