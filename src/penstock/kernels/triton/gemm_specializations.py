"""The matrix kernels as they are launched for the layouts and cards that matter: what is compiled ahead of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from penstock.kernels.quantized import GGUF_LAYOUTS, INT8_CHANNEL, NF4, W8A8, W8A16, WeightLayout, fp8, w4a16
from penstock.kernels.triton import configs
from penstock.kernels.triton.gemm_codes import gemm_codes_kernel, group_sums_kernel, rows_kernel
from penstock.kernels.triton.gemm_dense import gemm_dense_kernel
from penstock.kernels.triton.linear import FLOAT32_TILE, code_constants, family_of
from penstock.kernels.triton.specialization import TYPE_NAMES, Specialization, specialization
from penstock.kernels.triton.tiles import add_splits_kernel
from penstock.kernels.triton.weights import DENSE_STEP, empty_quantized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton.runtime.jit import JITFunction

_CODES: Final = {
    "w4 g128": w4a16(128),
    "w4 g128 point": w4a16(128, "f16", "point"),
    "w4 g32": w4a16(32),
    "w8 g128": W8A16,
    "nf4": NF4,
    "mxfp4": GGUF_LAYOUTS[39],
    "q4_0": GGUF_LAYOUTS[2],
    "q4_k": GGUF_LAYOUTS[12],
    "q5_k": GGUF_LAYOUTS[13],
    "q6_k": GGUF_LAYOUTS[14],
    "q8_0": GGUF_LAYOUTS[8],
    "q2_k": GGUF_LAYOUTS[10],
    "e4m3 as bf16": fp8(),
}
_DENSE: Final = {"fp8 blocks": fp8("e4m3", 128), "fp8 rows": fp8(), "w8a8": W8A8, "int8": INT8_CHANNEL, "bf16": None}
_FLOAT32: Final = {"KIND": "f32", "GROUP": 0, "X_BLOCK": 0, "STEP": 32, "TOP_K": 0, "IS_EVEN": True, "HAS_BIAS": False}
# Whose tiles, from which chip to which.
_CARDS: Final = (("NVIDIA_H100.json", 90, 99), ("NVIDIA_B200.json", 100, 999), ("NVIDIA_A100.json", 80, 89))
_COMMON: Final = {
    "out_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "tile_experts_ptr": "*i32",
    "pairs_ptr": "*i32",
}
_NUMBERS: Final = (
    "num_rows",
    "num_tokens",
    "n_rows",
    "n_total",
    "k",
    "num_steps",
    "steps_a_split",
    "num_supers",
    "x_blocks",
)
_ALIGNED: Final = ("n_rows", "n_total", "k")
_MIN_TENSOR_CAPABILITY: Final = 90
_IN_TEST: Final = ("w4 g128", "q4_k", "fp8 blocks")


def specializations() -> Iterator[Specialization]:
    """Decode (the smallest tile, K in ranges) and prefill (the largest), and routed for a mixture of experts."""
    for file, oldest, newest in _CARDS:
        card = configs.read(file)
        for name, layout in (_CODES | _DENSE).items():
            yield from _matrix(name, layout, card, oldest, newest)
    yield from _others()


def _matrix(
    name: str, layout: WeightLayout | None, card: configs.Card, oldest: int, newest: int
) -> Iterator[Specialization]:
    is_codes = name in _CODES
    oldest = max(oldest, 89) if name.startswith("fp8") else oldest
    if oldest > newest or (name == "e4m3 as bf16" and oldest >= 90):
        return
    family, types, constants = _of_codes(layout) if is_codes and layout else _of_dense(layout)
    kernel = gemm_codes_kernel if is_codes else gemm_dense_kernel
    tiles = card.tiles[family]
    uses = [
        ("decode", tiles[0], {"TOP_K": 0, "NUM_SPLITS": 4, "IS_SPLIT": True, "HAS_BIAS": False}),
        ("prefill", tiles[-1], {"TOP_K": 0, "NUM_SPLITS": 1, "IS_SPLIT": False, "HAS_BIAS": True}),
        (
            "prefill of 4 ranges",
            card.walked_tile(family, 1 << 20),
            {"TOP_K": 0, "NUM_SPLITS": 4, "IS_SPLIT": False, "HAS_BIAS": False},
        ),
        ("experts", tiles[-1], {"TOP_K": 8, "NUM_SPLITS": 1, "IS_SPLIT": False, "HAS_BIAS": False}),
    ]
    if not is_codes:
        uses = [(use, tile, flags | {"BY_TENSOR": False}) for use, tile, flags in uses]
        if oldest >= _MIN_TENSOR_CAPABILITY:
            uses.append(("prefill by tensor", tiles[-1], uses[1][2] | {"BY_TENSOR": True}))
    for use, tile, flags in uses:
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "IS_EVEN": True}
        own = _own(types, kernel)
        if flags.get("BY_TENSOR"):
            for operand, rows in (("x_ptr", tile.block_m), ("codes_ptr", tile.block_n)):
                own[operand] = f"tensordesc<{own[operand].removeprefix('*')}[{rows}, {constants['STEP']}]>"
        yield specialization(
            f"{'codes' if is_codes else 'dense'} {name} {use} {tile.block_n}x{tile.block_m} {card.card}",
            kernel,
            own,
            constants | flags | blocks,
            (tile.num_warps, tile.num_stages),
            aligned=_ALIGNED,
            min_capability=oldest,
            max_capability=newest,
            in_test=name in _IN_TEST and use == "decode",
        )


def _of_codes(layout: WeightLayout) -> tuple[str, dict[str, str], dict[str, object]]:
    """Family, types of the arguments, constants."""
    weight = empty_quantized(16, 256, layout, torch.bfloat16, "cpu", 80)
    parts = {"high": weight.high, "minimums": weight.minimums, "supers": weight.supers}
    types = _COMMON | dict.fromkeys(_NUMBERS, "i32")
    types |= {"x_ptr": "*bf16", "sums_ptr": "*fp32", "codes_ptr": "*i32", "table_ptr": "*bf16"}
    types["scales_ptr"] = f"*{TYPE_NAMES[weight.scales.dtype]}"
    types |= {
        f"{part}_ptr": "*i32" if tensor is None else f"*{TYPE_NAMES[tensor.dtype]}" for part, tensor in parts.items()
    }
    return family_of(weight), types, code_constants(layout)


def _of_dense(layout: WeightLayout | None) -> tuple[str, dict[str, str], dict[str, object]]:
    kind = "bf16" if layout is None else "int8" if layout.group_size == 0 else "fp8"
    operand = {"bf16": "*bf16", "int8": "*i8", "fp8": "*fp8e4nv"}[kind]
    types = _COMMON | dict.fromkeys(_NUMBERS, "i32")
    types |= {"x_ptr": operand, "codes_ptr": operand, "x_scales_ptr": "*fp32", "scales_ptr": "*fp32"}
    x_block = 0 if layout is None else DENSE_STEP if kind == "fp8" else layout.x_block
    group = 0 if layout is None else layout.group_size
    constants = {"KIND": kind, "GROUP": group, "X_BLOCK": x_block, "STEP": 64 if kind == "bf16" else DENSE_STEP}
    return kind, types, constants


def _own(types: dict[str, str], kernel: JITFunction) -> dict[str, str]:
    """Of the arguments that a kernel has."""
    return {argument: kind for argument, kind in types.items() if argument in kernel.arg_names}


def _others() -> Iterator[Specialization]:
    types = _COMMON | dict.fromkeys(_NUMBERS, "i32")
    types |= dict.fromkeys(("x_ptr", "codes_ptr", "x_scales_ptr", "scales_ptr", "out_ptr", "bias_ptr"), "*fp32")
    tile = FLOAT32_TILE
    flags = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BY_TENSOR": False, "NUM_SPLITS": 1, "IS_SPLIT": False}
    yield specialization(
        "dense f32", gemm_dense_kernel, _own(types, gemm_dense_kernel), _FLOAT32 | flags,
        (tile.num_warps, tile.num_stages), aligned=_ALIGNED, in_test=True,
    )  # fmt: skip
    for name, layout in _CODES.items():
        _, types, constants = _of_codes(layout)
        types |= {"ids_ptr": "*i64"}
        yield specialization(
            f"rows {name}", rows_kernel, _own(types, rows_kernel), constants, (1, 1), aligned=("n_total", "k"),
        )  # fmt: skip
    numbers = {"num_tokens": "i32", "k": "i32", "num_groups": "i32"}
    for group in (16, 32, 128):
        yield specialization(
            f"group sums of {group}", group_sums_kernel, {"x_ptr": "*bf16", "sums_ptr": "*fp32"} | numbers,
            {"GROUP": group, "BLOCK_M": 16, "GROUPS": 256 // group}, (4, 1), aligned=("k",),
        )  # fmt: skip
    yield specialization(
        "add splits", add_splits_kernel,
        {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "size": "i32", "n_rows": "i32"},
        {"NUM_SPLITS": 4, "HAS_BIAS": True, "BLOCK": 1024}, (4, 1), aligned=("size", "n_rows"),
    )  # fmt: skip
