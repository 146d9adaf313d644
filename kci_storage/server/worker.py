"""gunicorn's threaded worker, with what this server needs of the connection.

It leans on gunicorn's internals, so gunicorn is pinned to a minor version in setup.cfg.

- ``100 Continue`` is sent when the application first reads the body, not before it runs: a refused upload of 4 GiB is
  refused before a byte of it was sent.
- The application can close a connection (its ``Connection`` header is dropped by gunicorn), so that the rest of a
  body that was refused is not taken for the next request.
- A connection costs a thread only while something is done for it. Its request's head is collected by the main loop
  (:class:`~kci_storage.net.connection.Connection`), the end of a file goes to a slow reader from the background
  (:class:`~kci_storage.net.background.Sending`), connections are closed there too, and a thread that has to wait for
  a slow client lends its place to another one (:class:`~kci_storage.net.threads.Pool`).
- Clients who ask again at once share a thread (:class:`~kci_storage.net.fast_loop.Lane`).
- A client that stands still for ``send_timeout`` seconds is dropped. One that is slow is served, unless there
  are too many of them (:class:`~kci_storage.net.client_socket.Pace`).
- A connection is accepted only while a thread is free for it: another worker may have a free one.
- What is no HTTP is answered and logged like every other error. gunicorn would quote it, and so could show a token.
"""

from __future__ import annotations

import contextlib
import select
import selectors
import signal
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from gunicorn.errors import AppImportError, HaltServer
from gunicorn.http import errors, message, wsgi
from gunicorn.http.body import LengthReader
from gunicorn.workers.gthread import PollableMethodQueue, ThreadWorker

from kci_storage.config.settings import ConfigError
from kci_storage.monitoring import logs
from kci_storage.net import slots
from kci_storage.net.background import Background, Sending
from kci_storage.net.client_socket import ClientSocket
from kci_storage.net.connection import Connection, Waiting, WorkerConnection
from kci_storage.net.fast_loop import LOOK_SECONDS, Lane
from kci_storage.net.threads import Pool
from kci_storage.net.tls import TlsSocket
from kci_storage.server.response import Response
from kci_storage.wsgi.exchange import CONNECTION, new_request_id

# A key of 1,024 characters has up to 12 KiB when percent-encoded; gunicorn would cap its own setting at 8,190.
LONGEST_REQUEST_LINE = 16 * 1024
message.MAX_REQUEST_LINE = LONGEST_REQUEST_LINE

_STATUSES: dict[type[Exception], int] = {
    errors.LimitRequestLine: 414,
    errors.LimitRequestHeaders: 431,
    errors.ExpectationFailed: 417,
    errors.UnsupportedTransferCoding: 501,
    errors.ParseException: 400,
}
_REFUSALS = {
    400: ("Bad Request", "this is not HTTP/1.1"),
    408: ("Request Timeout", "the request's head took too long"),
    414: ("URI Too Long", "the path is too long"),
    417: ("Expectation Failed", "the only expectation that can be met is 100-continue"),
    431: ("Request Header Fields Too Large", "the headers are too long"),
    501: ("Not Implemented", "the only transfer coding is chunked"),
}

HEAD_SECONDS = 10.0  # from a request's first byte until its head must be there
STAY_SECONDS = 0.02  # for which a thread waits for the next request before it is free for other connections
LONGEST_HEAD = 64 * 1024  # bytes
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT)


class Worker(ThreadWorker):
    """The worker class of this server."""

    send_timeout: float = 60  # seconds; set before the workers are forked
    number: int  # the master's, which no other worker has that lives
    tls: ssl.SSLContext | None = None  # for connections from now on; set by the master, and when that is reloaded

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.method_queue = _MethodQueue()
        self._idle = Waiting(self.cfg.keepalive)  # nothing of a request has come
        self._heads = Waiting(min(HEAD_SECONDS, self.send_timeout))  # a part of its head has come
        self._ready: deque[Connection] = deque()  # a request's head is there, and no thread has it yet
        self._sending: set[Connection] = set()  # the rest of a response goes out in the background
        self._shed_at = self._look_at = 0.0  # on the monotonic clock

    # The main loop: connections that need no thread

    @property
    def worker_connections(self) -> int:
        """So many connections that a thread is free for one more: another worker may have a free one."""
        return self.nr_conns + 1 if self._has_free_thread() and self._has_room() else 0

    @worker_connections.setter
    def worker_connections(self, value: int) -> None:
        pass  # gunicorn's own number, which counts connections that wait for a thread

    def _has_free_thread(self) -> bool:
        """Whether fewer requests are at work, or wait for a thread, than may be at work."""
        without_thread = len(self._idle) + len(self._heads) + len(self._ready) + len(self._sending) + self.tpool.lent
        in_lane = len(self._lane) - self._lane.is_running  # they share one thread
        return self.nr_conns - without_thread - in_lane < self.tpool.size

    def _has_room(self) -> bool:
        """Whether there may be one more connection, if need be in the place of one that waits."""
        return bool(self.nr_conns < self.cfg.worker_connections or self._idle or self._heads)

    def init_process(self) -> None:
        """Start what must not be shared with a forked process, then serve."""
        self.cfg = _Settings(self.cfg)
        self._background = Background()
        left = partial(self.method_queue.defer, self._answered)
        self._lane = Lane(self.cfg.worker_connections // 2, self._answer_in_turn, left, self._have_lane_run)
        super().init_process()

    def load_wsgi(self) -> None:
        """Make the application.

        :raises AppImportError: that cannot be, by the configuration; gunicorn prints the line and ends the server.
        """
        try:
            super().load_wsgi()
        except ConfigError as exc:
            raise AppImportError(f"kci-storage: {exc}") from exc

    def init_signals(self) -> None:
        """From now on the worker heeds signals; those that came since the fork are delivered here."""
        super().init_signals()
        release_signals()

    def get_thread_pool(self) -> Pool:
        """The threads."""
        return Pool(self.cfg.threads, changed=lambda: self.method_queue.defer(_nothing))

    def accept(self, listener: Any) -> bool:
        """Accept a connection, which costs a thread only once a request's head has come; whether there was one."""
        try:
            sock, address = listener.accept()
        except ConnectionAbortedError:
            return True
        except BlockingIOError:
            return False
        self.nr_conns += 1
        if self.nr_conns > self.cfg.worker_connections and (waiting := self._idle or self._heads):
            self._drop(waiting.oldest())
        sock = self._client_socket(sock)
        self._await_request(Connection(self.cfg, sock, address, listener.getsockname(), self._background))
        return True

    def _client_socket(self, sock: socket.socket) -> ClientSocket:
        if self.tls is None:
            return ClientSocket(sock, self.send_timeout, self.tpool)
        return TlsSocket(self.tls, sock, self.send_timeout, self.tpool)

    def _await_request(self, conn: Connection) -> None:
        """Have the next request collected, of which there may be something."""
        if conn.sock.has_more:
            conn.receive()
        if conn.has_begun and conn.has_head:
            self._ready.append(conn)
            return
        (self._heads if conn.has_begun else self._idle).add(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._collect, conn))

    def _collect(self, conn: Connection, _: Any) -> None:
        """Something has come on a connection that waits."""
        if conn not in self._idle and conn not in self._heads:
            return  # it was dropped while the event was on its way
        if not conn.receive():
            self._drop_or_explain(conn)
        elif conn.has_head:
            self._stop_waiting(conn)
            self._ready.append(conn)
        elif len(conn.head) > LONGEST_HEAD:
            self._refuse(conn, 431)
        elif conn in self._idle and conn.has_begun:
            self._idle.remove(conn)
            self._heads.add(conn)
        elif conn in self._heads and not conn.has_begun:  # it has shaken hands, and may take its time now
            self._heads.remove(conn)
            self._idle.add(conn)

    def _drop_or_explain(self, conn: Connection) -> None:
        if conn.sock.speaks_plain:
            self._refuse(conn, 400, "this port speaks HTTPS")
        else:
            self._drop(conn)

    def _stop_waiting(self, conn: Connection) -> None:
        self.poller.unregister(conn.sock)
        self._idle.remove(conn)
        self._heads.remove(conn)

    def _drop(self, conn: Connection) -> None:
        """Close a connection that waits."""
        self._stop_waiting(conn)
        self.nr_conns -= 1
        conn.close()

    def _refuse(self, conn: Connection, status: int, text: str = "") -> None:
        """Answer a request whose head is not all there, and close."""
        self._stop_waiting(conn)
        answer = refusal(status, conn.client, text=text)
        with contextlib.suppress(OSError):  # also if there is no room: the main loop waits for nobody
            conn.sock.answer_now(answer)
        self.nr_conns -= 1
        conn.close(graceful=True)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """As gunicorn's; then those requests get a thread for which there was one before.

        The others wait here, and not for a thread: each time that one is free, a new client is let in first.
        A worker that stops does not keep its clients longer than it has to.
        """
        free = self._has_free_thread()
        if free and self._ready:
            timeout = 0.0
        elif not self.alive and self._idle:
            timeout = max(0.0, min(timeout, self._idle.oldest().timeout - time.monotonic()))
        if self._lane.is_running:
            timeout = min(timeout, LOOK_SECONDS)
        super().wait_for_and_dispatch_events(timeout)
        while free and self._ready:
            self.enqueue_req(self._ready.popleft())
            free = self._has_free_thread()
        self._look_at_lane()

    def _look_at_lane(self) -> None:
        if self._lane.is_running and (now := time.monotonic()) >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._lane.look()

    def murder_keepalived(self, force: bool = False) -> None:
        """Close those that have been waited for in vain."""
        now = float("inf") if force else time.monotonic()
        for conn in self._idle.expired(now):
            self._drop(conn)
        for conn in self._heads.expired(now):
            self._refuse(conn, 408)

    def murder_pending(self) -> None:
        """Drop those who are too slow, if there are too many of them."""
        now = time.monotonic()
        full = self.tpool.is_crowded or not self._has_room()
        if full and now >= self._shed_at:
            self._shed_at = now + 1
            for sock in (*self.tpool.waited_for(), *(conn.sock for conn in self._sending)):
                if sock.is_behind():
                    sock.give_up()

    def _cap_keepalive(self, deadline: float) -> None:
        """The worker stops: who has come is served, who comes is not left waiting for as long as that takes.

        A port that nobody holds open any more refuses them, and a balancer asks another server at once.
        """
        for listener in self.sockets:
            while self.accept(listener):
                pass
            listener.close()
        self._idle.shorten(deadline - time.monotonic())

    # Requests, on threads

    def enqueue_req(self, conn: Connection) -> None:
        """Have a thread answer the request."""
        self.tpool.submit(partial(self._answer, conn))

    def _answer(self, conn: Connection) -> None:
        self._handle(conn)
        self._go_on(conn)

    def _handle(self, conn: Connection) -> None:
        """Answer the request that is there; then, the connection's ``keep`` says whether there may be a next one."""
        conn.keep = False
        slots.begin_request()
        try:
            conn.keep = self.handle(conn)
        except BaseException:  # the thread goes on, and the connection must not be forgotten
            self.log.exception("Error handling request")

    def _go_on(self, conn: Connection | None) -> None:
        """What a thread does when it has answered a connection's request.

        A client in a hurry sends the next one as soon as it has the answer. If the last one was as quick, the lane
        spares it the way over the main loop; else this thread waits for it, while there are threads enough.

        :param conn: None: the requests were those of the lane, and there are no more.
        """
        while conn is not None and conn.keep and self.alive and conn.sock.rest is None:
            conn.take_unread()
            if not (slots.may_have_blocked() or conn.has_more) and self._lane.has_room:
                conn = self._run_lane() if self._lane.join(conn) else None
            elif self._next_has_come(conn):
                self._handle(conn)
            else:
                break
        if conn is not None:
            self.method_queue.defer(self._answered, conn)

    def _run_lane(self) -> Connection | None:
        self.method_queue.defer(_nothing)  # the main loop is to look from now on
        return self._lane.run()

    def _have_lane_run(self) -> None:
        self.tpool.submit(lambda: self._go_on(self._run_lane()))

    def _answer_in_turn(self, conn: Connection) -> bool:
        """In the lane: something has come; whether the connection may stay there."""
        conn.keep = conn.receive()
        if not conn.keep or not conn.has_begun:
            return conn.keep
        if not conn.has_head:
            return False
        self._handle(conn)
        conn.take_unread()
        return conn.keep and self.alive and not conn.has_more

    def _next_has_come(self, conn: Connection) -> bool:
        """Whether this thread may as well answer the next request, which spares the way over the main loop.

        Else those come first who have waited for a thread, and not who sends one request after the other.
        """
        if not self.tpool.has_plenty:
            return False
        if not conn.has_begun and conn.sock.is_ready(select.POLLIN, STAY_SECONDS):
            conn.keep = conn.receive()
        return conn.keep and conn.has_begun and conn.has_head

    def _answered(self, conn: Connection) -> None:
        """On the main loop: a request's thread is done with it."""
        if conn.sock.rest is not None:
            self._sending.add(conn)
            done = partial(self.method_queue.defer, self._sent, conn)
            self._background.add(Sending(conn.sock, self.send_timeout, done))
        elif conn.keep:
            conn.take_unread()
            self._await_request(conn)
        else:
            self.nr_conns -= 1
            conn.close(graceful=True)

    def _sent(self, conn: Connection, complete: bool) -> None:
        """On the main loop: the rest of a response has gone out, or never will."""
        self._sending.discard(conn)
        conn.keep = conn.keep and complete
        self._answered(conn)

    def handle_request(self, req: Any, conn: Any) -> bool:
        """Answer a request, on a thread of the pool; whether there may be another one on the connection.

        As gunicorn's, but with our response, and without hooks and log lines that nobody here wants.
        """
        connection = WorkerConnection(req, conn.sock, req._expected_100_continue)
        req._expected_100_continue = False
        response, environ = conn.environs.make(req, conn, Response)
        environ[CONNECTION] = connection
        if conn.sock.is_secure:
            environ["wsgi.url_scheme"] = "https"
        if not self.alive or not self.cfg.keepalive:
            response.force_close()
        try:
            self._respond(response, self.wsgi(environ, response.start_response))
        except OSError:
            raise
        except Exception:
            if response.headers_sent:
                self.log.exception("Error handling request")
                return False  # too late for an error's status
            raise
        return not response.should_close()

    @staticmethod
    def _respond(response: Response, body: Any) -> None:
        try:
            if isinstance(body, wsgi.FileWrapper):
                response.write_file(body)
            else:
                for data in body:
                    response.write(data)
            response.close()
        finally:
            if hasattr(body, "close"):
                body.close()

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        """Whether the connection can be reused; gunicorn would look for the rest of a body that there was none of."""
        body = conn.parser.mesg.body.reader
        if keepalive and isinstance(body, LengthReader) and body.length == 0:
            conn.parser.mesg = None  # nor is it looked for before the next request
            return True
        return bool(super()._keepalive_after(conn, keepalive))

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what never became a request; the connection is closed then."""
        status = next((found for kind, found in _STATUSES.items() if isinstance(exc, kind)), None)
        if status is None:
            super().handle_error(req, client, addr, exc)
            return
        with contextlib.suppress(OSError):
            # The class says enough; the message quotes the client, maybe a header with a token in it.
            client.sendall(refusal(status, addr, type(exc).__name__))


class _Settings:
    """gunicorn's settings, of which it looks up many for each request. In a worker they do not change any more."""

    def __init__(self, settings: Any):
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(self._settings, name)
        return value


class _MethodQueue(PollableMethodQueue):
    """What threads want to be done by the main loop, and how they wake it.

    It stays open at the end of the loop: threads whose requests were given up may yet call, and would write into
    whatever file has got the pipe's number by then.
    """

    def close(self) -> None:
        """Nothing; the process ends."""


def refusal(status: int, address: Any, reason: str = "IncompleteHead", text: str = "") -> bytes:
    """The answer to what never became a request; it is logged.

    :param address: the client's, as of ``accept``.
    :param reason: for the log: the class of what is wrong.
    :param text: what the answer says; empty: what is usual for the status.
    """
    title, usual = _REFUSALS[status]
    text = text or usual
    request_id, body = new_request_id(), f"{text}\n"
    head = (
        f"HTTP/1.1 {status} {title}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nX-Request-ID: {request_id}\r\n\r\n"
    )
    logs.log_refusal(address[0] if address else "", status, len(body), request_id, f"{text}: {reason}")
    return (head + body).encode()


def hold_signals() -> None:
    """Have what ends a process wait; a process that is forked now has that wait, too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def release_signals() -> None:
    """Deliver what has waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def stop_workers(stop: Callable[[bool], None], graceful: bool = True) -> None:
    """Stop the workers, as gunicorn does; the server may be ending because one of them could not start.

    Then most often the next one could not either, and gunicorn, which reaps it here, would end with a traceback.
    """
    while True:
        with contextlib.suppress(HaltServer):
            return stop(graceful)


def _nothing() -> None:
    """Only to wake the main loop."""
