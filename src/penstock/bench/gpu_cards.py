"""Cards that a simulation can be run for without having one: limits that were measured, and what a step costs besides.

A step takes what its bytes or its multiplications need (HardwareStepTime) and a fixed time for the launches in it.
The limits of the H200 are measured (PyTorch's device-to-device copy and its 8192^3 bf16 product, November 2026); the
efficiency and the time of a launch are what the kernels aim at, not what they were seen to reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from penstock.base.errors import ConfigError
from penstock.bench.step_time import HardwareStepTime, kv_bytes_per_token
from penstock.config.model import ModelConfig

_RESERVED_BYTES: Final = 6e9  # activations, graphs, CUDA itself
_KERNELS_PER_LAYER: Final = 9
_KERNELS_PER_STEP: Final = 12


@dataclass(frozen=True)
class Card:
    """bandwidth: bytes a second. flops: of bf16. memory_bytes: free to a process. launch_s: of a kernel in a graph.

    link: bytes a second from and to the host's pinned memory, one way at a time.
    """

    bandwidth: float
    flops: float
    memory_bytes: float
    launch_s: float = 2e-6
    efficiency: float = 0.85
    link: float = 50e9  # PCIe 5.0 x16, assumed

    def step_time(self, model: ModelConfig, weight_bits: float) -> HardwareStepTime:
        limits = HardwareStepTime.of_model(model, self.bandwidth, self.flops, weight_bits)
        fixed_s = self.launch_s * (_KERNELS_PER_LAYER * model.num_layers + _KERNELS_PER_STEP)
        return replace(limits, efficiency=self.efficiency, fixed_s=fixed_s, host_s=0.0)

    def num_blocks(self, model: ModelConfig, weight_bits: float, block_size: int) -> int:
        """Blocks of KV cache beside the weights. Raises ConfigError when the weights do not fit."""
        weights = self.step_time(model, weight_bits).weight_bytes
        left = self.memory_bytes - _RESERVED_BYTES - weights
        if left <= 0:
            raise ConfigError(
                f"The weights take {weights / 1e9:.0f} GB, the card has {self.memory_bytes / 1e9:.0f}.",
                remedy="Give fewer --weight-bits, or a smaller model.",
            )
        return int(left / (kv_bytes_per_token(model) * block_size))

    def num_host_blocks(self, model: ModelConfig, block_size: int, host_bytes: float) -> int:
        """Blocks that so much of the host's memory keeps."""
        return int(host_bytes / (kv_bytes_per_token(model) * block_size))

    def block_copy_s(self, model: ModelConfig, block_size: int) -> float:
        return kv_bytes_per_token(model) * block_size / self.link


CARDS: Final = {"h200": Card(bandwidth=4.3e12, flops=790e12, memory_bytes=149e9)}
