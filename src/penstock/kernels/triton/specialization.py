"""What is compiled ahead of time: a kernel, its arguments' types, and the constants of one representative use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}


class Specialization(NamedTuple):
    """One compilation. signature: each argument's type in order, "constexpr" for those in `constants`.

    aligned: integers that are multiples of 16 (pointers always are). spills_allowed: a spill to local memory would not
    matter. min_capability, max_capability: the oldest and the newest chip that it is made for, as 80 or 90.
    in_test: the test suite compiles it too, not only the report.
    """

    name: str
    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    spills_allowed: bool = False
    min_capability: int = 80
    max_capability: int = 999
    in_test: bool = False


def specialization(
    name: str,
    kernel: JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    launch: tuple[int, int],
    **flags: Any,
) -> Specialization:
    """types: of the arguments that are no constants; the rest must be in `constants`. launch: (warps, stages).

    flags: the fields of `Specialization` from `aligned` on.
    """
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    missing = [a for a, kind in signature.items() if (kind == "constexpr") != (a in constants)]
    assert not missing, (name, missing)
    return Specialization(name, kernel, signature, constants, *launch, **flags)
