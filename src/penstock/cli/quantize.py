"""`penstock quantize`: a float checkpoint to a GGUF file or a compressed-tensors directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from penstock.base.errors import ConfigError
from penstock.cli.progress import ShareBar


def quantize(options: argparse.Namespace) -> int:
    """Converts, with a progress bar; the exit status."""
    from penstock.conversion import TARGETS, convert
    from penstock.loader import resolve

    if options.to not in TARGETS:
        raise ConfigError(f"--to {options.to} is not known.", remedy=f"Choose {', '.join(TARGETS)}.", param="to")
    output = Path(options.output)
    bar = ShareBar("write")
    convert(resolve(options.input, options.revision), output, options.to, bar.show)
    bar.close()
    print(f"{output} is written. Serve it with `penstock serve {output}`.")
    return 0
