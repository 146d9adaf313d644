# SPDX-License-Identifier: LGPL-2.1-or-later
"""The background sender: one thread that sends to all slow readers, and closes connections gracefully."""

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

LOOK_SECONDS = 1.0  # between two looks at all tasks
LOOKS = 16  # at a slow reader's progress, in the time for which it may make none; at most one per LOOK_SECONDS
SEND_SIZE = 1024 * 1024  # bytes for one reader before the next one's turn

# Many slow readers are served in batches, which saves a wake-up for each of them.
BATCH_SECONDS = 0.025  # between two batches
QUICK_SECONDS = 4 * BATCH_SECONDS  # there is no such pause while a task's socket becomes ready again within this time

LINGER_SECONDS = 3.0  # for which a client may go on sending after our side of its connection was closed
LINGER_BYTES = 64 * 1024 * 1024  # that it may send in that time
DRAIN_SIZE = 256 * 1024  # bytes that are received at a time, and dropped


class Task(Protocol):
    """Work on a connection, a step of which is possible whenever its socket is ready."""

    event: int  # of epoll(7), for which the task waits

    @property
    def sock(self) -> socket.socket:
        """The connection's socket."""

    request_id: str  # for the log; empty: the request is over

    def go_on(self) -> bool:
        """Called when the socket is ready: do what is possible without blocking.

        :returns: whether there is more to do.
        :raises OSError: the connection is broken.
        """

    def look(self, now: float) -> bool:
        """Called every :data:`LOOK_SECONDS`.

        :param now: on the monotonic clock, in seconds.
        :returns: False: the task is to be given up.
        """

    def end(self, complete: bool) -> None:
        """Called once.

        :param complete: whether there was nothing more to do; False: the task was given up.
        """


class Background:
    """One thread for the tasks of all connections. An unexpected exception in a task ends that task alone."""

    def __init__(self) -> None:
        self._new: Mailbox[Task] = Mailbox()
        self._epoll = select.epoll()
        self._epoll.register(self._new, select.EPOLLIN)
        self._tasks: dict[int, Task] = {}  # by descriptor
        self._ready_at: dict[int, float] = {}  # by descriptor: when each was ready last, on the monotonic clock
        self._look_at = 0.0  # on the monotonic clock: the next look
        self._quick_at = 0.0  # on the monotonic clock: when a task was added, or was ready again within QUICK_SECONDS
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
        if now - self._ready_at[fd] < QUICK_SECONDS:
            self._quick_at = now
        self._ready_at[fd] = now

    def _begin(self, task: Task, now: float) -> None:
        fd = task.sock.fileno()
        if (closed := self._tasks.get(fd)) is not None:  # by another thread; its descriptor's number is in use again
            self._end(fd, closed, complete=False)
        try:
            self._epoll.register(fd, task.event)
        except (OSError, ValueError):  # closed meanwhile, or the system's limit is reached
            self._finish(task, complete=False)
            return
        self._tasks[fd], self._ready_at[fd] = task, now
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
        """The result of a task's step; None: the connection is broken, or the step failed."""
        try:
            return step()
        except OSError:
            return None
        except Exception:
            log.exception(logfmt.line(event="background_failed", request_id=task.request_id or None))
            return None

    def _end(self, fd: int, task: Task, complete: bool) -> None:
        del self._tasks[fd], self._ready_at[fd]
        with contextlib.suppress(ValueError, OSError):
            self._epoll.unregister(fd)
        self._finish(task, complete)

    def _finish(self, task: Task, complete: bool) -> None:
        try:
            task.end(complete)
        except Exception:
            log.exception(logfmt.line(event="background_failed", request_id=task.request_id or None))


class Lingering:
    """Closes a connection so that the client gets all data that was sent (RFC 9112, 9.6).

    If the connection were closed while the client still sends, it would be reset, and the client might lose the
    response that says why. So only our side is closed at first, and what still comes is dropped for a while.

    :param closed: called by the background thread when the connection is closed.
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
    """Sends the rest of a file to a slow reader.

    :param sock: the reader's socket, with its ``rest``.
    :param patience: for how many seconds the reader may make no progress.
    :param request_id: of the request whose response this is.
    :param done: called by the background thread with whether all was sent.
    """

    event = select.EPOLLOUT

    def __init__(self, sock: ClientSocket, patience: float, request_id: str, done: Callable[[bool], None]):
        assert sock.rest is not None
        self.sock = sock
        self.request_id = request_id
        self._rest = sock.rest
        self._patience = patience
        self._done = done
        self._fetched = 0  # where the part of the file ends that the kernel was asked to read ahead
        self._look_at = 0.0  # on the monotonic clock
        sock.begin_waiting()

    def go_on(self) -> bool:
        if self.sock.send_rest(SEND_SIZE):
            return False
        if self._rest.position + SEND_SIZE > self._fetched:
            self._fetch()
        return True

    def _fetch(self) -> None:
        """Have the kernel read the next part of the file ahead, so that no call has to wait for the disk."""
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
