"""The border between gunicorn and the application: what was really read and sent.

One :class:`Exchange` accompanies each request. Its body tells a client that went away from one that was done; its end
is when the response's last byte has been handed to the kernel, or the client is gone, and only then is the request
logged and counted. WSGI hooks of a framework run before the body is sent, and not at all for ``sendfile``.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from kci_storage.errors import ClientDisconnected, StorageError, meaning

SMALL_FILE = 64 * 1024  # bytes; copied, it leaves in one piece with its head, sooner than by sendfile
EXCHANGE = "kci_storage.exchange"  # the environ's key for it
CONNECTION = "kci_storage.connection"  # the environ's key for what the worker lets us do to the connection
FIRST_READ_SIZE = 1024  # bytes of a chunked body; gunicorn waits for all, and these say what may be refused
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


class Connection(Protocol):
    """What the worker lets the application do to a connection."""

    def continue_body(self) -> None:
        """Send 100 Continue if the client waits for it."""

    def receive_into(self, buffer: memoryview) -> int:
        """Put the next bytes of a body of known length at the beginning of ``buffer``; how many; 0: its end."""

    def close_afterwards(self) -> None:
        """Say ``Connection: close`` and mean it."""


class Exchange:
    """A request and its response, as they went over the wire."""

    def __init__(self, environ: Environ, finished: Callable[[Exchange], None]):
        self.environ = environ
        self.started = time.time()
        self.begun = time.monotonic()  # in seconds
        self.request_id = _request_id(environ.get("HTTP_X_REQUEST_ID"))
        self.body = RequestBody(environ)
        self.status = 0
        self.promised = 0  # body bytes, by Content-Length
        self.sent = 0  # body bytes
        self.duration = 0.0  # seconds, once it has finished
        self.route: str | None = None  # which view answered
        self.user: str | None = None  # the token's email
        self.cache: str | None = None  # what X-Cache said
        self.error: str | None = None  # what only the log may say
        self.count: Callable[[], Callable[[], None]] | None = None  # counts it if it lasts; returns what ends that
        self._release: Callable[[], None] | None = None
        self._finished: Callable[[Exchange], None] | None = finished

    def lasts(self) -> None:
        """It will not be over at once: have it counted, where that is wanted and has not been done.

        :raises Refused: there are too many already.
        """
        if self.count is not None:
            count, self.count = self.count, None
            self._release = count()

    def failed(self, error: StorageError) -> None:
        """Have the log say what went wrong."""
        self.error = f"{meaning(error).label}: {error.detail or error.message}"

    def finish(self) -> None:
        """The response has been sent, or never will be. Only the first call counts."""
        if self._finished is not None:
            finished, self._finished = self._finished, None
            if self._release is not None:
                self._release()
            self.duration = time.monotonic() - self.begun
            if self.sent < self.promised:
                self.close_connection()  # else the client waits for the rest, and takes the next answer for it
            finished(self)
            self.environ.pop(EXCHANGE, None)  # they would keep one another until the collector of cycles comes

    def close_connection(self) -> None:
        """Have the connection closed after this response."""
        connection: Connection | None = self.environ.get(CONNECTION)
        if connection is not None:
            connection.close_afterwards()


def _request_id(incoming: str | None) -> str:
    return incoming if incoming and SANE_REQUEST_ID.fullmatch(incoming) else new_request_id()


def new_request_id() -> str:
    """An ID for a request that brought none along."""
    return f"{random.getrandbits(128):032x}"  # to be found in a log, not to be kept from anybody


class RequestBody(io.RawIOBase):
    """The request's body, which raises where it ends too early.

    gunicorn shows a client that went away as an ordinary end of the body; only its length tells.
    """

    def __init__(self, environ: Environ):
        super().__init__()
        self._input = environ.get("wsgi.input")
        self._connection: Connection | None = environ.get(CONNECTION)
        self.chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
        self.length = None if self.chunked else int(environ.get("CONTENT_LENGTH") or 0)  # bytes
        self.received = 0  # bytes
        self._at_end = self.length == 0

    @property
    def exhausted(self) -> bool:
        """Whether nothing of it is left on the connection."""
        return self._at_end

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most ``size`` (-1: all); empty at the end.

        :raises ClientDisconnected: the client went away, stalled, or broke the chunked encoding.
        """
        if self._at_end:
            return b""
        self._continue()
        assert self._input is not None
        with _lost_client():
            data: bytes = self._input.read() if size < 0 else self._input.read(size)
        self._count(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        """Put the next bytes, as many as there are, at the beginning of ``buffer``; how many; 0: the end.

        :raises ClientDisconnected: as of :meth:`read`.
        """
        if self.chunked or self._connection is None:
            data = self.read(len(buffer) if self.received else min(len(buffer), FIRST_READ_SIZE))
            buffer[: len(data)] = data
            return len(data)
        if self._at_end:
            return 0
        self._continue()
        with _lost_client():
            size = self._connection.receive_into(memoryview(buffer))
        self._count(size)
        return size

    def _continue(self) -> None:
        if self._connection is not None and self.received == 0:
            self._connection.continue_body()

    def _count(self, size: int) -> None:
        self.received += size
        if self.length is not None:
            self._at_end = self.received >= self.length
            if not size and not self._at_end:
                raise ClientDisconnected(f"the body ended after {self.received} of {self.length} bytes")
        elif not size:
            self._at_end = True


@contextlib.contextmanager
def _lost_client() -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # a reset, a time-out, a broken chunk: gunicorn has a class for each
        raise ClientDisconnected("the body could not be read to its end", detail=repr(exc)) from exc


class SentFile:
    """A part of a file to be sent, which notes how much of it went out.

    :param fd: the file; nobody else moves its position.
    :param start: the offset of the first byte to send.
    :param close: called once the file has been sent, or never will be; it closes ``fd``.
    """

    def __init__(self, fd: int, start: int, close: Callable[[], None]):
        self._fd = fd
        self._start = self._position = start
        self._close = close
        self._kept = False
        self.exchange: Exchange | None = None

    def send_to(self, sock: socket.socket, head: bytes, count: int) -> None:
        """Send a response's head, and so many bytes of the file.

        :raises ConnectionResetError: the client is gone.
        """
        if count > SMALL_FILE:
            sock.sendall(head, socket.MSG_MORE)
            sock.sendfile(self, self._start, count)  # type: ignore[arg-type]
        else:
            data = os.pread(self._fd, count, self._start)
            sock.sendall(head + data)
            self._position += len(data)

    def keep(self) -> None:
        """The next ``close`` is not the end: somebody else goes on sending, and closes it again."""
        self._kept = True

    def fileno(self) -> int:
        """The descriptor, positioned at the first byte to send, as other servers expect it."""
        os.lseek(self._fd, self._position, os.SEEK_SET)
        return self._fd

    def seek(self, position: int) -> None:
        """What ``socket.sendfile`` calls at its end."""
        self._position = position

    def read(self, size: int = -1) -> bytes:
        """For a server, or a TLS connection, that cannot use ``sendfile``."""
        data = os.pread(self._fd, size if size >= 0 else 1 << 20, self._position)
        self._position += len(data)
        return data

    def close(self) -> None:
        """Idempotent."""
        if self._kept:
            self._kept = False
        elif self._fd >= 0:
            self._fd = -1
            self._close()
            if self.exchange is not None:
                self.exchange.sent = self._position - self._start
                self.exchange.finish()


class SentSegments:
    """A body that arrives while it is sent, in pieces: bytes, or regions of files, which go by ``sendfile``.

    :param segments: the pieces; a region has ``fd``, ``start``, ``stop``, and ``read()`` for who needs bytes.
    :param fd: any file, for a server that asks whether this is one.
    :param close: called once all has been sent, or never will be.
    """

    def __init__(self, segments: Iterator[Any], fd: int, close: Callable[[], None]):
        self._segments = segments
        self._bytes = self._as_bytes()
        self._fd = fd
        self._close: Callable[[], None] | None = close
        self._sent = 0
        self.exchange: Exchange | None = None

    def fileno(self) -> int:
        """The descriptor of a file that can be seeked."""
        return self._fd

    def send_to(self, sock: socket.socket) -> int:
        """Send all of it; how many bytes that were."""
        with _cut_short(self.exchange):
            for segment in self._segments:
                if isinstance(segment, bytes):
                    sock.sendall(segment)
                    self._sent += len(segment)
                else:
                    self._send_region(sock, segment)
        return self._sent

    def _send_region(self, sock: socket.socket, region: Any) -> None:
        file = _Position(region.fd, region.start)
        try:
            sock.sendfile(file, region.start, region.stop - region.start)  # type: ignore[arg-type]
        finally:
            self._sent += file.position - region.start
        if file.position < region.stop:
            raise StorageError("the file became shorter while it was sent")

    def read(self, size: int = -1) -> bytes:
        """The next piece, of any size, for a server or a TLS connection that cannot use ``sendfile``."""
        with _cut_short(self.exchange):
            data = next(self._bytes, b"")
        self._sent += len(data)
        return data

    def _as_bytes(self) -> Iterator[bytes]:
        for segment in self._segments:
            if isinstance(segment, bytes):
                yield segment
            else:
                yield from segment.read()

    def close(self) -> None:
        """Idempotent."""
        if self._close is not None:
            close, self._close = self._close, None
            close()
            if self.exchange is not None:
                self.exchange.sent = self._sent
                self.exchange.finish()


class _Position:
    """A file for ``socket.sendfile``, which seeks it to where it stopped, also when the client went away.

    The descriptor is shared, so its own position means nothing.
    """

    def __init__(self, fd: int, position: int):
        self._fd = fd
        self._next = self.position = position

    def fileno(self) -> int:
        return self._fd

    def seek(self, position: int) -> None:
        self._next = self.position = position

    def read(self, size: int) -> bytes:  # what ``socket.sendfile`` tries when the system call fails
        data = os.pread(self._fd, size, self._next)
        self._next += len(data)
        return data


@contextlib.contextmanager
def _cut_short(exchange: Exchange | None) -> Iterator[None]:
    """A body that fails after its head was sent ends the connection."""
    try:
        yield
    except StorageError as exc:
        if exchange is not None:
            exchange.failed(exc)
        # Too late for an error's status. The server takes this for a client that left: it closes the connection,
        # without the last chunk or short of Content-Length, so the client sees that something is missing.
        raise ConnectionResetError(errno.ECONNRESET, "the response was cut short") from exc


class SentBody:
    """Any other response body, counted as it goes out."""

    def __init__(self, body: Iterable[bytes], exchange: Exchange):
        self._body = body
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        without_body = self._exchange.environ["REQUEST_METHOD"] == "HEAD"
        with _cut_short(self._exchange):
            for data in self._body:
                yield data  # counted when the server asks for the next piece: then this one has gone out
                if not without_body:
                    self._exchange.sent += len(data)

    def close(self) -> None:
        """Called by the server at the end, whatever happened."""
        try:
            if hasattr(self._body, "close"):
                self._body.close()
        finally:
            self._exchange.finish()


def is_content_length(name: str) -> bool:
    """Whether that is the header's name, in whatever case.

    >>> is_content_length("content-length"), is_content_length("ETag")
    (True, False)
    """
    return name == "Content-Length" or (len(name) == len("Content-Length") and name.lower() == "content-length")


def _promised(method: str, headers: list[tuple[str, str]]) -> int:
    """How many bytes of body a response announces."""
    if method != "HEAD":
        for name, value in reversed(headers):  # ours have it last
            if is_content_length(name):
                return int(value)
    return 0


class Transport:
    """WSGI middleware that gives each request its :class:`Exchange`.

    :param finished: called with the exchange at its end.
    """

    def __init__(
        self,
        app: Callable[[Environ, StartResponse], Iterable[bytes]],
        finished: Callable[[Exchange], None],
    ):
        self._app = app
        self._finished = finished

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        exchange = Exchange(environ, self._finished)
        environ[EXCHANGE] = exchange
        environ["wsgi.input"] = exchange.body

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            exchange.status = int(status[:3])
            exchange.promised = _promised(environ["REQUEST_METHOD"], headers)
            headers.append(("X-Request-ID", exchange.request_id))
            if not exchange.body.exhausted:
                exchange.close_connection()  # what is left of the body is not the next request
            return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

        try:
            body = self._app(environ, start)
        except BaseException:
            exchange.status = exchange.status or 500
            exchange.finish()
            raise
        file = getattr(body, "filelike", None)
        if isinstance(file, SentFile | SentSegments):
            file.exchange = exchange
            return body
        return SentBody(body, exchange)
