# SPDX-License-Identifier: LGPL-2.1-or-later
"""HTTP/1.1 (RFC 9112) as far as the backend's protocol needs it: requests with a body of known length, and answers.

All requests to the backend go through one pool. urllib3 needs three times as much processor
time for a small request, and copies a large body through several buffers. Here a body goes from the socket into the
reader's own buffer, and one thread may wait for several answers at once (docs/decisions/azure-http.md).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from kci_storage.drivers.azure.connect import Connector
from kci_storage.drivers.azure.errors import Unanswered, breakage, nonsense, silence
from kci_storage.errors import BackendError

PIECE_SIZE = 64 * 1024  # bytes asked of the socket while a head is awaited: a small object comes along with it
HEAD_SIZE = 64 * 1024  # bytes that a head may have, with the interim ones before it
TOGETHER = 64 * 1024  # bytes of a body that are sent together with the head
DISCARD_SIZE = 64 * 1024  # bytes of a body that are received and thrown away, to keep the connection
DISCARD_SECONDS = 1  # that it may take for its next bytes
CONNECTIONS = 128  # idle ones kept for later requests
IDLE_SECONDS = 60  # after which an idle one is not used again; load balancers forget it, Azure's after 4 minutes
MOST_OF_TIMEOUT = 0.8  # of the read time-out, in which the next bytes of a large body must be acknowledged

_STATUS = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: |$)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;|$)")
_INTERIM = range(100, 200)
_NOTHING_YET = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError


class RepeatableBody:
    """A request's body that is not in memory.

    :param size: in bytes.
    :param pieces: gives all of it, anew for each try of the request.
    """

    def __init__(self, size: int, pieces: Callable[[], Iterable[bytes]]):
        self._size = size
        self._pieces = pieces

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pieces())


Body: TypeAlias = bytes | memoryview | RepeatableBody


class Forgotten(Unanswered):
    """The other side, or a relay on the way, does not know the connection any more: it acknowledges nothing."""


def _ignore() -> None:
    """Nobody wants to know."""


class ConnectionPool:
    """Connections to one service, for many threads.

    :param connector: makes them.
    :param read_timeout: seconds to wait for the next byte of an answer, or until more of a request is taken.
    """

    def __init__(self, connector: Connector, read_timeout: float):
        self.read_timeout = read_timeout
        self._connector = connector
        self._idle: deque[PooledConnection] = deque()  # the one that was used last is at the end

    def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Body = b"",
        on_lost: Callable[[], None] = _ignore,
    ) -> Answer:
        """Send a request, and wait for the head of its answer.

        An idle connection may have ended unnoticed. If it did, the request is sent once more on a new connection,
        unless a part of an answer had come. If a relay has forgotten it, that is noticed after the connector's
        time-out; the other idle connections are closed then, since they have probably been forgotten too.

        :param target: path and query, quoted.
        :param body: its length is one of the headers.
        :param on_lost: called each time when the request, or a part of it, was sent and its answer is lost.
        :raises Unanswered: there was no answer.
        :raises BackendTimeout: nothing came for too long.
        :raises BackendError: the answer makes no sense.
        """
        head = self._head(method, target, headers)
        connection = self._idle_connection()
        if connection is not None:
            connection.limit_silence(self._connector.connect_timeout, len(body))
            try:
                return connection.ask(head, body, method, on_lost)
            except Unanswered as exc:
                if connection.heard:
                    raise
                if isinstance(exc, Forgotten):
                    self.close()
        return PooledConnection(self, self._connector.connect()).ask(head, body, method, on_lost)

    def _head(self, method: str, target: str, headers: Mapping[str, str]) -> bytes:
        fields = {**self._connector.headers, **headers}
        first = f"{method} {self._connector.target_prefix}{target} HTTP/1.1"
        text = "\r\n".join([first, *(f"{name}: {value}" for name, value in fields.items()), "", ""])
        if not text.count("\r") == text.count("\n") == len(fields) + 2 or "\0" in text:
            raise nonsense("a header's value would be several lines")
        return text.encode("latin-1", "replace")

    def _idle_connection(self) -> PooledConnection | None:
        """The connection that was used last, of those that can be used again."""
        with contextlib.suppress(IndexError):  # there is none, or another thread was quicker
            while True:
                connection = self._idle.pop()
                if not connection.is_old() and connection.is_quiet():
                    return connection
                connection.close()
        return None

    def keep(self, connection: PooledConnection) -> None:
        """Take a connection back, on which nothing is under way."""
        self._idle.append(connection)
        with contextlib.suppress(IndexError):  # other threads have taken them
            while len(self._idle) > CONNECTIONS or self._idle[0].is_old():
                self._idle.popleft().close()

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()


class PooledConnection:
    """A connection, on which one request at a time is under way.

    :param sock: connected.
    """

    def __init__(self, pool: ConnectionPool, sock: socket.socket):
        self._pool = pool
        self.sock = sock
        self.heard = False  # whether any byte of an answer to the last request has come
        self._idle_since = 0.0  # seconds since the machine's start
        self._low_water = 1  # bytes that must have come before poll() reports the socket
        self._user_timeout = 0  # milliseconds; 0: the kernel's own, of about 15 minutes

    def is_old(self) -> bool:
        """Whether it has been idle for too long."""
        return _now() - self._idle_since > IDLE_SECONDS

    def is_quiet(self) -> bool:
        """Whether the other side has neither ended it nor said anything unasked."""
        return not _readable([self.sock], 0)

    def limit_silence(self, seconds: float, body_size: int) -> None:
        """Have a request fail whose bytes are not even acknowledged (TCP_USER_TIMEOUT, tcp(7)).

        While the other side takes no more of a large body it acknowledges nothing either, which is no reason yet.

        :param seconds: to wait for the acknowledgement.
        :param body_size: of the request, in bytes.
        """
        if body_size > TOGETHER:
            seconds = self._pool.read_timeout * MOST_OF_TIMEOUT
        milliseconds = int(seconds * 1000)
        if milliseconds != self._user_timeout:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            self._user_timeout = milliseconds

    def ask(self, head: bytes, body: Body, method: str, on_lost: Callable[[], None]) -> Answer:
        """Send a request, and wait for the head of its answer. A failure closes the connection.

        :param on_lost: called when it fails.
        """
        self.heard = False
        try:
            return self._ask(head, body, method)
        except BackendError:
            self.close()  # also if only the body's pieces failed: the rest of it can never be sent
            on_lost()
            raise

    def _ask(self, head: bytes, body: Body, method: str) -> Answer:
        try:
            self.sock.settimeout(self._pool.read_timeout)
            self._send(head, body)
            status, headers, rest = self._receive_head()
            self.sock.settimeout(0)
            return Answer(self, status, headers, rest, method == "HEAD")
        except TimeoutError as exc:
            if exc.errno == errno.ETIMEDOUT:
                raise breakage(repr(exc), Forgotten) from exc
            raise silence("no answer") from None
        except OSError as exc:
            raise breakage(repr(exc), Unanswered) from exc
        except ValueError as exc:
            raise nonsense(str(exc)) from exc

    def _send(self, head: bytes, body: Body) -> None:
        """Send a request. A backend that refuses it may answer before its end, and close: the answer tells."""
        with contextlib.suppress(ConnectionError):
            if isinstance(body, RepeatableBody):
                for piece in itertools.chain([head], body):
                    self._send_all(memoryview(piece))
            else:
                self._send_all(memoryview(head + body[:TOGETHER]))
                self._send_all(memoryview(body)[TOGETHER:])

    def _send_all(self, data: memoryview) -> None:
        """Send all of it, however long it takes: the time-out is for each piece that the socket takes.

        (For :meth:`socket.socket.sendall` it would be for the whole.)
        """
        while data:
            data = data[self.sock.send(data) :]

    def _receive_head(self) -> tuple[int, dict[str, str], bytes]:
        """Status and headers of an answer, and the bytes after them that came along.

        Interim answers (RFC 9110, 15.2: 100 Continue, 103 Early Hints) are read past.
        """
        received = b""
        room = HEAD_SIZE
        while True:
            while (end := received.find(b"\r\n\r\n")) < 0:
                if len(received) > room:
                    raise ValueError("a head without an end")
                received += self.receive()
            status, headers = _parsed(received[:end])
            if status == 101:
                raise ValueError("another protocol, which was not asked for")
            if status not in _INTERIM:
                return status, headers, received[end + 4 :]
            received = received[end + 4 :]
            room -= end + 4

    def receive(self) -> bytes:
        """The next bytes, waited for as long as the socket's time-out is.

        :raises OSError: there are no more, or none in time.
        """
        piece = self.sock.recv(PIECE_SIZE)
        if not piece:
            raise ConnectionResetError("the connection ended before the answer did")
        self.heard = True
        return piece

    def receive_into(self, buffer: memoryview) -> int | None:
        """Take what has come; how many bytes; None: nothing yet.

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

    def receive_all(self, rest: bytes | memoryview) -> Receiving:
        """Receive a body that is wanted as a whole, with the usual time-out.

        :param rest: the part that has come already.
        """
        self.sock.settimeout(self._pool.read_timeout)
        return Receiving(self, rest)

    def set_low_water(self, size: int) -> None:
        """Let poll() report the socket only when so many bytes have come, or it ends (SO_RCVLOWAT, socket(7))."""
        if size != self._low_water:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
            self._low_water = size

    def keep(self) -> None:
        """Return it to the pool."""
        self.set_low_water(1)
        self._idle_since = _now()
        self._pool.keep(self)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self.sock.close()


class Receiving:
    """A body that is received as a whole.

    Its methods raise OSError when the connection ends too early, ValueError when the framing is wrong.

    :param rest: the part that has come already.
    """

    def __init__(self, connection: PooledConnection, rest: bytes | memoryview):
        self._connection = connection
        self.rest = bytearray(rest)  # received, and not yet taken

    def exactly(self, size: int) -> bytes:
        """The next so many bytes."""
        while len(self.rest) < size:
            self.rest += self._connection.receive()
        taken = bytes(self.rest[:size])
        del self.rest[:size]
        return taken

    def until_closed(self) -> bytes:
        """All that comes before the other side closes the connection."""
        with contextlib.suppress(ConnectionResetError):
            while True:
                self.rest += self._connection.receive()
        return self.exactly(len(self.rest))

    def chunks(self) -> Iterator[bytes]:
        """The chunks of a chunked body (RFC 9112, 7.1), without their framing."""
        while size := self._chunk_size():
            yield self.exactly(size)
            if self._line():
                raise ValueError("a chunk is longer than it says")
        while self._line():
            pass  # a trailer field

    def _chunk_size(self) -> int:
        found = _CHUNK_SIZE.match(self._line())
        if found is None:
            raise ValueError("a chunk without a size")
        return int(found[1], 16)

    def _line(self) -> bytes:
        while (end := self.rest.find(b"\r\n")) < 0:
            if len(self.rest) > HEAD_SIZE:
                raise ValueError("a line without an end")
            self.rest += self._connection.receive()
        return self.exactly(end + 2)[:-2]


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    r"""Status and headers, whose names are in lower case.

    >>> _parsed(b'HTTP/1.1 206 Partial Content\r\nETag: "0x1"')
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
    """A backend's answer to a request: its head, and its body as it comes.

    :param rest: the part of the body that came together with the head.
    :raises ValueError: the body has no length that makes sense.
    """

    def __init__(
        self, connection: PooledConnection, status: int, headers: dict[str, str], rest: bytes, without_body: bool
    ):
        self.status = status
        self.headers = headers
        self._connection = connection
        self._closed = False
        # An object's content always has a length. A chunked body is received by content(), or thrown away.
        length = headers.get("content-length") if "transfer-encoding" not in headers else None
        self.length = 0 if without_body or status in (204, 304) else int(length) if length is not None else None
        self.missing = self.length if self.length is not None else 1 << 62  # bytes that were not taken yet
        self._rest = memoryview(rest)[: self.missing]
        self._surplus = len(self._rest) < len(rest)  # whether bytes came after the end, which are not the next answer
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

    def content(self) -> bytes:
        """All of the body that was not taken yet, when it has come: for documents that fit into memory.

        :raises Unanswered: it broke off.
        :raises BackendTimeout: nothing came for too long.
        :raises BackendError: it makes no sense.
        """
        if not self.missing:
            return b""
        try:
            return self._content()
        except TimeoutError:
            raise silence("nothing came of its content") from None
        except OSError as exc:
            raise breakage(repr(exc), Unanswered) from exc
        except ValueError as exc:
            raise nonsense(str(exc)) from exc
        finally:
            self.close()

    def _content(self) -> bytes:
        body = self._connection.receive_all(self._rest)
        coding = self.headers.get("transfer-encoding")
        if coding is None and self.length is None:
            return body.until_closed()
        if coding is not None and coding.lower() != "chunked":
            raise ValueError("a transfer coding that was not asked for")
        content = body.exactly(self.missing) if coding is None else b"".join(body.chunks())
        self.missing, self._surplus = 0, self._surplus or bool(body.rest)
        self._end()
        return content

    def wait_for(self, size: int, seconds: float) -> None:
        """Wait until so many bytes have come, or all that are missing, but no longer than so many seconds.

        To wake up for each packet would cost the reader as much as to receive it, and the sender something, too.
        """
        self._connection.set_low_water(min(size, self.missing))
        wait_for([self], seconds)
        self._connection.set_low_water(1)

    def discard(self) -> None:
        """Throw the body away: a small one that comes soon leaves the connection to other requests."""
        if self._closed:
            return
        buffer = memoryview(bytearray(DISCARD_SIZE))
        with contextlib.suppress(BackendError):
            while 0 < self.missing <= DISCARD_SIZE:
                if self.receive_into(buffer) is None and not wait_for([self], DISCARD_SECONDS):
                    break
        self.close()

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            if self._surplus or self.headers.get("connection", "").lower() == "close":
                self._connection.close()
            else:
                self._connection.keep()

    def close(self) -> None:
        """Give up what is missing. Idempotent."""
        if not self._closed:
            self._closed = True
            self._connection.close()


def _now() -> float:
    """Seconds since the machine's start, those included for which it slept: its peers did not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wait_for(answers: Iterable[Answer], seconds: float) -> list[Answer]:
    """Wait until bytes of any of these answers have come; which ones. None of them after so many seconds."""
    waiting = {answer.fileno(): answer for answer in answers}
    return [waiting[fd] for fd in _readable(waiting, seconds)]


def _readable(files: Iterable[int | socket.socket], seconds: float) -> list[int]:
    """The descriptors that can be read, or are at their end."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [fd for fd, _ in poll.poll(seconds * 1000)]
