# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fast loop: one thread that answers the requests of many busy connections in turn.

Most requests are hits, and a hit is a fraction of a millisecond of Python between some short system calls. With a
thread for each client, those threads spend more time on taking the interpreter from one another, after each system
call, than on the requests; and a thread that loses that race several times in a row waits for the interpreter's
switch interval each time. One thread that goes from connection to connection has the interpreter for itself.

No client may wait for another one, though. Code that may block, on a backend, an upload or a client, says so first
(:func:`kci_storage.net.slots.may_block`): the thread then finishes that request alone, and another thread takes the
loop over. A request that blocks without having said so is noticed at the worker's next look but one.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable

from kci_storage import logfmt
from kci_storage.net import slots
from kci_storage.net.connection import Connection
from kci_storage.net.threads import Threads

log = logging.getLogger(__name__)

STAY_SECONDS = 0.05  # a connection stays in the loop for at least this long without a request
LOOK_SECONDS = 0.01  # between two checks whether a request holds up the others
WAIT_SECONDS = 0.02  # for which a thread waits for the next request before it is free for other connections
RETRY_SECONDS = 0.1  # until a loop goes on after an unexpected failure


class FastLoop:
    """The loop: its connections, and the thread that runs it.

    :param size: how many connections there may be.
    :param threads: provide the thread that runs the loop.
    :param answer: answers a connection's request, whose head has come, and sets the connection's ``keep``.
    :param done: called, by any thread, with a connection that neither the loop nor a thread uses any more.
    :param is_stopping: whether the worker stops; then the main loop gets all connections back, and closes them.
    :param started: called, by any thread, when the loop begins to run: :meth:`look` must be called from now on.
    """

    def __init__(
        self,
        size: int,
        threads: Threads,
        answer: Callable[[Connection], None],
        done: Callable[[Connection], object],
        is_stopping: Callable[[], bool],
        started: Callable[[], object],
    ):
        self._size = size
        self._threads = threads
        self._answer = answer
        self._done = done
        self._is_stopping = is_stopping
        self._started = started
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._busy: set[int] = set()  # descriptors of connections that had a request since the last sweep
        self._sweep_at = 0.0  # on the monotonic clock
        self._runner: int | None = None  # the ID of the thread that runs the loop
        self._serving: int | None = None  # the descriptor of the connection whose request it answers
        self._begun = self._seen = 0  # number of requests, until now and until the last look
        self._look_at = 0.0  # on the monotonic clock
        self.is_running = False  # whether a thread answers, or is going to

    @property
    def threads_saved(self) -> int:
        """How many more threads these connections would take without the loop."""
        return len(self._connections) - self.is_running

    # On any thread: one connection

    def serve(self, conn: Connection) -> None:
        """Answer a connection's request, and the next ones for as long as its client sends them without a pause.

        If the last request did not block, the connection joins the loop, which saves a round trip through the main
        loop for each request. Otherwise this thread waits for the next request, while enough threads are free.
        """
        try:
            self._answer(conn)
        except Exception:  # noqa: BLE001  (the thread goes on)
            _log_failure(conn)
            conn.keep = False
        self._go_on(conn)

    def _go_on(self, following: Connection | None) -> None:
        """Answer the next requests of a connection.

        :param following: None: the loop that the caller ran has no connections left.
        """
        conn = following
        try:
            while conn is not None and conn.keep and conn.sock.rest is None and not self._is_stopping():
                if not (slots.may_have_blocked() or conn.has_more) and len(self._connections) < self._size:
                    conn = self._run() if self._join(conn) else None
                elif self._next_has_come(conn):
                    self._answer(conn)
                else:
                    break
        except Exception:  # noqa: BLE001  (the thread goes on)
            _log_failure(conn)
            if conn is not None:
                conn.keep = False
        if conn is not None:
            self._done(conn)

    def _next_has_come(self, conn: Connection) -> bool:
        """Whether the next request has come, and this thread may answer it without the main loop.

        If threads are scarce, it may not: a client that sends one request after the other must not be served before
        connections that wait for a thread.
        """
        if not self._threads.has_plenty:
            return False
        if not conn.has_begun and conn.sock.is_ready(select.POLLIN, WAIT_SECONDS):
            conn.keep = conn.receive()
        return conn.keep and conn.has_begun and conn.has_head

    def _join(self, conn: Connection) -> bool:
        """Add a connection to the loop.

        :returns: whether the caller has to run the loop.
        """
        fd = conn.sock.fileno()
        with self._lock:
            self._epoll.register(fd, select.EPOLLIN)
            self._connections[fd] = conn
            self._busy.add(fd)
            was_running, self.is_running = self.is_running, True
        return not was_running

    # On the thread that runs the loop

    def _run(self) -> Connection | None:
        """Answer requests until no connection is left, or until the calling thread has dropped out.

        :returns: the connection with which it has dropped out, whose request has been answered; None: there is none.
        """
        self._started()
        self._runner = threading.get_ident()
        slots.serve(self)
        try:
            return self._serve_all()
        finally:
            slots.serve(None)

    def _serve_all(self) -> Connection | None:
        while True:
            try:
                for fd, _ in self._epoll.poll(STAY_SECONDS):
                    conn = self._connections.get(fd)
                    if conn is not None and not self._serve(fd, conn):
                        return conn
                if not self._sweep():
                    return None
            except Exception:  # noqa: BLE001  (the thread is for all connections)
                _log_failure(None)
                time.sleep(RETRY_SECONDS)

    def _serve(self, fd: int, conn: Connection) -> bool:
        """Answer a request.

        :returns: False: the calling thread has dropped out with this connection.
        """
        self._begun += 1
        self._serving = fd
        stays = self._stays(conn)
        with self._lock:
            if not self._is_runner():
                return False
            self._serving = None
            self._busy.add(fd)
            if not stays:
                self._remove(fd)
        if not stays:
            self._done(conn)
        return True

    def _stays(self, conn: Connection) -> bool:
        """Receive what has come, and answer the request.

        :returns: whether the connection stays in the loop.
        """
        try:
            conn.keep = conn.receive()
            if not conn.keep or not conn.has_begun:
                return conn.keep
            if not conn.has_head:
                return False
            self._answer(conn)
        except Exception:  # noqa: BLE001  (the thread goes on)
            _log_failure(conn)
            conn.keep = False
        return conn.keep and not conn.has_more and conn.sock.rest is None and not self._is_stopping()

    def _is_runner(self) -> bool:
        return self._runner == threading.get_ident()

    def drop_out(self) -> None:
        """Called by the loop's thread before it may block: it finishes this request alone; another takes over."""
        with self._lock:
            if self._is_runner():
                self._replace_runner()

    def _replace_runner(self) -> None:
        assert self._serving is not None
        self._remove(self._serving)
        self._runner = self._serving = None
        self.is_running = bool(self._connections)
        if self.is_running:
            self._threads.submit(lambda: self._go_on(self._run()))

    def _remove(self, fd: int) -> None:
        del self._connections[fd]
        self._busy.discard(fd)
        self._epoll.unregister(fd)

    def _sweep(self) -> bool:
        """Remove connections without a recent request.

        :returns: False: no connection is left.
        """
        now = time.monotonic()
        if now < self._sweep_at:
            return True
        self._sweep_at = now + STAY_SECONDS
        with self._lock:
            idle = [(fd, conn) for fd, conn in self._connections.items() if fd not in self._busy]
            for fd, _ in idle:
                self._remove(fd)
            self._busy.clear()
            self.is_running = bool(self._connections)
        for _, conn in idle:
            self._done(conn)
        return bool(self.is_running)

    # On the main loop

    def look(self, now: float) -> None:
        """Replace the loop's thread if a request has blocked it. To be called every :data:`LOOK_SECONDS`.

        :param now: seconds on the monotonic clock.
        """
        if not self.is_running or now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        with self._lock:
            if self._serving is not None and self._begun == self._seen:
                self._replace_runner()
            self._seen = self._begun


def _log_failure(conn: Connection | None) -> None:
    request_id = conn.request_id or None if conn is not None else None
    log.exception(logfmt.line(event="fast_loop_failed", request_id=request_id))
