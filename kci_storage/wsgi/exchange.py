# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exchange: one request and its response, as they were really read from and written to the connection.

The server cannot rely on a framework's hooks, which run before the body is sent, and not at all for ``sendfile``. So
each request has an :class:`Exchange`. Its body raises when the client disconnects before the body's end. It finishes
when the kernel has taken the response's last byte or the client is gone; only then is the request logged and counted.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from kci_storage.errors import ClientDisconnected, StorageError, meaning
from kci_storage.http import problems
from kci_storage.net import slots
from kci_storage.net.bodies import SentFile, SentSegments, cut_short

EXCHANGE = "kci_storage.exchange"  # the environ's key for it
REQUEST_ID = "kci_storage.request_id"  # the environ's key for the request's ID, also when the exchange is over
CONNECTION = "kci_storage.connection"  # the environ's key for the worker's ClientConnection
FIRST_READ_SIZE = 1024  # bytes of a chunked body: gunicorn waits for all of them, and they may be enough to refuse it
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


class ClientConnection(Protocol):
    """The operations on a connection that the worker offers to the application."""

    def continue_body(self) -> None:
        """Send 100 Continue if the client waits for it."""

    def receive_into(self, buffer: memoryview) -> int:
        """Put the next bytes of the body at the beginning of ``buffer``.

        :returns: how many bytes; 0: the body has ended.
        """

    def close_afterwards(self) -> None:
        """Send ``Connection: close``, and close the connection after this response."""


class Exchange:
    """A request and its response, as they went over the wire.

    :param environ: the request's WSGI environment.
    :param finished: called once, with the exchange, when the response has been sent or never will be.
    """

    def __init__(self, environ: Environ, finished: Callable[[Exchange], None]):
        self.environ = environ
        self.started = time.time()
        self.begun = time.monotonic()  # in seconds
        self.request_id = environ[REQUEST_ID] = request_id_from(environ.get("HTTP_X_REQUEST_ID"))
        self.body = RequestBody(environ)
        self.status = 0
        self.announced = 0  # body bytes, by Content-Length
        self.sent = 0  # body bytes
        self.duration = 0.0  # seconds, once it has finished
        self.route: str | None = None  # which view answered
        self.user: str | None = None  # the token's email
        self.cache: str | None = None  # the value of X-Cache
        self.error: str | None = None  # for the log alone
        self.count: Callable[[], Callable[[], None]] | None = None  # counts the request; returns how to undo that
        self._uncount: Callable[[], None] | None = None
        self._finished: Callable[[Exchange], None] | None = finished

    def count_as_running(self) -> None:
        """This request will take a while: count it once against the client's limit, if there is one.

        :raises Refused: the client has as many running requests as it may have.
        """
        if self.count is not None:
            count, self.count = self.count, None
            self._uncount = count()

    def failed(self, error: StorageError) -> None:
        """Note the error for the request's line in the log."""
        self.error = f"{meaning(error).label}: {error.detail or error.message}"

    def answer(self, problem: problems.Problem) -> problems.Answer:
        """The error response to this request."""
        environ = self.environ
        return problems.answer(problem, self.request_id, environ.get("HTTP_ACCEPT"), environ["PATH_INFO"])

    def finish(self) -> None:
        """The response has been sent, or never will be. Idempotent."""
        if self._finished is not None:
            finished, self._finished = self._finished, None
            if self._uncount is not None:
                self._uncount()
            self.duration = time.monotonic() - self.begun
            if self.sent < self.announced:
                self.close_connection()  # else the client would take the next response for the rest of this one
            finished(self)
            self.environ.pop(EXCHANGE, None)  # breaks a reference cycle

    def close_connection(self) -> None:
        """Have the connection closed after this response."""
        connection: ClientConnection | None = self.environ.get(CONNECTION)
        if connection is not None:
            connection.close_afterwards()


def request_id_from(incoming: str | None) -> str:
    """The request ID that the client has sent, if it is valid; else a new one.

    :param incoming: the request's ``X-Request-ID``.
    """
    return incoming if incoming and VALID_REQUEST_ID.fullmatch(incoming) else new_request_id()


def new_request_id() -> str:
    """A new request ID: 128 random bits, in hex."""
    return f"{random.getrandbits(128):032x}"  # it only has to be unique, not secret


class RequestBody(io.RawIOBase):
    """The request's body, which raises if it ends too early.

    gunicorn reports a disconnected client as an ordinary end of the body; only the body's length tells the two apart.
    """

    def __init__(self, environ: Environ):
        super().__init__()
        self._input = environ.get("wsgi.input")
        self._connection: ClientConnection | None = environ.get(CONNECTION)
        self.chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
        self.length = None if self.chunked else int(environ.get("CONTENT_LENGTH") or 0)  # bytes
        self.received = 0  # bytes
        self._at_end = self.length == 0

    @property
    def exhausted(self) -> bool:
        """Whether the whole body has been read from the connection."""
        return self._at_end

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most ``size`` (-1: all); empty at the end.

        :raises ClientDisconnected: the client disconnected, stalled, or broke the chunked encoding.
        """
        if self._at_end:
            return b""
        self._continue()
        assert self._input is not None
        if self.length is not None:  # else another server may wait for bytes that never come (PEP 3333)
            left = self.length - self.received
            size = left if size < 0 else min(size, left)
        with _lost_client():
            data: bytes = self._input.read() if size < 0 else self._input.read(size)
        self._count(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        """Put the next bytes, as many as have come, at the beginning of ``buffer``.

        :returns: how many bytes; 0: the body has ended.
        :raises ClientDisconnected: as :meth:`read` does.
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
        if self.received == 0:
            slots.refuse_no_longer()
            if self._connection is not None:
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
    except Exception as exc:  # a reset, a timeout or a broken chunk: gunicorn has a class for each
        raise ClientDisconnected("the body could not be read to its end", detail=repr(exc)) from exc


class SentBody:
    """A response body of bytes, counted as it is sent."""

    def __init__(self, body: Iterable[bytes], exchange: Exchange):
        self._body = body
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        without_body = self._exchange.environ["REQUEST_METHOD"] == "HEAD"
        with cut_short(self._exchange):
            for data in self._body:
                yield data  # counted when the server asks for the next piece: then this one has been sent
                if not without_body:
                    self._exchange.sent += len(data)

    def close(self) -> None:
        """The server calls this at the end, also after an error (PEP 3333)."""
        try:
            if hasattr(self._body, "close"):
                self._body.close()
        finally:
            self._exchange.finish()


def is_content_length(name: str) -> bool:
    """Whether a header's name is ``Content-Length``, in any case.

    >>> is_content_length("content-length"), is_content_length("ETag")
    (True, False)
    """
    return name == "Content-Length" or (len(name) == len("Content-Length") and name.lower() == "content-length")


def _announced(method: str, headers: list[tuple[str, str]]) -> int:
    """How many bytes of body a response announces."""
    if method != "HEAD":
        for name, value in reversed(headers):  # most of our responses have it last
            if is_content_length(name):
                return int(value)
    return 0


class Transport:
    """WSGI middleware that gives each request its :class:`Exchange`.

    :param finished: called with the exchange when it has finished.
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
            slots.refuse_no_longer()
            exchange.status = int(status[:3])
            exchange.announced = _announced(environ["REQUEST_METHOD"], headers)
            headers.append(("X-Request-ID", exchange.request_id))
            if not exchange.body.exhausted:
                exchange.close_connection()  # the rest of the body must not be read as the next request
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
