"""HTTP/1.1 (RFC 9112) as far as blobs need it: requests with a body in memory or none, answers of a known length.

The SDK's pipeline would cost more processor time than most of what else a small cold file needs, and would take a
large one in through several hands. Here a body goes from the socket into the reader's own buffer, without a thread of
its own, and a reader may wait for several answers at once.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import select
import socket
import ssl
from base64 import b64encode
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from kci_storage.drivers.azure.errors import Unanswered, breakage, nonsense, silence
from kci_storage.errors import BackendError

PIECE_SIZE = 64 * 1024  # bytes asked of the socket while a head is awaited: a small object comes along with it
HEAD_SIZE = 64 * 1024  # bytes that a head may have
TOGETHER = 64 * 1024  # bytes of a body that leave together with the head
UNWANTED_SIZE = 64 * 1024  # bytes of a body that are taken in and thrown away, to keep the connection
UNWANTED_SECONDS = 1  # that it may take for its next bytes
CONNECTIONS = 128  # kept for later use

_STATUS = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: |$)")
_NOT_IN_HEADERS = re.compile(r"[\x00\r\n]")
_NOTHING_YET = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError


class Pool:
    """Connections to one service, for many threads.

    :param url: the service's; its path is not used.
    :param proxy: the URL of an HTTP proxy to go through, maybe with a user and a password; None: directly.
    :param authorities: a file or folder of the certificates to trust; None: the system's.
    :param connect_timeout: seconds to wait for a connection.
    :param read_timeout: seconds to wait for the next byte of an answer, or until more of a request is taken.
    """

    def __init__(
        self, url: str, proxy: str | None, authorities: str | None, connect_timeout: float, read_timeout: float
    ):
        self._url = urlsplit(url)
        self._proxy = urlsplit(proxy) if proxy else None
        self._tls = _trusting(authorities) if self._url.scheme == "https" else None
        self._connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self._idle: deque[Connection] = deque()
        self._prefix, self._common = "", {"Host": self._url.netloc}
        if self._proxy is not None and self._tls is None:  # it forwards what it understands (RFC 9112, 3.2.2)
            self._prefix = f"http://{self._url.netloc}"
            self._common |= _authorization(self._proxy)

    def ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes | memoryview = b"") -> Answer:
        """Send a request; the answer, of which only the head is here.

        :param method: ``GET``, ``HEAD`` or ``PUT``.
        :param target: path and query, quoted.
        :param body: of bytes; its length is one of the headers.
        :raises Unanswered: nobody has answered.
        :raises BackendTimeout: nothing came for too long.
        :raises BackendError: the answer makes no sense.
        """
        fields = {**self._common, **headers}
        if any(map(_NOT_IN_HEADERS.search, fields.values())):
            raise nonsense("a header's value would be several lines")
        lines = [f"{method} {self._prefix}{target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return self._take().ask("\r\n".join([*lines, "", ""]).encode("latin-1", "replace"), body, method)

    def _take(self) -> Connection:
        with contextlib.suppress(IndexError):  # there is none, or another thread was quicker
            while True:
                connection = self._idle.pop()
                if connection.is_quiet():
                    return connection
                connection.close()
        return Connection(self, self._connected())

    def _connected(self) -> socket.socket:
        try:
            connection = self._new_connection()
            connection.connect()
        except TimeoutError:
            raise silence("no connection") from None
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise breakage(repr(exc), Unanswered) from exc
        return connection.sock

    def _new_connection(self) -> http.client.HTTPConnection:
        peer = self._proxy or self._url
        if peer is self._proxy and peer.scheme != "http":
            raise ValueError("a proxy must be one of http://")
        if self._tls is None:
            return http.client.HTTPConnection(peer.hostname or "", peer.port or 80, timeout=self._connect_timeout)
        port = peer.port or (80 if self._proxy else 443)
        connection = http.client.HTTPSConnection(
            peer.hostname or "", port, timeout=self._connect_timeout, context=self._tls
        )
        if self._proxy is not None:
            connection.set_tunnel(self._url.hostname or "", self._url.port or 443, _authorization(self._proxy))
        return connection

    def keep(self, connection: Connection) -> None:
        """Take a connection back, on which nothing is under way."""
        self._idle.append(connection)
        if len(self._idle) > CONNECTIONS:
            self._idle.popleft().close()

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().close()


def _trusting(authorities: str | None) -> ssl.SSLContext:
    if authorities is not None and Path(authorities).is_dir():
        return ssl.create_default_context(capath=authorities)
    return ssl.create_default_context(cafile=authorities)


def _authorization(proxy: SplitResult) -> dict[str, str]:
    """What a proxy wants to know of its client (RFC 9110, 11.7.2)."""
    if proxy.username is None:
        return {}
    credentials = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(credentials.encode()).decode()}"}


class Connection:
    """A connection, on which one request at a time is under way."""

    def __init__(self, pool: Pool, sock: socket.socket):
        self._pool = pool
        self.sock = sock
        self._least = 1  # bytes that have come before who waits is told

    def is_quiet(self) -> bool:
        """Whether the other side has neither ended it nor said anything unasked."""
        return not _readable([self.sock], 0)

    def ask(self, head: bytes, body: bytes | memoryview, method: str) -> Answer:
        """Send a request, and wait for the head of its answer. A failure closes the connection."""
        try:
            self.sock.settimeout(self._pool.read_timeout)
            self._send(head, body)
            head, rest = self._head()
            self.sock.settimeout(0)
            return Answer(self, *_parsed(head), rest, method == "HEAD")
        except TimeoutError:
            self.close()
            raise silence("no answer") from None
        except OSError as exc:
            self.close()
            raise breakage(repr(exc), Unanswered) from exc
        except ValueError as exc:
            self.close()
            raise nonsense(str(exc)) from exc

    def _send(self, head: bytes, body: bytes | memoryview) -> None:
        """Send a request. Who refuses it may answer before its end, and take no more; that shows in the answer."""
        with contextlib.suppress(ConnectionError):
            self._send_all(memoryview(head + body[:TOGETHER]))
            self._send_all(memoryview(body)[TOGETHER:])

    def _send_all(self, data: memoryview) -> None:
        """All of it, however long it takes: the time-out is for each piece that the socket takes.

        (For :meth:`socket.socket.sendall` it would be for the whole.)
        """
        while data:
            data = data[self.sock.send(data) :]

    def _head(self) -> tuple[bytes, bytes]:
        """The bytes of a head, and those after it that came along."""
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            if len(received) > HEAD_SIZE:
                raise ValueError("a head without an end")
            piece = self.sock.recv(PIECE_SIZE)
            if not piece:
                raise ConnectionResetError("the connection ended before an answer")
            received += piece
        return received[:end], received[end + 4 :]

    def receive_into(self, buffer: memoryview) -> int | None:
        """Take what there is; how many bytes; None: nothing yet.

        :raises BackendError: nothing more will come.
        """
        try:
            size = self.sock.recv_into(buffer)
        except _NOTHING_YET:
            return None
        except OSError as exc:
            raise breakage(repr(exc)) from exc
        if not size:
            raise breakage("the connection ended before the answer did")
        return size

    def wake_at(self, size: int) -> None:
        """Have who waits be told only when so many bytes have come, or the connection ends (SO_RCVLOWAT, tcp(7))."""
        if size != self._least:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
            self._least = size

    def keep(self) -> None:
        """Leave it to the next request."""
        self.wake_at(1)
        self._pool.keep(self)

    def close(self) -> None:
        """End it. Idempotent."""
        self.sock.close()


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers, whose names are in lower case.

    >>> _parsed(b"HTTP/1.1 206 Partial Content\\r\\nETag: \\"0x1\\"")
    (206, {'etag': '"0x1"'})

    :raises ValueError: it is no head.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    status = _STATUS.match(first)
    fields = [line.partition(":") for line in lines]
    if status is None or not all(colon and name.strip() == name != "" for name, colon, _ in fields):
        raise ValueError("not the head of an HTTP answer")
    return int(status[1]), {name.lower(): value.strip(" \t") for name, _, value in fields}


class Answer:
    """An answer: its head, and its body as it comes.

    :param rest: what of the body has come together with the head.
    :raises ValueError: the body has no length that makes sense.
    """

    def __init__(self, connection: Connection, status: int, headers: dict[str, str], rest: bytes, without_body: bool):
        self.status = status
        self.headers = headers
        self._connection = connection
        self._closed = False
        length = headers.get("content-length")
        # A chunked body is never one that is wanted: what is wanted has a length. It is thrown away.
        self.length = 0 if without_body or status in (204, 304) else int(length) if length is not None else None
        self.missing = self.length if self.length is not None else 1 << 62  # bytes that were not taken yet
        self._rest = memoryview(rest)[: self.missing]
        self._spoilt = len(self._rest) < len(rest)  # by bytes after the end, which are not the next answer
        if not self.missing:
            self._end()

    def fileno(self) -> int:
        """The socket's descriptor, to wait for."""
        return self._connection.sock.fileno()

    def receive_into(self, buffer: memoryview) -> int | None:
        """Put the next bytes of the body, as many as there are, at the beginning of ``buffer``.

        :returns: how many; 0: that was all; None: there is nothing yet.
        :raises BackendError: it broke off.
        """
        if not self.missing:
            return 0
        size = self._receive(buffer[: self.missing])
        if size is not None:
            self.missing -= size
            if not self.missing:
                self._end()
        return size

    def _receive(self, buffer: memoryview) -> int | None:
        size = min(len(self._rest), len(buffer))
        if not size:
            return self._connection.receive_into(buffer)
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def wait_for(self, size: int, seconds: float) -> None:
        """Wait until so many bytes have come, or all that are missing, but no longer than so many seconds.

        To be woken for each packet would cost the reader as much as to receive it, and the sender something, too.
        """
        self._connection.wake_at(min(size, self.missing))
        wait_for([self], seconds)
        self._connection.wake_at(1)

    def discard(self) -> None:
        """Throw the body away: a small one that comes soon leaves the connection to others."""
        buffer = memoryview(bytearray(UNWANTED_SIZE))
        with contextlib.suppress(BackendError):
            while 0 < self.missing <= UNWANTED_SIZE:
                if self.receive_into(buffer) is None and not wait_for([self], UNWANTED_SECONDS):
                    break
        self.close()

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            if self._spoilt or self.headers.get("connection", "").lower() == "close":
                self._connection.close()
            else:
                self._connection.keep()

    def close(self) -> None:
        """Give up what is missing. Idempotent."""
        if not self._closed:
            self._closed = True
            self._connection.close()


def wait_for(answers: Iterable[Answer], seconds: float) -> list[Answer]:
    """Those of which something has come, as soon as there is one; none after so many seconds."""
    waiting = {answer.fileno(): answer for answer in answers}
    return [waiting[fd] for fd in _readable(waiting, seconds)]


def _readable(files: Iterable[int | socket.socket], seconds: float) -> list[int]:
    """The descriptors that can be read, or are at their end."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [fd for fd, _ in poll.poll(seconds * 1000)]
