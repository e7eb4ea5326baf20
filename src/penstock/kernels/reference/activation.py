"""The activations, in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def silu_and_mul(gate_up_TJ: Tensor) -> Tensor:
    """See Ops.silu_and_mul."""
    gate, up = gate_up_TJ.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gelu(x_TI: Tensor) -> Tensor:
    """See Ops.gelu."""
    return torch.nn.functional.gelu(x_TI.float()).to(x_TI.dtype)
