"""Tests of kernels keep their tensors on the host. On a card, each launch takes them there and brings them back: so
one test checks a kernel in the interpreter and, where there is one, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from penstock.kernels.triton import configs

Launch = Callable[..., Any]


class Luggage:
    """Copies of the host's memory on a device, for one launch. Arguments that share memory share it there too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by address: the host's bytes, the device's

    def taken(self, value: Any) -> Any:
        """What a kernel is given in place of an argument."""
        if isinstance(value, TensorDescriptor):
            base = self.taken(value.base)
            return TensorDescriptor(base, value.shape, value.strides, value.block_shape, value.padding)
        if not isinstance(value, Tensor) or not value.is_cpu:
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._copies:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._copies[storage.data_ptr()] = host, host.to(self._device, copy=True)
        memory = self._copies[storage.data_ptr()][1].untyped_storage()
        moved = torch.empty(0, dtype=value.dtype, device=self._device)
        return moved.set_(memory, value.storage_offset(), value.size(), value.stride())

    def bring_back(self) -> None:
        for host, there in self._copies.values():
            host.copy_(there)


def on_card(launch: Launch, device: torch.device) -> Launch:
    """`launch` with arguments that lie on the device."""

    def redirected(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        luggage = Luggage(device)
        taken = [luggage.taken(value) for value in args]
        found = launch(kernel, *taken, **{name: luggage.taken(value) for name, value in kwargs.items()})
        luggage.bring_back()
        return found

    return redirected


def redirect_launches() -> None:
    """From here on, kernels of this process run on the GPU, with its tiles, wherever their tensors lie."""
    device = torch.device("cuda", torch.cuda.current_device())
    JITFunction.run = on_card(JITFunction.run, device)
    card = configs.of_device(device)
    configs.of_device = lambda _device: card  # type: ignore[assignment]
