"""One matrix of each expert of a mixture, as kernels take them all at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from penstock.kernels.quantized import QuantizedLinear, WeightLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from penstock.kernels.packed import PackedLinear


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Weights [n, k], each packed by itself, all in one layout (None: floats). addresses: of their data, int64."""

    weights: tuple[PackedLinear | QuantizedLinear, ...]
    addresses: Tensor

    @classmethod
    def of(cls, weights: Sequence[PackedLinear | QuantizedLinear]) -> ExpertStack | None:
        """None: they are not alike."""
        kinds = {(weight.n, weight.k, weight.dtype, layout_of(weight)) for weight in weights}
        if len(kinds) != 1:
            return None
        return cls(tuple(weights), torch.tensor([weight.data.data_ptr() for weight in weights]))

    @property
    def n(self) -> int:
        return self.weights[0].n

    @property
    def k(self) -> int:
        return self.weights[0].k

    @property
    def dtype(self) -> torch.dtype:
        """Of what they are multiplied with."""
        return self.weights[0].dtype

    @property
    def layout(self) -> WeightLayout | None:
        return layout_of(self.weights[0])


def layout_of(weight: PackedLinear | QuantizedLinear) -> WeightLayout | None:
    return weight.layout if isinstance(weight, QuantizedLinear) else None
