"""The server's own view during a run: its Prometheus metrics, once a second, under one set of names."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from collections.abc import Callable
from typing import Any, Final

from penstock.base.errors import ConfigError
from penstock.bench.target import Target

PERIOD_S: Final = 1.0
TIMEOUT_S: Final = 5.0
# One name: those that servers use for it (Penstock, vLLM, SGLang, TGI).
NAMES: Final[dict[str, tuple[str, ...]]] = {
    "running": ("penstock_requests_running", "vllm:num_requests_running", "sglang:num_running_reqs",
                "tgi_batch_current_size"),
    "waiting": ("penstock_requests_waiting", "vllm:num_requests_waiting", "sglang:num_queue_reqs", "tgi_queue_size"),
    "kv_usage": ("penstock_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc",
                 "sglang:token_usage"),
}  # fmt: skip
_KNOWN: Final = {theirs: ours for ours, names in NAMES.items() for theirs in names}


def read_samples(text: str) -> dict[str, float]:
    """The known metrics of a Prometheus page, summed over their labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in _KNOWN:
            with contextlib.suppress(ValueError):
                found[_KNOWN[name]] = found.get(_KNOWN[name], 0.0) + float(line.rsplit(None, 1)[-1])
    return found


class MetricsSampler:
    """Asks /metrics once a second, on a thread; a server without it gives no samples."""

    def __init__(self, target: Target, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._target = target
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> list[tuple[float, dict[str, float]]]:
        """(seconds of the clock, values) of each sample."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        return self._samples

    async def _run(self) -> None:
        while True:
            try:
                status, text = await asyncio.to_thread(fetch, self._target, "/metrics")
            except (OSError, http.client.HTTPException):
                status, text = 0, ""
            if status != 200:
                return
            self._samples.append((self._clock(), read_samples(text)))
            await asyncio.sleep(PERIOD_S)


def fetch(target: Target, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """(status, text) of a small request. Raises OSError, HTTPException."""
    kind = http.client.HTTPSConnection if target.is_tls else http.client.HTTPConnection
    connection = kind(target.host, target.port, timeout=TIMEOUT_S if body is None else 120.0)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    try:
        if body is None:
            connection.request("GET", f"{target.path}{path}", headers=headers)
        else:
            content = json.dumps(body)
            headers["Content-Type"] = "application/json"
            connection.request("POST", f"{target.path}{path}", content, headers)
        response = connection.getresponse()
        return response.status, response.read(64 << 20).decode(errors="replace")
    finally:
        connection.close()


def served_model(target: Target) -> str:
    """The first model that a server names. Raises ConfigError when it cannot be asked."""
    try:
        status, text = fetch(target, "/v1/models")
        if status == 200:
            return str(json.loads(text)["data"][0]["id"])
        problem = f"status {status}"
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ConfigError(
        f"{target.url} did not tell its models: {problem[:200]}.", remedy="Is it running? Or give --model."
    )


def tells_token_ids(target: Target) -> bool:
    """Whether the server returns the token ids of an answer when asked to, as vLLM does."""
    body = {"model": target.model, "prompt": [20, 21, 22], "max_tokens": 1, "return_token_ids": True}
    try:
        status, text = fetch(target, "/v1/completions", body)
        return status == 200 and bool(json.loads(text)["choices"][0].get("token_ids"))
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError):
        return False
