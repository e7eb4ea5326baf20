"""A server to measure: where it is, what it calls its model, and how a request to it is written."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from penstock.base.errors import ConfigError
from penstock.bench.plan import Message, PlannedRequest


class Connector(Protocol):
    """Opens a connection for a protocol; asyncio's own, or a simulated one in tests."""

    async def __call__(self, protocol: Callable[[], asyncio.Protocol]) -> object: ...


@dataclass(frozen=True)
class Target:
    """One server. path: what stands before /v1. parameters: fields that every body gets."""

    url: str
    host: str
    port: int
    path: str
    model: str
    is_tls: bool = False
    api_key: str = ""
    is_stream: bool = True
    parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, model: str, **options: Any) -> Target:
        """Raises ConfigError for what is no http(s) URL."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port, is_url = parts.port, parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            is_url = False
        if not is_url or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of a server.", remedy="Write it like http://127.0.0.1:8000.")
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(url, parts.hostname, port or (443 if is_tls else 80), path, model, is_tls, **options)

    async def connect(self, protocol: Callable[[], asyncio.Protocol]) -> object:
        context = ssl.create_default_context() if self.is_tls else None
        return await asyncio.get_running_loop().create_connection(protocol, self.host, self.port, ssl=context)

    def write(self, request: PlannedRequest, said: list[Message] | None = None) -> bytes:
        """The whole HTTP request. said: the messages before those of the request."""
        is_chat = request.is_chat
        body: dict[str, Any] = {"model": self.model}
        if is_chat:
            body["messages"] = [*(said or ()), *request.prompt]
        else:
            body["prompt"] = request.prompt
        body["max_tokens"] = request.output_tokens
        if request.tenant:
            body["user"] = request.tenant
        if self.is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        payload = msgspec.json.encode(body | self.parameters | request.parameters)
        endpoint = "/v1/chat/completions" if is_chat else "/v1/completions"
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = f"POST {self.path}{endpoint} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{key}"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload
