"""A client's connection: its request's head is collected before a thread sees it; what a thread may do to it."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import time
from typing import Any

from gunicorn.workers.gthread import TConn

from kci_storage.net.background import Background, Lingering
from kci_storage.net.client_socket import ClientSocket
from kci_storage.server.request import Environs, Request

HEAD_SIZE = 16 * 1024  # bytes that are read at a time, of a head and what comes with it
_END_OF_HEAD = re.compile(rb"\r\n\r\n|(?:^|[^\r])\n")  # its own, or a bare LF, at which no head goes on


class WorkerConnection:
    """What the application may do to its connection (:class:`kci_storage.wsgi.exchange.Connection`)."""

    def __init__(self, request: Any, sock: socket.socket, expects_continue: bool):
        self._request = request
        self._sock = sock
        self._expects_continue = expects_continue

    def continue_body(self) -> None:
        """Send 100 Continue if the client waits for it (RFC 9110, 10.1.1)."""
        if self._expects_continue:
            self._expects_continue = False
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def receive_into(self, buffer: memoryview) -> int:
        """The next bytes of a body of known length; how many; 0 at its end, or when the client went away.

        They come straight from the socket once what was read together with the head is used up: gunicorn's own
        reader copies each byte four times, into memory that is new each time.
        """
        body = self._request.body
        ahead = body.buf.tell() or body.reader.unreader.buf.getbuffer().nbytes
        if ahead:
            data = body.read(min(ahead, len(buffer)))
            buffer[: len(data)] = data
            return len(data)
        size = self._sock.recv_into(buffer[: body.reader.length])
        body.reader.length -= size
        return size

    def close_afterwards(self) -> None:
        """Say ``Connection: close`` and mean it."""
        self._request.force_close()


class Connection(TConn):
    """A client's connection. Its request's head is collected before a thread sees it.

    :param background: closes it gracefully.
    """

    sock: ClientSocket

    def __init__(self, cfg: Any, sock: ClientSocket, address: Any, server: Any, background: Background):
        super().__init__(cfg, sock, address, server)
        self._background = background
        self.data_ready = True  # gunicorn need not wait for it
        self.head = b""  # and what has come after it
        self._searched = 0  # how much of it, for its end
        self.environs = Environs()
        self.keep = False  # whether there may be another request

    def init(self) -> None:
        """Give the parser what has come."""
        super().init()
        self.parser.mesg_class = Request
        self.parser.unreader.unread(self.head)
        self.head, self._searched = b"", 0

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

    def take_unread(self) -> None:
        """Take back what came after the request that has been answered."""
        if self.parser is not None:
            self.head += self.parser.unreader.take_buffered()

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

    def close(self, graceful: bool = False) -> None:
        """Close; gracefully: so that the client gets all that was sent to it, without the caller waiting for that."""
        if graceful:
            with contextlib.suppress(OSError):  # the client has closed it already
                self._background.add(Lingering(self.sock))
                return
        if self.sock.is_secure:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        super().close()


class Waiting:
    """Connections that wait for the client's next request, each for so long.

    :param seconds: how long.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._connections: dict[Connection, None] = {}  # by deadline

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, conn: Connection) -> bool:
        return conn in self._connections

    def add(self, conn: Connection) -> None:
        """It waits from now on."""
        conn.timeout = time.monotonic() + self._seconds
        self._connections[conn] = None

    def remove(self, conn: Connection) -> None:
        """It does not wait any more."""
        self._connections.pop(conn, None)

    def oldest(self) -> Connection:
        """The one that has waited the longest."""
        return next(iter(self._connections))

    def expired(self, now: float) -> list[Connection]:
        """Those whose time is over."""
        return list(itertools.takewhile(lambda conn: conn.timeout <= now, self._connections))

    def shorten(self, seconds: float) -> None:
        """From now on nobody waits for longer than this."""
        self._seconds = min(self._seconds, seconds)
        for conn in self._connections:
            conn.timeout = min(conn.timeout, time.monotonic() + self._seconds)
