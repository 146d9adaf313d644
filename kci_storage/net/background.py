# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done for a connection without a thread of its own: sending to slow readers, and closing with patience."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from kci_storage import logfmt
from kci_storage.net.client_socket import ClientSocket
from kci_storage.net.mailbox import Mailbox

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks at all of them
LOOKS = 16  # at what a slow reader has taken, in the time for which it may take nothing; at most one in a second
SEND_SIZE = 1024 * 1024  # bytes for one reader before the next one's turn

# Many slow readers are served in batches, which spares a wake-up for each of them.
BATCH_SECONDS = 0.025  # between two batches
QUICK_SECONDS = 4 * BATCH_SECONDS  # none is waited for while a task's socket is ready again so soon

LINGER_SECONDS = 3.0  # for which a client may go on sending after its connection was closed
LINGER_BYTES = 64 * 1024 * 1024  # that it may send in them
DRAIN_SIZE = 256 * 1024  # bytes


class Task(Protocol):
    """Something that goes on whenever its socket is ready."""

    event: int  # of the epoll(7)

    @property
    def sock(self) -> socket.socket:
        """What it waits for."""

    request_id: str  # for the log

    def go_on(self) -> bool:
        """The socket is ready: do what is possible without waiting; whether there is more to do.

        :raises OSError: the connection is broken.
        """

    def look(self, now: float) -> bool:
        """Once a second: whether it may go on.

        :param now: on the monotonic clock, in seconds.
        """

    def end(self, complete: bool) -> None:
        """It is done, or was given up."""


class Background:
    """One thread for the tasks of all connections. It outlives whatever goes wrong in one of them."""

    def __init__(self) -> None:
        self._new: Mailbox[Task] = Mailbox()
        self._epoll = select.epoll()
        self._epoll.register(self._new, select.EPOLLIN)
        self._tasks: dict[int, Task] = {}  # by descriptor
        self._went_on_at: dict[int, float] = {}  # likewise: when each did last, on the monotonic clock
        self._look_at = 0.0  # likewise
        self._quick_at = 0.0  # likewise: when a task was quick, or new
        threading.Thread(target=self._run, name="background", daemon=True).start()

    def add(self, task: Task) -> None:
        """Take over a connection. Any thread may call this."""
        self._new.put(task)

    def _run(self) -> None:
        while True:
            try:
                self._turn()
            except Exception:
                log.exception("event=background_failed")
                time.sleep(LOOK_SECONDS)  # it may fail again at once

    def _turn(self) -> None:
        ready = self._epoll.poll(LOOK_SECONDS)
        now = time.monotonic()
        for fd, _ in ready:
            task = self._tasks.get(fd)
            if task is not None:  # else it is the mailbox, or the task has ended
                self._note_pace(fd, now)
                self._go_on(fd, task)
        for task in self._new.take():
            self._quick_at = now
            self._begin(task, now)
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look(now)
        if self._tasks and now - self._quick_at > QUICK_SECONDS:
            time.sleep(BATCH_SECONDS)

    def _note_pace(self, fd: int, now: float) -> None:
        if now - self._went_on_at[fd] < QUICK_SECONDS:
            self._quick_at = now
        self._went_on_at[fd] = now

    def _begin(self, task: Task, now: float) -> None:
        fd = task.sock.fileno()
        if (closed := self._tasks.get(fd)) is not None:  # by somebody else, and the number has been given away again
            self._end(fd, closed, complete=False)
        try:
            self._epoll.register(fd, task.event)
        except (OSError, ValueError):  # closed meanwhile, or the system has no means for it
            self._finish(task, complete=False)
            return
        self._tasks[fd], self._went_on_at[fd] = task, now
        self._go_on(fd, task)

    def _go_on(self, fd: int, task: Task) -> None:
        goes_on = self._attempt(task, task.go_on)
        if not goes_on:
            self._end(fd, task, complete=goes_on is not None)

    def _look(self, now: float) -> None:
        for fd, task in tuple(self._tasks.items()):
            if not self._attempt(task, partial(task.look, now)):
                self._end(fd, task, complete=False)

    def _attempt(self, task: Task, step: Callable[[], bool]) -> bool | None:
        """What a step of a task says; None: the connection is broken, or the step failed."""
        try:
            return step()
        except OSError:
            return None
        except Exception:
            log.exception(logfmt.line(event="background_failed", request_id=task.request_id or None))
            return None

    def _end(self, fd: int, task: Task, complete: bool) -> None:
        del self._tasks[fd], self._went_on_at[fd]
        with contextlib.suppress(ValueError, OSError):
            self._epoll.unregister(fd)
        self._finish(task, complete)

    def _finish(self, task: Task, complete: bool) -> None:
        try:
            task.end(complete)
        except Exception:
            log.exception(logfmt.line(event="background_failed", request_id=task.request_id or None))


class Lingering:
    """Closes a connection so that the client gets what was sent to it (RFC 9112, 9.6).

    If it were closed while the client still sends, it would be reset, and the client might lose the answer that tells
    it why. So only our side is closed at first, and what still comes is thrown away for a while.

    :param closed: called by the background's thread at the end.
    :raises OSError: the client has closed the connection already.
    """

    event = select.EPOLLIN
    request_id = ""  # the request is over

    def __init__(self, sock: socket.socket, closed: Callable[[], None]):
        self.sock = sock
        self._closed = closed
        self._deadline = time.monotonic() + LINGER_SECONDS
        self._drained = 0  # bytes
        sock.setblocking(False)
        sock.shutdown(socket.SHUT_WR)

    def go_on(self) -> bool:
        try:
            data = socket.socket.recv(self.sock, DRAIN_SIZE)
        except BlockingIOError:
            return True
        self._drained += len(data)
        return bool(data) and self._drained <= LINGER_BYTES

    def look(self, now: float) -> bool:
        return now < self._deadline

    def end(self, complete: bool) -> None:
        try:
            self.sock.close()
        finally:
            self._closed()


class Sending:
    """Sends what is left of a file to a reader that is slower than the file.

    :param patience: seconds for which the reader may take nothing.
    :param request_id: of the request that is answered so.
    :param done: called with whether all was sent, by the background's thread.
    """

    event = select.EPOLLOUT

    def __init__(self, sock: ClientSocket, patience: float, request_id: str, done: Callable[[bool], None]):
        assert sock.rest is not None
        self.sock = sock
        self.request_id = request_id
        self._rest = sock.rest
        self._patience = patience
        self._done = done
        self._fetched = 0  # where the part of the file ends that the system was asked to fetch
        self._look_at = 0.0  # on the monotonic clock
        sock.begin_waiting()

    def go_on(self) -> bool:
        if self.sock.send_rest(SEND_SIZE):
            return False
        if self._rest.position + SEND_SIZE > self._fetched:
            self._fetch()
        return True

    def _fetch(self) -> None:
        """Have the system read what comes next, so that no call has to wait for the disk."""
        start, self._fetched = self._rest.position, self._rest.position + 2 * SEND_SIZE
        os.posix_fadvise(self._rest.fd, start, self._fetched - start, os.POSIX_FADV_WILLNEED)

    def look(self, now: float) -> bool:
        if now < self._look_at:
            return True
        self._look_at = now + self._patience / LOOKS
        return self.sock.look() < self._patience

    def end(self, complete: bool) -> None:
        self.sock.rest = None
        try:
            self._rest.close()
        finally:
            self._done(complete)
