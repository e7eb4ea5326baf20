"""`penstock quantize`: a float checkpoint to a GGUF file, or a directory of compressed-tensors, GPTQ or AWQ."""

from __future__ import annotations

import argparse
from pathlib import Path

from penstock.base.errors import ConfigError
from penstock.cli.progress import ShareBar
from penstock.cli.text_input import read_text


def quantize(options: argparse.Namespace) -> int:
    """Converts, with a progress bar; the exit status."""
    from penstock.conversion import TARGETS, Calibration, Recipe, convert
    from penstock.conversion.recipe import MAX_CALIBRATION_TOKENS
    from penstock.loader import resolve

    if options.to not in TARGETS:
        raise ConfigError(f"--to {options.to} is not known.", remedy=f"Choose {', '.join(TARGETS)}.", param="to")
    if not 1 <= options.calibration_tokens <= MAX_CALIBRATION_TOKENS:
        raise ConfigError(f"--calibration-tokens is not between 1 and {MAX_CALIBRATION_TOKENS}.")
    calibration = None
    if options.calibration:
        calibration = Calibration(read_text(Path(options.calibration)), options.calibration_tokens)
    recipe = Recipe(options.bits, options.group_size, options.act_order)
    output = Path(options.output)
    bar = ShareBar("write" if calibration is None else "calibrate and write")
    convert(resolve(options.input, options.revision), output, options.to, bar.show, recipe, calibration)
    bar.close()
    print(f"{output} is written. Serve it with `penstock serve {output}`.")
    return 0
