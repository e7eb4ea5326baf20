"""The memory plan: weights + activations + key/value cache against what is free, before a weight is read.

The cache gets enough for max_num_seqs sequences of max_model_len tokens, but when no limit was set at most half of what
is free beside weights and activations: a default must not take a whole machine. Under a limit (max_memory_bytes) it
may take all that is left. Its pages become resident only as they are used.

Owns: nothing.
Never: allocates; reads weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import psutil

from penstock.base.errors import MemoryPlanError
from penstock.config.engine import EngineConfig
from penstock.kernels import ops as op_table
from penstock.runner.kv_pool import block_nbytes
from penstock.runner.loading import torch_dtype, weights_nbytes

# Left to the interpreter, torch's libraries, the server process and the system when the limit is what is free.
RESERVED_BYTES: Final = 768 << 20
KV_SHARE_OF_FREE: Final = 0.5
_CGROUP: Final = Path("/sys/fs/cgroup")
_SMALLEST_CONTEXT: Final = 128


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by purpose. limit_bytes: what they may take together. num_blocks: of the KV pool. table: for people.

    max_model_len: the configured one, or what fits when the user left it open.
    """

    max_model_len: int
    limit_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_bytes: int
    num_blocks: int
    block_size: int
    table: str

    @property
    def num_slots(self) -> int:
        """Tokens the cache holds."""
        return self.num_blocks * self.block_size


def plan_memory(config: EngineConfig) -> MemoryPlan:
    """Decides the size of the KV pool from shapes alone.

    config.max_memory_bytes 0: the limit is what is free on this machine (or in this container) now.
    config.cache.num_blocks above 0 asks for exactly that pool. Raises MemoryPlanError naming what would fit.
    """
    needs = _Needs(config, weights_nbytes(config, op_table.load("reference", 1)))
    automatic = config.max_memory_bytes <= 0
    limit = max(free_memory_bytes() - RESERVED_BYTES, 0) if automatic else config.max_memory_bytes
    config = _with_fitting_context(config, needs, limit)
    left = limit - needs.weights - needs.activations(config)
    asked = config.cache.num_blocks
    least = asked or needs.least_blocks(config.scheduler.max_model_len)
    if left < least * needs.block:
        raise _refusal(config, needs, limit)
    most = config.scheduler.max_num_seqs * needs.sequence_blocks(config.scheduler.max_model_len) + 1
    share = KV_SHARE_OF_FREE if automatic else 1.0
    num_blocks = asked or max(least, min(most, int(left * share) // needs.block))
    parts = {
        "limit_bytes": limit,
        "weights_bytes": needs.weights,
        "activation_bytes": needs.activations(config),
        "kv_bytes": num_blocks * needs.block,
    }
    table = _table(parts, f"{num_blocks} blocks, {num_blocks * config.cache.block_size} tokens", automatic)
    return MemoryPlan(
        max_model_len=config.scheduler.max_model_len,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        table=table,
        **parts,
    )


def free_memory_bytes() -> int:
    """What this process may still take: the machine's available memory, or less under a container's limit."""
    available = int(psutil.virtual_memory().available)
    limit = _read_number(_CGROUP / "memory.max") or _read_number(_CGROUP / "memory" / "memory.limit_in_bytes")
    if limit is None or limit >= psutil.virtual_memory().total:
        return available
    used = _read_number(_CGROUP / "memory.current") or _read_number(_CGROUP / "memory" / "memory.usage_in_bytes") or 0
    # The page cache counts as used by the container, but gives way.
    return min(available, max(limit - used + _reclaimable_bytes(), 0))


def _reclaimable_bytes() -> int:
    for path in (_CGROUP / "memory.stat", _CGROUP / "memory" / "memory.stat"):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    return 0


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


class _Needs:
    """Sizes in bytes that the plan is made of."""

    def __init__(self, config: EngineConfig, weights: int) -> None:
        self.weights = weights
        self.block = block_nbytes(config.model, config.cache.block_size, torch_dtype(config.dtype))
        self._block_size = config.cache.block_size
        self._watermark = config.scheduler.watermark_blocks

    def sequence_blocks(self, max_model_len: int) -> int:
        return -(-max_model_len // self._block_size)

    def least_blocks(self, max_model_len: int) -> int:
        """One sequence of full length must be able to run, above the watermark, with a block to copy into."""
        return self.sequence_blocks(max_model_len) + 1 + self._watermark

    def activations(self, config: EngineConfig, max_model_len: int | None = None) -> int:
        """The widest moment of a step, its logits, and the tables that live as long as the engine."""
        model, limits = config.model, config.scheduler
        item = torch_dtype(config.dtype).itemsize
        queries = model.num_heads * model.head_dim
        keys = model.num_kv_heads * model.head_dim
        widest = max(2 * queries + 2 * keys, 3 * model.intermediate_size) + 3 * model.hidden_size
        step = limits.max_num_batched_tokens * (widest * item + model.head_dim * 4)
        logits = 2 * min(limits.max_num_seqs, limits.max_num_batched_tokens) * model.vocab_size * 4
        rotary = (limits.max_model_len if max_model_len is None else max_model_len) * model.head_dim * 4
        return step + logits + rotary


def _refusal(config: EngineConfig, needs: _Needs, limit: int) -> MemoryPlanError:
    """The error with the configuration nearest to the one asked for that would fit, if there is one."""
    asked = config.scheduler.max_model_len
    blocks = config.cache.num_blocks or needs.least_blocks(asked)
    total = needs.weights + needs.activations(config) + blocks * needs.block
    message = (
        f"{_gib(total)} GiB are needed ({_gib(needs.weights)} weights, {_gib(needs.activations(config))} activations, "
        f"{_gib(blocks * needs.block)} cache for one sequence of {asked} tokens), {_gib(limit)} GiB may be used."
    )
    return MemoryPlanError(message, remedy=_remedy(config, needs, limit), param="max_model_len")


def _remedy(config: EngineConfig, needs: _Needs, limit: int) -> str:
    for tokens in (config.scheduler.max_num_batched_tokens, 512, 128):
        for num_seqs in (config.scheduler.max_num_seqs, 8, 1):
            smaller = _with_limits(config, tokens, num_seqs)
            fitting = _fitting_context(smaller, needs, limit)
            if fitting:
                names = {"max-num-batched-tokens": tokens, "max-num-seqs": smaller.scheduler.max_num_seqs}
                before = {
                    "max-num-batched-tokens": config.scheduler.max_num_batched_tokens,
                    "max-num-seqs": config.scheduler.max_num_seqs,
                }
                changed = [f"--{name} {value}" for name, value in names.items() if value < before[name]]
                return f"This would fit: {' '.join([f'--max-model-len {fitting}', *changed])}."
    if config.dtype == "float32":
        return "Weights alone do not fit in float32: try --dtype bfloat16, which takes half."
    return f"The weights need {_gib(needs.weights)} GiB: use a smaller model or a machine with more memory."


def _with_fitting_context(config: EngineConfig, needs: _Needs, limit: int) -> EngineConfig:
    """A context that the user left open is lowered to what fits, if anything worth having does."""
    fitting = _fitting_context(config, needs, limit) if config.max_model_len_is_auto else 0
    if not 0 < fitting < config.scheduler.max_model_len:
        return config
    return msgspec.structs.replace(config, scheduler=msgspec.structs.replace(config.scheduler, max_model_len=fitting))


def _with_limits(config: EngineConfig, tokens: int, num_seqs: int) -> EngineConfig:
    limits = config.scheduler
    smaller = msgspec.structs.replace(
        limits,
        max_num_batched_tokens=min(tokens, limits.max_num_batched_tokens),
        max_num_seqs=min(num_seqs, limits.max_num_seqs),
    )
    return msgspec.structs.replace(config, scheduler=smaller)


def _fitting_context(config: EngineConfig, needs: _Needs, limit: int) -> int:
    """The longest max_model_len that fits, rounded down to a round number; 0 if none is worth having."""

    def fits(length: int) -> bool:
        total = needs.weights + needs.activations(config, length) + needs.least_blocks(length) * needs.block
        return total <= limit

    low, high = 0, config.scheduler.max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low < min(_SMALLEST_CONTEXT, config.scheduler.max_model_len):
        return 0
    return low if low == config.scheduler.max_model_len else max(low // _SMALLEST_CONTEXT * _SMALLEST_CONTEXT, 1)


def _table(parts: dict[str, int], cache: str, automatic: bool) -> str:
    used = parts["weights_bytes"] + parts["activation_bytes"] + parts["kv_bytes"]
    rows = [
        ("weights", parts["weights_bytes"], ""),
        ("activations", parts["activation_bytes"], "largest step"),
        ("KV cache", parts["kv_bytes"], cache),
        ("together", used, ""),
        ("limit", parts["limit_bytes"], "free now, less a reserve" if automatic else "--max-memory"),
    ]
    return "\n".join(f"{name:<12}{_gib(size):>8} GiB  {note}".rstrip() for name, size, note in rows)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f}"
