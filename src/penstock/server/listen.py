"""Taking the port. Apart from http_server, so that it is known to be free before uvicorn is even imported."""

from __future__ import annotations

import errno
import socket

from penstock.base.errors import ConfigError
from penstock.config.defaults import check_public_bind
from penstock.config.settings import Settings


def bind(settings: Settings) -> socket.socket:
    """A bound socket, not listening yet. Raises ConfigError when the address cannot be had, or needs a key."""
    check_public_bind(settings)
    host, port = settings.host, settings.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by connections: the kernel drops a peer that stops reading
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.client_timeout * 1000))
        bound.bind(address)
    except OSError as error:
        remedy = "Check --host and --port."
        if error.errno == errno.EADDRINUSE:
            remedy = "Another program uses it: choose another --port, or 0 for any free one."
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}.", remedy=remedy, param="port"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Where clients on this machine reach `bound`."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
