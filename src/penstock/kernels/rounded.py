"""Activations in 8 bits, as some linears multiply them: made by the op before where an op table can (Ops.rounded)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ActivationForm(NamedTuple):
    """dtype: int8 or float8_e4m3fn. block: inputs of a token that share a scale; 0: all do."""

    dtype: torch.dtype
    block: int


class RoundedActivations(NamedTuple):
    """x ~ codes * scale. codes [T, K padded with zeros as the kernels want it], scales [T, blocks] float32.

    A block's largest magnitude is the largest code; one that is not finite has a NaN for a scale.
    """

    codes: Tensor
    scales: Tensor


Activations = Tensor | RoundedActivations
