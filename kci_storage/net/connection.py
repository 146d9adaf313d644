# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client's connection, which collects a request's head before a thread is used for it."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable
from typing import Any

from kci_storage.net.background import Background, Lingering
from kci_storage.net.client_socket import ClientSocket

HEAD_SIZE = 16 * 1024  # bytes that are read at a time while a head is collected
_END_OF_HEAD = re.compile(rb"\r\n\r\n|(?:^|[^\r])\n")  # an empty line; or a bare LF, for which it is refused


class Connection:
    """A client's connection.

    :param sock: its socket.
    :param client: the client's address, as ``accept`` returns it: host and port, or text for a Unix socket.
    :param server: the address that the client has connected to, in the same form.
    :param background: the background sender, which closes the connection gracefully.
    """

    def __init__(self, sock: ClientSocket, client: Any, server: Any, background: Background):
        self.sock = sock
        self.client = client
        self.server = server
        self._background = background
        self.head = b""  # the next request's head, and the bytes that have come after it
        self._searched = 0  # bytes of ``head`` that have been searched for its end
        self.deadline = 0.0  # on the monotonic clock: when the wait for a request ends
        self.environ: dict[str, Any] = {}  # the part of the WSGI environment that all its requests share
        self.request_id = ""  # of the current or the last request
        self.keep = False  # whether it stays open for another request

    def receive(self) -> bool:
        """Receive what has come of the next request, without blocking.

        :returns: False: the client has closed the connection.
        """
        while True:
            try:
                data = self.sock.recv_now(HEAD_SIZE)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self.head = self.head + data if self.head else data
            if not data or not self.sock.has_more:
                return bool(data)

    def take_head(self) -> bytes:
        """Remove and return the request's head and the bytes that have come after it."""
        head, self.head, self._searched = self.head, b"", 0
        return head

    @property
    def has_begun(self) -> bool:
        """Whether a request, or a TLS handshake, has begun. An empty line does not count (RFC 9112, 2.2)."""
        return self.head not in (b"", b"\r", b"\r\n") or self.sock.is_handshaking

    @property
    def has_head(self) -> bool:
        """Whether enough has come for the parser to read the head, or to refuse it."""
        if self.head.endswith(b"\r\n\r\n"):
            return True
        start, self._searched = max(0, self._searched - 3), len(self.head)
        return _END_OF_HEAD.search(self.head, start) is not None

    @property
    def has_more(self) -> bool:
        """Whether bytes of a next request have been received already, so that polling the socket would not tell."""
        return bool(self.head) or self.sock.has_more

    def close(self) -> None:
        """Close at once."""
        if self.sock.is_encrypted:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        self.sock.close()

    def linger(self, closed: Callable[[], None]) -> bool:
        """Close the connection in the background, so that the client gets all data that was sent.

        :param closed: called by the background thread when the connection is closed.
        :returns: False: the client has disconnected, and the connection is closed already.
        """
        try:
            self._background.add(Lingering(self.sock, closed))
        except OSError:
            self.close()
            return False
        return True
