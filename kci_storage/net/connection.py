# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client's connection: its request's head is collected before a thread sees it."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable
from typing import Any

from kci_storage.net.background import Background, Lingering
from kci_storage.net.client_socket import ClientSocket

HEAD_SIZE = 16 * 1024  # bytes that are read at a time, of a head and what comes with it
_END_OF_HEAD = re.compile(rb"\r\n\r\n|(?:^|[^\r])\n")  # its own, or a bare LF, at which no head goes on


class Connection:
    """A client's connection.

    :param sock: its socket.
    :param client: the client's address, as of ``accept``: host and port, or text for a Unix socket.
    :param server: the address that it came to, likewise.
    :param background: closes it gracefully.
    """

    def __init__(self, sock: ClientSocket, client: Any, server: Any, background: Background):
        self.sock = sock
        self.client = client
        self.server = server
        self._background = background
        self.head = b""  # of the next request, and what has come after it
        self._searched = 0  # how much of it, for its end
        self.deadline = 0.0  # on the monotonic clock: until when it may wait for a request
        self.environ: dict[str, Any] = {}  # what of a request's environ is the same for all of them
        self.request_id = ""  # of the request that is answered, or was answered last
        self.keep = False  # whether there may be another request

    def receive(self) -> bool:
        """Take what has come of the next request, without waiting; False: the client has closed the connection."""
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
        """The request's head, and what has come after it."""
        head, self.head, self._searched = self.head, b"", 0
        return head

    @property
    def has_begun(self) -> bool:
        """Whether a request, or what must precede it, has begun. An empty line is neither (RFC 9112, 2.2)."""
        return self.head not in (b"", b"\r", b"\r\n") or self.sock.is_handshaking

    @property
    def has_head(self) -> bool:
        """Whether the parser needs no more to know what the request is, or that it is none."""
        if self.head.endswith(b"\r\n\r\n"):
            return True
        start, self._searched = max(0, self._searched - 3), len(self.head)
        return _END_OF_HEAD.search(self.head, start) is not None

    @property
    def has_more(self) -> bool:
        """Whether something of a next request is here, of which the system does not know."""
        return bool(self.head) or self.sock.has_more

    def close(self) -> None:
        """Close at once."""
        if self.sock.is_secure:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        self.sock.close()

    def linger(self, closed: Callable[[], None]) -> bool:
        """Close so that the client gets all that was sent to it, in the background.

        :param closed: called by another thread when it is closed.
        :returns: False: the client has closed it already, and so it is closed.
        """
        try:
            self._background.add(Lingering(self.sock, closed))
        except OSError:
            self.close()
            return False
        return True
