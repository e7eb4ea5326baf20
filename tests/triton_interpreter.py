"""Triton's interpreter (3.6), put right where it is wrong, so that kernels are written for the GPU alone.

It keeps bfloat16 and float8 as the integers of their bits, and then
- multiplies those integers in tl.dot of bfloat16 operands (float8 is widened first, bfloat16 is not);
- truncates float32 to bfloat16, where the GPU rounds to nearest even;
- loses the carry into the exponent when it rounds to float8, and knows neither ties nor saturation;
- cannot take a tensor as the bound of a range: numpy has ceased to convert arrays of one element to int.
- adds and multiplies the bits of bfloat16, and knows no bfloat16 constants (other operations on it stay wrong: widen).
It also patches the language anew for every call of a device function, tl.sum included, which takes most of its time.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def repair() -> None:
    """Corrects the interpreter of this process, once."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    builder.repaired = True
    cast, dot = builder.cast_impl, builder.create_dot
    # The conversions between two types all call self.cast_impl, so they follow.
    builder.cast_impl = lambda self, src, to: _cast(src, to) if _is_kept_as_bits(src, to) else cast(self, src, to)
    builder.create_fp_to_fp = lambda self, src, to, _rounding: self.cast_impl(src, to)
    builder.create_dot = lambda self, a, b, d, *rest: _dot(a, b, d) if _is_float(d) else dot(self, a, b, d, *rest)
    builder.get_bf16 = lambda self, value: _cast(self.get_fp32(value), tl.bfloat16)
    for name in ("create_fadd", "create_fsub", "create_fmul"):
        setattr(builder, name, _in_float32(getattr(builder, name)))
    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_language_once(_function: Any) -> Any:
        if tl.load.__name__ == "<lambda>":
            return interpreter._LangPatchScope()
        return patch_language(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._patch_lang = patch_language_once


def _is_kept_as_bits(src: Any, to: Any) -> bool:
    return src.dtype.scalar in _TORCH or to.scalar in _TORCH


def _cast(src: Any, to: Any) -> Any:
    """src in type `to`, rounded as the GPU does."""
    source, target = src.dtype.scalar, to.scalar
    values = torch.from_numpy(np.ascontiguousarray(src.data))
    values = values.view(_TORCH[source]).float() if source in _TORCH else values.float()
    if target not in _TORCH:
        return interpreter.TensorHandle(values.numpy().astype(interpreter._get_np_dtype(target)), target)
    if target != tl.bfloat16:
        largest = torch.finfo(_TORCH[target]).max
        values = values.clamp(-largest, largest)
    bits = torch.int16 if target == tl.bfloat16 else torch.uint8
    data = values.to(_TORCH[target]).view(bits).numpy().view(interpreter._get_np_dtype(target))
    return interpreter.TensorHandle(data, target)


def _is_float(operand: Any) -> bool:
    return operand.dtype.scalar.is_floating()


def _dot(a: Any, b: Any, d: Any) -> Any:
    """a @ b + d in float64, rounded once: so the order of its sums does not show, whatever the sizes."""
    product = _widened(a).data.astype(np.float64) @ _widened(b).data.astype(np.float64)
    return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _in_float32(operation: Any) -> Any:
    """An operation on two floats that is right for bfloat16: computed in float32 and rounded once, as the GPU's is."""

    def apply(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return operation(self, a, b)
        return _cast(operation(self, _widened(a), _widened(b)), tl.bfloat16)

    return apply


def _widened(operand: Any) -> Any:
    return _cast(operand, tl.float32) if operand.dtype.scalar in _TORCH else operand
