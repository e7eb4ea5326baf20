"""A device that torch has and this machine lacks, acted out: memory of its own that only its own tensors meet.

Its name is `other`. To compute with a tensor of the host is an error, as it is there; so are float64 and .numpy().
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("other")
DEVICE = torch.device("other", 0)
# These read a tensor of another device, or an index that lies on the host.
_CROSSING = {"aten._to_copy", "aten.copy_"}


class OtherTensor(Tensor):
    """A tensor of the device. held: its values, which only this file touches."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        assert held.dtype is not torch.float64, "the device has no float64"
        found: Self = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        found.held = held
        return found

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor of another device is no numpy array")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes with the held values; the results are the device's where the operands, or the device asked for, are."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    theirs = [each for each in tensors if isinstance(each, OtherTensor)]
    name = str(func.overloadpacket)
    if theirs and name not in _CROSSING:
        hosts = [each for each in tensors if not isinstance(each, OtherTensor) and each.dim() > 0]
        assert not hosts, f"{name}: operands of two devices"
    asked = kwargs.get("device")
    is_theirs = bool(theirs) if asked is None else asked.type == DEVICE.type
    if name == "aten.copy_":
        is_theirs = isinstance(args[0], OtherTensor)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    held_args, held_kwargs = tree_map(lambda each: each.held if isinstance(each, OtherTensor) else each, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    same = {id(each.held): each for each in theirs}

    def wrapped(each: Any) -> Any:
        if not isinstance(each, Tensor) or not is_theirs:
            return each
        return same.get(id(each)) if id(each) in same else OtherTensor(each)

    if not is_theirs and name == "aten._to_copy" and theirs:
        return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, out)
    return tree_map(wrapped, out)


def _made(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What has no tensor of the device among its operands, but is asked for on it."""
    return dispatch(func, args, kwargs)


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_made, "PrivateUse1")
