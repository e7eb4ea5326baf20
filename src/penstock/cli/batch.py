"""`penstock run`: a file of requests in, a file of answers out, each exactly once, resumable.

The output is the state: an id that has a line in it is not asked again. A line is written whole or, after a crash,
cut off and asked again. Errors that may pass (full queue, lost connection) are retried and, if they stay, not written.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from penstock.base.errors import ConfigError
from penstock.cli.api_client import Answer, ApiClient, ApiError
from penstock.cli.chat import open_server
from penstock.cli.progress import ProgressBar
from penstock.config.settings import ResolvedSettings

MAX_CONCURRENCY: Final = 1024
MAX_ATTEMPTS: Final = 6
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
_PASSING_STATUSES: Final = (408, 429, 502, 503, 504)
_ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Task:
    """One request of the input. line: its number, from 1."""

    custom_id: str
    path: str
    body: dict[str, Any]


def run_batch(resolved: ResolvedSettings, options: argparse.Namespace) -> int:
    """The exit status: 0 when every request has its line in the output, else 1."""
    if not 1 <= options.concurrency <= MAX_CONCURRENCY:
        raise ConfigError(f"--concurrency must be 1 to {MAX_CONCURRENCY}.", param="concurrency")
    source, target = Path(options.input), Path(options.output)
    num_tasks = check_input(source)
    done = read_done(target)
    if len(done) >= num_tasks:
        print(f"All {num_tasks} requests are answered in {target} already.", file=sys.stderr)
        return 0
    with open_server(resolved, options.url) as (client, model), _open_output(target) as output:
        runner = _BatchRunner(client, model, output, ProgressBar(num_tasks, len(done)))
        num_missing = runner.run(
            (task for task in read_tasks(source) if task.custom_id not in done), options.concurrency
        )
    if num_missing:
        print(
            f"penstock: error: {num_missing} of {num_tasks} requests stayed unanswered; the last: {runner.last_error}\n"
            "penstock: remedy: Run the same command again: it goes on where this one stopped.",
            file=sys.stderr,
        )
    return 1 if num_missing else 0


def read_tasks(source: Path) -> Iterator[Task]:
    """The requests of a file, line by line. Raises ConfigError naming the line that is none."""
    try:
        with source.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse_task(line, number, source)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}.", remedy="Check the path.") from None


def check_input(source: Path) -> int:
    """How many requests there are. Raises ConfigError for a malformed line or an id that comes twice."""
    seen: set[str] = set()
    for task in read_tasks(source):
        if task.custom_id in seen:
            raise ConfigError(f"{source} has the id {task.custom_id!r} twice.", remedy="Give each request its own.")
        seen.add(task.custom_id)
    return len(seen)


def _parse_task(line: bytes, number: int, source: Path) -> Task:
    """OpenAI's batch line {custom_id, method, url, body}, or a request body, with an `id` or named after its line."""
    try:
        entry = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{source}, line {number}, is not JSON: {error}.", remedy="Write one object a line."
        ) from None
    if not isinstance(entry, dict):
        raise ConfigError(f"{source}, line {number}, is not an object.", remedy="Write one object a line.")
    if isinstance(entry.get("body"), dict):
        body, custom_id, path = entry["body"], entry.get("custom_id"), entry.get("url")
    else:
        body = dict(entry)
        custom_id, path = body.pop("custom_id", None) or body.pop("id", None), None
    if path is None:
        path = _ENDPOINTS[0] if "messages" in body else _ENDPOINTS[1]
    if path not in _ENDPOINTS:
        raise ConfigError(f"{source}, line {number}: {path!r} is not one of {', '.join(_ENDPOINTS)}.")
    if body.get("stream"):
        raise ConfigError(f"{source}, line {number}: a batch request cannot stream.", remedy="Leave `stream` out.")
    if custom_id is not None and not isinstance(custom_id, (str, int)):
        raise ConfigError(f"{source}, line {number}: the id is neither text nor a number.")
    return Task(str(custom_id) if custom_id is not None else f"line-{number}", path, body)


def read_done(target: Path) -> set[str]:
    """The ids that the output answers already. A last line that was not written whole is cut off."""
    if not target.exists():
        return set()
    done: set[str] = set()
    end = 0
    with target.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(str(msgspec.json.decode(line)["custom_id"]))
            except (msgspec.DecodeError, KeyError, TypeError):
                raise ConfigError(
                    f"{target}, line {number}, is no answer of `penstock run`.", remedy="Name another output file."
                ) from None
            end += len(line)
    if end < target.stat().st_size:
        os.truncate(target, end)
    return done


def _open_output(target: Path) -> IO[bytes]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("ab")
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.", remedy="Check the path.") from None


class _BatchRunner:
    """Keeps `concurrency` requests going and writes each answer, from one thread, as it comes."""

    def __init__(self, client: ApiClient, model: str, output: IO[bytes], progress: ProgressBar) -> None:
        self._client = client
        self._model = model
        self._output = output
        self._progress = progress
        self.last_error = ""

    def run(self, tasks: Iterator[Task], concurrency: int) -> int:
        """How many requests stayed without an answer."""
        num_missing = 0
        pool = concurrent.futures.ThreadPoolExecutor(concurrency)
        waiting: set[concurrent.futures.Future[bytes]] = set()
        try:
            for task in tasks:
                waiting.add(pool.submit(self._answer, task))
                if len(waiting) >= 2 * concurrency:  # some ahead, so that no thread waits, but not the whole file
                    num_missing += self._collect(waiting, concurrent.futures.FIRST_COMPLETED)
            while waiting:
                num_missing += self._collect(waiting, concurrent.futures.FIRST_COMPLETED)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._progress.close()
            self._output.flush()
            os.fsync(self._output.fileno())
        return num_missing

    def _collect(self, waiting: set[concurrent.futures.Future[bytes]], when: str) -> int:
        finished, _ = concurrent.futures.wait(waiting, return_when=when)
        waiting -= finished
        num_missing = 0
        for future in finished:
            try:
                self._output.write(future.result())
            except ApiError as error:
                self.last_error = str(error)
                num_missing += 1
            self._progress.advance()
        self._output.flush()
        return num_missing

    def _answer(self, task: Task) -> bytes:
        """The output line of a request. Raises ApiError when what is wrong with it may pass, and has not."""
        body = msgspec.json.encode({"model": self._model, **task.body})
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, MAX_ATTEMPTS + 1):
            problem = "no answer"
            try:
                answer = self._client.request("POST", task.path, body)
            except ApiError as error:
                problem = str(error)
            else:
                if answer.status not in _PASSING_STATUSES:
                    return _output_line(task, answer)
                problem = f"status {answer.status}"
                pause_s = max(pause_s, _retry_after_s(answer))
            if attempt < MAX_ATTEMPTS:
                time.sleep(min(pause_s, LONGEST_PAUSE_S))
                pause_s *= 2
        raise ApiError(f"{task.custom_id}: {problem}")


def _retry_after_s(answer: Answer) -> float:
    text = answer.headers.get("retry-after", "0")
    return float(text) if text.isdigit() else 0.0


def _output_line(task: Task, answer: Answer) -> bytes:
    """OpenAI's batch output line. `error` stays null as with OpenAI: a refused request has its error in the body."""
    response = {
        "status_code": answer.status,
        "request_id": answer.headers.get("x-request-id", ""),
        "body": msgspec.Raw(answer.body) if answer.status == 200 else answer.json(),
    }
    line = {"id": f"batch_{task.custom_id}", "custom_id": task.custom_id, "response": response, "error": None}
    return msgspec.json.encode(line) + b"\n"
