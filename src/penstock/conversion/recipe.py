"""What is asked of a conversion beside its target, and how codes are stored for each target that has them.

Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from penstock.base.errors import ConfigError
from penstock.conversion.group_codes import Grid, GroupCodes
from penstock.quantization.integer_codes import pack_words

SAFETENSORS_TARGETS: Final = ("w8a8", "w4a16", "gptq", "awq")
GROUP_SIZES: Final = (32, 64, 128, 256)
BITS: Final = (2, 3, 4, 8)
MAX_CALIBRATION_TOKENS: Final = 1 << 20
_DAMPING: Final = 0.01
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs in the order of a word's nibbles


class Calibration(NamedTuple):
    """Text like what the model will meet, of which the first `max_tokens` tokens are used."""

    text: str
    max_tokens: int = 16384


class Recipe(NamedTuple):
    """bits: of GPTQ's codes. group_size: inputs that share a scale. act_order: GPTQ takes large inputs first."""

    bits: int = 4
    group_size: int = 128
    act_order: bool = False


def check_recipe(target: str, recipe: Recipe, has_calibration: bool) -> None:
    """Raises ConfigError for what does not go together."""
    if recipe.group_size not in GROUP_SIZES:
        raise _wrong("group_size", f"{recipe.group_size} is none of {', '.join(map(str, GROUP_SIZES))}")
    if recipe.bits not in BITS or (recipe.bits != 4 and target != "gptq"):
        raise _wrong("bits", "they are 2, 3, 4 or 8 with --to gptq, and fixed elsewhere")
    if recipe.act_order and (target not in ("gptq", "w4a16") or not has_calibration):
        raise _wrong("act_order", "it is of --to gptq and w4a16 with --calibration")
    if target in ("gptq", "awq") and not has_calibration:
        raise ConfigError(
            f"--to {target} needs text to calibrate on.",
            remedy="Name a text file like what the model will meet: --calibration FILE.",
            param="calibration",
        )
    if target in ("f16", "bf16", "q8_0") and has_calibration:
        raise ConfigError(
            f"--to {target} loses too little for calibration to matter.", remedy="Leave --calibration out."
        )


def grid_of(target: str, recipe: Recipe) -> Grid:
    match target:
        case "w8a8":
            return Grid(8, 0, is_symmetric=True, scale_dtype=torch.float32)
        case "w4a16":
            return Grid(4, recipe.group_size, is_symmetric=True)
        case "awq":
            return Grid(4, recipe.group_size, is_symmetric=False)
    # Two and three bits have too few codes to spare one of them for symmetry.
    return Grid(recipe.bits, recipe.group_size, is_symmetric=recipe.bits >= 4)


def tensors_of(target: str, recipe: Recipe, name: str, found: GroupCodes) -> dict[str, Tensor]:
    """What a checkpoint stores of the linear `name`."""
    bits = grid_of(target, recipe).bits
    match target:
        case "w8a8":
            return {
                f"{name}.weight": (found.codes ^ 128).view(torch.int8),
                f"{name}.weight_scale": found.scales.contiguous(),
            }
        case "w4a16":
            return {
                f"{name}.weight_packed": pack_words(found.codes.T.contiguous(), bits).T.contiguous(),
                f"{name}.weight_scale": found.scales.half(),
                f"{name}.weight_shape": torch.tensor(found.codes.shape),
            }
        case "awq":
            return {
                f"{name}.qweight": _awq_words(found.codes).T.contiguous(),
                f"{name}.qzeros": _awq_words(found.zeros).T.contiguous(),
                f"{name}.scales": found.scales.T.half().contiguous(),
            }
    return {
        f"{name}.qweight": pack_words(found.codes.T.contiguous(), bits),
        f"{name}.qzeros": pack_words(found.zeros - 1, bits).T.contiguous(),
        f"{name}.scales": found.scales.T.half().contiguous(),
        f"{name}.g_idx": found.groups,
    }


def _awq_words(codes_NV: Tensor) -> Tensor:
    """uint8 [N, V] -> int32 [N / 8, V]"""
    ordered = codes_NV.view(-1, 8, codes_NV.shape[1])[:, list(_AWQ_ORDER)].flatten(0, 1)
    return pack_words(ordered, 4)


def quantization_config(target: str, recipe: Recipe) -> dict[str, Any]:
    """What config.json says of the linears."""
    grid = grid_of(target, recipe)
    match target:
        case "gptq":
            return {
                "quant_method": "gptq",
                "bits": grid.bits,
                "group_size": recipe.group_size,
                "desc_act": False,  # groups are of neighbours
                "sym": grid.is_symmetric,
                "damp_percent": _DAMPING,
                "true_sequential": True,
                "lm_head": False,
                "checkpoint_format": "gptq",
            }
        case "awq":
            return {
                "quant_method": "awq", "bits": 4, "group_size": recipe.group_size, "zero_point": True,
                "version": "gemm", "modules_to_not_convert": ["lm_head"],
            }  # fmt: skip
    return _compressed_tensors(target, recipe)


def _compressed_tensors(target: str, recipe: Recipe) -> dict[str, Any]:
    is_w8a8 = target == "w8a8"
    weights = {
        "num_bits": 8 if is_w8a8 else 4, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "channel" if is_w8a8 else "group", "group_size": None if is_w8a8 else recipe.group_size,
        "actorder": "weight" if recipe.act_order else None, "observer": "minmax",
    }  # fmt: skip
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    name = "int-quantized" if is_w8a8 else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if is_w8a8 else None,
        "format": name,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*(mlp|block_sparse_moe)\\.gate$", "re:.*shared_expert_gate$"],
    }


def _wrong(name: str, why: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')} is unusable: {why}.", param=name)
