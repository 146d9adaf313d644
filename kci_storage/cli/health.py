# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kci-storage health``: asks whether the server of a configuration answers, for containers and scripts."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl

from kci_storage.config.checks import split_bind
from kci_storage.config.settings import ServerConfig

TIMEOUT = 8.0  # seconds for each step; a container's health check has 10 s in all
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (replaces "all addresses" by one to connect to)


class Unhealthy(Exception):
    """The server does not answer, or not with 200; the text says what happened."""


def ask(server: ServerConfig) -> None:
    """Ask the server that was started with this configuration for ``/v1/health``.

    :raises Unhealthy: it does not answer, or not as it should.
    """
    try:
        status = _status(server)
    except (OSError, http.client.HTTPException) as exc:
        raise Unhealthy(f"{server.bind} does not answer: {str(exc) or type(exc).__name__}") from exc
    if status != http.client.OK:
        raise Unhealthy(f"{server.bind} answers with status {status}")


def _status(server: ServerConfig) -> int:
    with contextlib.closing(http.client.HTTPConnection("localhost", timeout=TIMEOUT)) as connection:
        connection.sock = _connect(server)
        connection.request("GET", "/v1/health", headers={"User-Agent": "kci-storage-health"})
        return connection.getresponse().status


def _connect(server: ServerConfig) -> socket.socket:
    """A connection, with TLS if the server has it. The certificate is not verified: it does not name the loopback."""
    sock = _socket(server.bind)
    if not server.certfile:
        return sock
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(sock)


def _socket(bind: str) -> socket.socket:
    """A connection to the server's address."""
    if address := split_bind(bind):
        host, port = address
        return socket.create_connection((_LOOPBACK.get(host, host), port), TIMEOUT)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT)
    sock.connect(bind.removeprefix("unix:"))
    return sock
