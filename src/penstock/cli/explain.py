"""`penstock config explain`: every setting with its value, where it comes from, and what it does."""

from __future__ import annotations

import textwrap
from pathlib import Path

from penstock.base.errors import PenstockError
from penstock.cli.checkpoint import engine_config, find_checkpoint
from penstock.config.settings import SPECS, ResolvedSettings


def explain(resolved: ResolvedSettings) -> int:
    became = resolved_autos(resolved)
    group = ""
    for name, spec in SPECS.items():
        if spec.group != group:
            group = spec.group
            print(f"\n{group}")
        value = spec.show(getattr(resolved.values, name))
        if value == "auto" and name in became:
            value = f"auto, here {became[name]}"
        print(f"  {name} = {value}    ({resolved.sources[name]})")
        effect = spec.help + (f" auto: {spec.auto}." if spec.auto else "")
        print(textwrap.indent(textwrap.fill(effect, 100), "      "))
    return 0


def resolved_autos(resolved: ResolvedSettings) -> dict[str, str]:
    """What the auto settings become here. Nothing is downloaded for it: of a model that is not here less is known."""
    settings = resolved.values
    if settings.model and not Path(settings.model).expanduser().exists():
        return {}
    try:
        config = engine_config(settings, find_checkpoint(settings))
    except PenstockError as error:
        return {"dtype": f"unknown: {error.message}"}
    return {
        "dtype": config.dtype,
        "load_format": config.load_format,
        "max_model_len": str(config.scheduler.max_model_len),
        "num_threads": str(config.num_threads),
        "kernels": config.kernels,
    }
