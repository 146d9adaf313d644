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

import select
import threading
import time
from collections.abc import Callable

from kci_storage.net import slots
from kci_storage.net.connection import Connection

STAY_SECONDS = 0.05  # for which a connection stays without a request, at least
LOOK_SECONDS = 0.01  # between two looks at whether a request holds up the others


class Lane:
    """The connections, and who runs it.

    :param size: how many connections there may be.
    :param answer: answers the request of which something has come on a connection; sets its ``keep``, and returns
        whether it may stay.
    :param left: called with a connection that goes, when there is no request of it.
    :param run: called when somebody has to call :meth:`run`.
    """

    def __init__(
        self,
        size: int,
        answer: Callable[[Connection], bool],
        left: Callable[[Connection], object],
        run: Callable[[], object],
    ):
        self._size = size
        self._answer = answer
        self._left = left
        self._run = run
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._busy: set[int] = set()  # descriptors of those that had a request since the last sweep
        self._sweep_at = 0.0  # on the monotonic clock
        self._runner: int | None = None  # the thread
        self._serving: int | None = None  # the descriptor of the connection whose request it answers
        self._begun = self._seen = 0  # requests, until now and until the last look
        self.is_running = False  # whether somebody answers, or is going to

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def has_room(self) -> bool:
        """Whether there may be one more connection."""
        return len(self._connections) < self._size

    def join(self, conn: Connection) -> bool:
        """Have a connection's next requests answered here; whether the caller has to call :meth:`run` for that."""
        fd = conn.sock.fileno()
        with self._lock:
            self._connections[fd] = conn
            self._busy.add(fd)
            self._epoll.register(fd, select.EPOLLIN)
            was_running, self.is_running = self.is_running, True
        return not was_running

    def run(self) -> Connection | None:
        """Answer requests until nobody is here any more, or until the caller has been left alone with a connection.

        That one's request has been answered then, too.
        """
        self._runner = threading.get_ident()
        slots.serve(self)
        try:
            return self._serve_all()
        finally:
            slots.serve(None)

    def _serve_all(self) -> Connection | None:
        while True:
            for fd, _ in self._epoll.poll(STAY_SECONDS):
                conn = self._connections.get(fd)
                if conn is not None and not self._serve(fd, conn):
                    return conn
            if not self._sweep():
                return None

    def _serve(self, fd: int, conn: Connection) -> bool:
        """Answer a request; False: the caller has been left alone with it."""
        self._begun += 1
        self._serving = fd
        stays = self._answer(conn)
        with self._lock:
            if not self._is_runner():
                return False
            self._serving = None
            self._busy.add(fd)
            if not stays:
                self._remove(fd)
        if not stays:
            self._left(conn)
        return True

    def _is_runner(self) -> bool:
        return self._runner == threading.get_ident()

    def drop_out(self) -> None:
        """Called by the loop's thread before it may block: it finishes this request alone; another takes over."""
        with self._lock:
            if self._is_runner():
                self._leave()

    def look(self) -> None:
        """To be called every ``LOOK_SECONDS`` while the lane runs: nobody holds up the others for much longer."""
        with self._lock:
            if self._serving is not None and self._begun == self._seen:
                self._leave()
            self._seen = self._begun

    def _leave(self) -> None:
        assert self._serving is not None
        self._remove(self._serving)
        self._runner = self._serving = None
        self.is_running = bool(self._connections)
        if self.is_running:
            self._run()

    def _remove(self, fd: int) -> None:
        del self._connections[fd]
        self._busy.discard(fd)
        self._epoll.unregister(fd)

    def _sweep(self) -> bool:
        """Have those go who have had no request for a while; False: nobody is here any more."""
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
            self._left(conn)
        return bool(self.is_running)
