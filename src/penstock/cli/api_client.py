"""A small blocking client of an OpenAI-shaped server, on the standard library: what `chat` and `run` speak through.

One instance may be used by several threads; each gets its own connection.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from penstock.base.errors import ConfigError, PenstockError

CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 3600.0


class ApiError(PenstockError):
    """The server answered with an error, or could not be reached."""

    code = "request_failed"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            return {"error": {"message": self.body[:500].decode("utf-8", "replace"), "code": "not_json"}}


class ApiClient:
    """Asks one server. Raises ApiError when there is no answer at all; statuses are for the caller to judge."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the address of a server.", remedy="Such as http://127.0.0.1:8000.")
        self._is_tls = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port
        # http://host:8000 and http://host:8000/v1 mean the same server.
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._local = threading.local()

    def first_model(self) -> str:
        """The name of the model that the server serves first."""
        answer = self.request("GET", "/v1/models")
        if answer.status != 200:
            raise ApiError(f"The server answered {answer.status}: {message_of(answer.json())}")
        return str(answer.json()["data"][0]["id"])

    def request(self, method: str, path: str, body: bytes | None = None) -> Answer:
        response = self._send(method, path, body)
        try:
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise ApiError(f"The connection broke: {error}.") from None
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, content)

    def stream(self, path: str, body: bytes) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Closing the iterator closes the connection, which ends the request."""
        response = self._send("POST", path, body)
        finished = False
        try:
            if response.status != 200:
                answer = msgspec.json.decode(response.read())
                finished = True
                raise ApiError(message_of(answer))
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    response.read()
                    finished = True
                    return
                if line.startswith(b"data: "):
                    event: dict[str, Any] = msgspec.json.decode(line[6:])
                    if "error" in event:
                        raise ApiError(message_of(event))
                    yield event
            raise ApiError("The stream ended before the answer was complete.")
        except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
            raise ApiError(f"The connection broke: {error}.") from None
        finally:
            if not finished:
                self.close()

    def close(self) -> None:
        """Closes this thread's connection."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        for is_last in (False, True):
            connection, is_fresh = self._connection()
            try:
                connection.request(method, self._prefix + path, body, self._headers)
                return connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A kept connection may have been closed by the server meanwhile; a fresh one that fails is news.
                if is_fresh or is_last:
                    raise ApiError(
                        f"No answer from {self._host}: {error or type(error).__name__}.",
                        remedy="Is the server running?",
                    ) from None
        raise AssertionError("unreachable")

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection, and whether it is new."""
        kept: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if kept is not None:
            return kept, False
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        with contextlib.suppress(OSError):  # the request itself will say why
            connection.connect()
            connection.sock.settimeout(READ_TIMEOUT_S)
        self._local.connection = connection
        return connection, True


def message_of(body: Any) -> str:
    """The message inside an error of OpenAI's shape."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", error)) if isinstance(error, dict) else str(error or body)[:500]
