"""gunicorn's threaded worker, with what this server needs of the connection.

It leans on gunicorn's internals, so gunicorn is pinned to a minor version in setup.cfg.

- ``100 Continue`` is sent when the application first reads the body, not before it runs: a refused upload of 4 GiB is
  refused before a byte of it was sent.
- The application can close a connection (its ``Connection`` header is dropped by gunicorn), so that the rest of a
  body that was refused is not taken for the next request.
- A peer that takes or sends nothing for ``send_timeout`` seconds is dropped. The time is that without progress: for
  ``sendall``, whose time-out Python counts over all of its data, the socket's own class sees to that.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gunicorn.http import message
from gunicorn.workers.gthread import ThreadWorker

from kci_storage.transport import CONNECTION

# A key of 1,024 characters has up to 12 KiB when percent-encoded; gunicorn would cap its own setting at 8,190.
LONGEST_REQUEST_LINE = 16 * 1024
message.MAX_REQUEST_LINE = LONGEST_REQUEST_LINE


class ProgressSocket(socket.socket):
    """A socket whose time-out is always for the next bytes, and which then counts as reset by its peer."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As of any socket."""
        with _stalled_is_reset():
            return super().recv(size, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:  # type: ignore[override]
        """As of any socket, but for the time-out."""
        view = memoryview(data)
        with _stalled_is_reset():
            while view:
                view = view[self.send(view, flags) :]

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """As of any socket; it counts the time-out from the last progress by itself."""
        with _stalled_is_reset():
            return super().sendfile(file, offset, count)


@contextlib.contextmanager
def _stalled_is_reset() -> Iterator[None]:
    # gunicorn logs a TimeoutError with a traceback, as an error of ours.
    try:
        yield
    except TimeoutError as exc:
        raise ConnectionResetError(errno.ECONNRESET, "the client stalled") from exc


class WorkerConnection:
    """What the application may do to its connection (:class:`kci_storage.transport.Connection`)."""

    def __init__(self, request: Any, sock: socket.socket, expects_continue: bool):
        self._request = request
        self._sock = sock
        self._expects_continue = expects_continue

    def continue_body(self) -> None:
        """Send 100 Continue if the client waits for it (RFC 9110, 10.1.1)."""
        if self._expects_continue:
            self._expects_continue = False
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def close_afterwards(self) -> None:
        """Say ``Connection: close`` and mean it."""
        self._request.force_close()


class Worker(ThreadWorker):
    """The worker class of this server."""

    send_timeout: float = 60  # seconds; set before the workers are forked

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._at_work = threading.local()

    def load_wsgi(self) -> None:
        """Load the application, and have each request's environ lead to its connection."""
        super().load_wsgi()
        application: Callable[..., Iterable[bytes]] = self.wsgi

        def with_connection(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ[CONNECTION] = self._at_work.connection
            return application(environ, start_response)

        self.wsgi = with_connection

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request, on a thread of the pool."""
        expects_continue, req._expected_100_continue = req._expected_100_continue, False
        self._at_work.connection = WorkerConnection(req, conn.sock, expects_continue)
        conn.sock.settimeout(self.send_timeout)
        return super().handle_request(req, conn)

    def handle(self, conn: Any) -> Any:
        """Serve a connection that has a request, on a thread of the pool."""
        if type(conn.sock) is socket.socket:
            conn.sock = ProgressSocket(fileno=conn.sock.detach())
        return super().handle(conn)
