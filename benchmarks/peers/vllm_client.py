#!/usr/bin/env python3
"""vLLM's bench client, to be run in vLLM's environment: its arguments are those of `vllm bench serve`.

    ENVS/vllm/bin/python benchmarks/peers/vllm_client.py --base-url http://127.0.0.1:8000 --model M --tokenizer DIR ...

The CPU build's own command line stops at its look-up of the version of a distribution named vllm, which it is not.
"""

from __future__ import annotations

import sys


def main() -> None:
    from vllm.benchmarks.serve import add_cli_args  # type: ignore[import-not-found]
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    bench_serve(parser.parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
