"""What the OpenAPI document allows, and what it does not, sent to a real server by schemathesis for a while: no 5xx.

python tools/fuzz_openapi.py [--seconds 600] [--port 8432]
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

EXAMPLES = 10  # of an operation and mode, in each round


class ServerError(Exception):
    """An answer of 5xx."""


def fuzz(url: str, seconds: float) -> collections.Counter[int]:
    """Rounds over every operation until the time is over; the statuses. Raises ServerError."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses: collections.Counter[int] = collections.Counter()
    end_s = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end_s:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.NEGATIVE and not list(operation.body):
                    continue
                number += 1

                @seed(number)
                @settings(
                    max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )  # fmt: skip
                @given(case=operation.as_strategy(generation_mode=mode))
                def run(case: Any) -> None:
                    answer = case.call(timeout=60)
                    statuses[answer.status_code] += 1
                    if answer.status_code >= 500:
                        raise ServerError(
                            f"{case.method} {case.path} {case.body!r}: {answer.status_code} {answer.text}"
                        )

                run()
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--port", type=int, default=8432)
    arguments = parser.parse_args()
    url = f"http://127.0.0.1:{arguments.port}"
    with tempfile.TemporaryDirectory() as data:
        command = [
            sys.executable, "-m", "penstock.cli.main", "serve", "--port", str(arguments.port), "--num-threads", "1",
            "--max-memory", "1GiB", "--log-level", "error", "--data-directory", data,
        ]  # fmt: skip
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_ready(url, server)
            statuses = fuzz(url, arguments.seconds)
            wait_ready(url, server)
        finally:
            server.terminate()
            server.wait(60)
    print(f"{statuses.total()} requests in {arguments.seconds:.0f} s: {dict(sorted(statuses.items()))}")
    return 0


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health/ready") as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server is not ready")


if __name__ == "__main__":
    sys.exit(main())
