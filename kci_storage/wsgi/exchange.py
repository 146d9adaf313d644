# SPDX-License-Identifier: LGPL-2.1-or-later
"""The border between gunicorn and the application: what was really read and sent.

One :class:`Exchange` accompanies each request. Its body tells a client that went away from one that was done; its end
is when the response's last byte has been handed to the kernel, or the client is gone, and only then is the request
logged and counted. WSGI hooks of a framework run before the body is sent, and not at all for ``sendfile``.
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
CONNECTION = "kci_storage.connection"  # the environ's key for what the worker lets us do to the connection
FIRST_READ_SIZE = 1024  # bytes of a chunked body; gunicorn waits for all, and these say what may be refused
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


class ClientConnection(Protocol):
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
        self.request_id = environ[REQUEST_ID] = request_id_from(environ.get("HTTP_X_REQUEST_ID"))
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

    def answer(self, problem: problems.Problem) -> problems.Answer:
        """What this request is answered when something is wrong."""
        environ = self.environ
        return problems.answer(problem, self.request_id, environ.get("HTTP_ACCEPT"), environ["PATH_INFO"])

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
        connection: ClientConnection | None = self.environ.get(CONNECTION)
        if connection is not None:
            connection.close_afterwards()


def request_id_from(incoming: str | None) -> str:
    """The ID that a request has brought along, if it is sane; else a new one.

    :param incoming: the request's ``X-Request-ID``.
    """
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
        self._connection: ClientConnection | None = environ.get(CONNECTION)
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
        if self.length is not None:  # a server may wait for more than that (PEP 3333)
            left = self.length - self.received
            size = left if size < 0 else min(size, left)
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
    except Exception as exc:  # a reset, a time-out, a broken chunk: gunicorn has a class for each
        raise ClientDisconnected("the body could not be read to its end", detail=repr(exc)) from exc


class SentBody:
    """Any other response body, counted as it goes out."""

    def __init__(self, body: Iterable[bytes], exchange: Exchange):
        self._body = body
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        without_body = self._exchange.environ["REQUEST_METHOD"] == "HEAD"
        with cut_short(self._exchange):
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
            slots.refuse_no_longer()
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
