"""What a config.json says about how its weights are quantised (`quantization_config`), checked and bounded.

Which linears are quantised is not read here but seen by their tensors: lists of exceptions in these files are patterns
of many dialects, and the tensors cannot lie about it.

Never: trusts a number of a downloaded file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from penstock.base.errors import CheckpointError

METHODS: Final = ("gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors", "bitsandbytes")
_MAX_GROUP: Final = 1 << 20


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How quantised linears are stored.

    method: of METHODS. bits: of a code. group_size: inputs that share a scale; 0: all of a row (or FP8's blocks say).
    block: (outputs, inputs) that share an FP8 scale; (0, 0) without. has_int8_activations: W8A8 with a scale a token.
    stored_zero_offset: what is to be added to a stored zero point (GPTQ's first format stores one less).
    """

    method: str
    bits: int = 8
    group_size: int = 0
    block: tuple[int, int] = (0, 0)
    has_int8_activations: bool = False
    stored_zero_offset: int = 0


def quantization_of(config: Mapping[str, Any]) -> QuantizationConfig | None:
    """Reads a config.json. None for a model of floats. Raises CheckpointError naming what is not supported."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise _wrong("quantization_config", "it is not a JSON object")
    method = settings.get("quant_method")
    match method:
        case "gptq":
            return _gptq(settings)
        case "awq":
            return _awq(settings)
        case "fp8" | "fbgemm_fp8":
            return QuantizationConfig(method="fp8", block=_block(settings.get("weight_block_size")))
        case "compressed-tensors":
            return _compressed_tensors(settings)
        case "bitsandbytes":
            bits = 4 if settings.get("load_in_4bit") or settings.get("_load_in_4bit") else 8
            return QuantizationConfig(method="bitsandbytes", bits=bits)
    raise CheckpointError(
        f"config.json has a quantization_config of the method {str(method)[:60]!r}, which Penstock cannot read.",
        remedy=f"Readable are {', '.join(METHODS)}, GGUF files, and the unquantized checkpoint of this model.",
    )


def _gptq(settings: Mapping[str, Any]) -> QuantizationConfig:
    bits = _choice(settings, "bits", (2, 3, 4, 8))
    if settings.get("dynamic"):
        raise _wrong("dynamic", "bits that differ by layer are not supported")
    first_format = settings.get("checkpoint_format", "gptq") == "gptq"
    return QuantizationConfig(
        method="gptq", bits=bits, group_size=_group_size(settings), stored_zero_offset=1 if first_format else 0
    )


def _awq(settings: Mapping[str, Any]) -> QuantizationConfig:
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise _wrong("version", f"AWQ's {version[:20]!r} order of weights is not supported, only 'gemm'")
    key = "bits" if "bits" in settings else "w_bit"
    group = settings if "group_size" in settings else {"group_size": settings.get("q_group_size")}
    return QuantizationConfig(method="awq", bits=_choice(settings, key, (4,)), group_size=_group_size(group))


def _compressed_tensors(settings: Mapping[str, Any]) -> QuantizationConfig:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise _wrong("config_groups", "exactly one group of linears is supported")
    [group] = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise _wrong("config_groups", "it says nothing about weights")
    kind, bits = weights.get("type", "int"), _choice(weights, "num_bits", (4, 8))
    if kind not in ("int", "float"):
        raise _wrong("type", f"{str(kind)[:20]!r} is neither 'int' nor 'float'")
    activations = group.get("input_activations")
    return QuantizationConfig(
        method="compressed-tensors",
        bits=bits,
        group_size=_group_size(weights) if weights.get("strategy") in ("group", "tensor_group") else 0,
        block=_block(weights.get("block_structure")) if weights.get("strategy") == "block" else (0, 0),
        has_int8_activations=kind == "int" and bits == 8 and activations is not None,
    )


def _choice(settings: Mapping[str, Any], name: str, allowed: tuple[int, ...]) -> int:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise _wrong(name, f"{str(value)[:20]!r} is none of {', '.join(map(str, allowed))}")
    return value


def _group_size(settings: Mapping[str, Any]) -> int:
    value = settings.get("group_size")
    if value in (None, -1):
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 16 <= value <= _MAX_GROUP or value % 16:
        raise _wrong("group_size", f"{str(value)[:20]!r} is not a multiple of 16, nor -1")
    return value


def _block(value: object) -> tuple[int, int]:
    if value is None:
        return (0, 0)
    if not isinstance(value, list) or len(value) != 2 or not all(_is_size(side) for side in value):
        raise _wrong("weight_block_size", f"{str(value)[:40]!r} is not two sizes, the second a multiple of 16")
    if value[1] % 16:
        raise _wrong("weight_block_size", f"{value[1]} is not a multiple of 16")
    return (value[0], value[1])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_GROUP


def _wrong(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config's {name} is unusable: {why}.")
