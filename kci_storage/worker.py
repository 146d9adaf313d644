"""gunicorn's threaded worker, with what this server needs of the connection.

It leans on gunicorn's internals, so gunicorn is pinned to a minor version in setup.cfg.

- ``100 Continue`` is sent when the application first reads the body, not before it runs: a refused upload of 4 GiB is
  refused before a byte of it was sent.
- The application can close a connection (its ``Connection`` header is dropped by gunicorn), so that the rest of a
  body that was refused is not taken for the next request.
- A peer that takes or sends nothing for ``send_timeout`` seconds is dropped. The time is that without progress: for
  ``sendall``, whose time-out Python counts over all of its data, the socket's own class sees to that.
- Connections are closed, with the patience that TCP asks for, by a thread of their own: gunicorn's main loop would
  stand still for two seconds for each.
- A connection is accepted only while a thread is free for it, and takes one only when something was sent.
- What is no HTTP is answered and logged like every other error. gunicorn would quote it, and so could show a token.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from gunicorn.http import errors, message
from gunicorn.workers.gthread import TConn, ThreadWorker

from kci_storage import logs
from kci_storage.transport import CONNECTION, SentSegments, new_request_id

# A key of 1,024 characters has up to 12 KiB when percent-encoded; gunicorn would cap its own setting at 8,190.
LONGEST_REQUEST_LINE = 16 * 1024
message.MAX_REQUEST_LINE = LONGEST_REQUEST_LINE

_REFUSALS: dict[type[Exception], tuple[int, str, str]] = {
    errors.LimitRequestLine: (414, "URI Too Long", "the path is too long"),
    errors.LimitRequestHeaders: (431, "Request Header Fields Too Large", "the headers are too long"),
    errors.ExpectationFailed: (417, "Expectation Failed", "the only expectation that can be met is 100-continue"),
    errors.UnsupportedTransferCoding: (501, "Not Implemented", "the only transfer coding is chunked"),
    errors.ParseException: (400, "Bad Request", "this is not HTTP/1.1"),
}

LINGER_SECONDS = 3.0  # for which a client may go on sending after its connection was closed
LINGER_BYTES = 64 * 1024 * 1024  # that it may send in them
DRAIN_SIZE = 256 * 1024  # bytes


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
        """As of any socket; it counts the time-out from the last progress by itself.

        What is no plain file knows how to send itself.
        """
        if isinstance(file, SentSegments):
            return file.send_to(self)
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


class Lingerer:
    """Closes connections without a thread for each, and without the main loop (RFC 9112, 9.6).

    A connection that is closed while the client still sends would be reset, and the client might lose the answer that
    tells it why. So only our side is closed at first, and what still comes is thrown away for a while.
    """

    def __init__(self) -> None:
        self._new: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._open: deque[Lingering] = deque()  # by deadline
        threading.Thread(target=self._run, name="linger", daemon=True).start()

    def close(self, sock: socket.socket) -> None:
        """Take over a connection that has been answered."""
        self._new.put(sock)
        with contextlib.suppress(BlockingIOError):  # it has been woken often enough
            self._wake_writer.send(b"x")

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=1):
                if key.data is None:
                    self._take_new()
                else:
                    self._drain(key.data)
            now = time.monotonic()
            while self._open and (self._open[0].closed or self._open[0].deadline <= now):
                self._end(self._open.popleft())

    def _take_new(self) -> None:
        self._wake_reader.recv(4096)
        with contextlib.suppress(queue.Empty):
            while True:
                self._begin(self._new.get_nowait())

    def _begin(self, sock: socket.socket) -> None:
        lingering = Lingering(sock, time.monotonic() + LINGER_SECONDS)
        try:
            sock.setblocking(False)
            sock.shutdown(socket.SHUT_WR)
            self._selector.register(sock, selectors.EVENT_READ, lingering)
            self._open.append(lingering)
        except OSError:  # the client has closed it already
            sock.close()

    def _drain(self, lingering: Lingering) -> None:
        try:
            data = lingering.sock.recv(DRAIN_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        lingering.drained += len(data)
        if not data or lingering.drained > LINGER_BYTES:
            self._end(lingering)

    def _end(self, lingering: Lingering) -> None:
        if not lingering.closed:
            lingering.closed = True
            self._selector.unregister(lingering.sock)
            lingering.sock.close()


class Lingering:
    """A connection that is half closed."""

    def __init__(self, sock: socket.socket, deadline: float):
        self.sock = sock
        self.deadline = deadline  # on the monotonic clock, in seconds
        self.drained = 0  # bytes
        self.closed = False


class Connection(TConn):
    """A client's connection, which closes gracefully without its caller waiting for that."""

    lingerer: Lingerer

    def close(self, graceful: bool = False) -> None:
        """Close; gracefully: so that the client gets all that was sent to it."""
        if graceful:
            self.lingerer.close(self.sock)
        else:
            super().close()


class Worker(ThreadWorker):
    """The worker class of this server."""

    send_timeout: float = 60  # seconds; set before the workers are forked

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._at_work = threading.local()

    @property
    def worker_connections(self) -> int:
        """So many connections that a thread is free for one more: another worker may have a free one."""
        idle = len(self.keepalived_conns) + len(self.pending_conns)
        return min(idle + self.cfg.threads, self.cfg.worker_connections)

    @worker_connections.setter
    def worker_connections(self, value: int) -> None:
        pass  # gunicorn's own number, which counts connections that wait for a thread

    def init_process(self) -> None:
        """Start what must not be shared with a forked process, then serve."""
        self._lingerer = Lingerer()
        super().init_process()

    def load_wsgi(self) -> None:
        """Load the application, and have each request's environ lead to its connection."""
        super().load_wsgi()
        application: Callable[..., Iterable[bytes]] = self.wsgi

        def with_connection(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ[CONNECTION] = self._at_work.connection
            return application(environ, start_response)

        self.wsgi = with_connection

    def accept(self, listener: Any) -> None:
        """Accept a connection, which costs a thread only once something was sent on it."""
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.nr_conns += 1
        conn = Connection(self.cfg, ProgressSocket(fileno=sock.detach()), address, listener.getsockname())
        conn.lingerer = self._lingerer
        conn.set_timeout()
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request, on a thread of the pool."""
        expects_continue, req._expected_100_continue = req._expected_100_continue, False
        self._at_work.connection = WorkerConnection(req, conn.sock, expects_continue)
        conn.sock.settimeout(self.send_timeout)
        return super().handle_request(req, conn)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what never became a request; the connection is closed then."""
        refusal = next((found for kind, found in _REFUSALS.items() if isinstance(exc, kind)), None)
        if refusal is None:
            super().handle_error(req, client, addr, exc)
            return
        status, title, text = refusal
        request_id, body = new_request_id(), f"{text}\n"
        head = (
            f"HTTP/1.1 {status} {title}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nX-Request-ID: {request_id}\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            client.settimeout(self.send_timeout)
            client.sendall((head + body).encode())
        # The class says enough; the message quotes the client, maybe a header with a token in it.
        logs.log_refusal(addr[0] if addr else "", status, len(body), request_id, f"{text}: {type(exc).__name__}")
