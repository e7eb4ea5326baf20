"""Entry point of the `penstock` command: parses, then loads only what the chosen command needs.

`penstock --help` must stay instant, so nothing heavy is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from penstock import __version__
from penstock.base.errors import PenstockError
from penstock.cli.parser import build_parser

# For errors that come without one, such as those that an engine process reports in one line.
_ANY_REMEDY = "`penstock doctor` checks this machine; --log-level debug shows where it happened."
_REMEDIES = {
    "invalid_checkpoint": "Name a directory with config.json, tokenizer.json and *.safetensors, a GGUF, or a hub id.",
    "insufficient_memory": "Lower --max-model-len or --max-num-seqs, or raise --max-memory.",
    "invalid_configuration": "`penstock config explain` prints every setting with its bounds.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status. Errors are one line of cause and one of remedy."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["--version"], ["-V"]):
        print(f"penstock {__version__}")
        return 0
    parser = build_parser()
    options = parser.parse_args(given)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.run(options))
    except PenstockError as error:
        if _wants_traces(given):
            raise
        print(f"penstock: error: {error.message}", file=sys.stderr)
        print(f"penstock: remedy: {error.remedy or _REMEDIES.get(error.code, _ANY_REMEDY)}", file=sys.stderr)
        return 2 if error.code == "invalid_configuration" else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left: `penstock run ... | head`
        sys.stderr.close()
        return 141


def _wants_traces(given: Sequence[str]) -> bool:
    """Whether --log-level debug was asked for, found without resolving the settings: they may be what is wrong."""
    text = " ".join(given)
    return "--log-level debug" in text or "--log-level=debug" in text


if __name__ == "__main__":
    sys.exit(main())
