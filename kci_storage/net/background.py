# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done for a connection without a thread of its own: sending to slow readers, and closing with patience."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kci_storage import logfmt
from kci_storage.net.client_socket import ClientSocket
from kci_storage.net.mailbox import Mailbox

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # between two looks at all of them
SEND_SIZE = 1024 * 1024  # bytes for one reader before the next one's turn

LINGER_SECONDS = 3.0  # for which a client may go on sending after its connection was closed
LINGER_BYTES = 64 * 1024 * 1024  # that it may send in them
DRAIN_SIZE = 256 * 1024  # bytes


class Task(Protocol):
    """Something that goes on whenever its socket is ready."""

    event: int  # of the selectors module

    @property
    def sock(self) -> socket.socket:
        """What it waits for."""

    request_id: str  # for the log

    def go_on(self) -> bool:
        """The socket is ready: do what is possible without waiting; whether there is more to do.

        :raises OSError: the connection is broken.
        """

    def look(self) -> bool:
        """Once a second: whether it may go on."""

    def end(self, complete: bool) -> None:
        """It is done, or was given up."""


class Background:
    """One thread for the tasks of all connections. It outlives whatever goes wrong in one of them."""

    def __init__(self) -> None:
        self._new: Mailbox[Task] = Mailbox()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._new, selectors.EVENT_READ)
        self._tasks: set[Task] = set()
        self._look_at = 0.0  # on the monotonic clock
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
                time.sleep(TICK_SECONDS)  # it may fail again at once

    def _turn(self) -> None:
        for key, _ in self._selector.select(TICK_SECONDS):
            if key.data is not None:
                self._go_on(key.data)
        for task in self._new.take():
            self._begin(task)
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + TICK_SECONDS
            for task in tuple(self._tasks):
                if not self._attempt(task, task.look):
                    self._end(task, complete=False)

    def _begin(self, task: Task) -> None:
        try:
            self._selector.register(task.sock, task.event, task)
        except (OSError, ValueError, KeyError):  # closed meanwhile, or the system has no means for it
            self._finish(task, complete=False)
            return
        self._tasks.add(task)
        self._go_on(task)

    def _go_on(self, task: Task) -> None:
        if task not in self._tasks:
            return  # it ended while its event was on the way
        goes_on = self._attempt(task, task.go_on)
        if not goes_on:
            self._end(task, complete=goes_on is not None)

    def _attempt(self, task: Task, step: Callable[[], bool]) -> bool | None:
        """What a step of a task says; None: the connection is broken, or the step failed."""
        try:
            return step()
        except OSError:
            return None
        except Exception:
            log.exception(logfmt.line(event="background_failed", request_id=task.request_id or None))
            return None

    def _end(self, task: Task, complete: bool) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(task.sock)
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

    event = selectors.EVENT_READ
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

    def look(self) -> bool:
        return time.monotonic() < self._deadline

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

    event = selectors.EVENT_WRITE

    def __init__(self, sock: ClientSocket, patience: float, request_id: str, done: Callable[[bool], None]):
        assert sock.rest is not None
        self.sock = sock
        self.request_id = request_id
        self._file = sock.rest.file
        self._patience = patience
        self._done = done
        sock.begin_waiting()

    def go_on(self) -> bool:
        if self.sock.send_rest(SEND_SIZE):
            return False
        rest = self.sock.rest
        assert rest is not None
        # The next call is not to wait for the disk.
        os.posix_fadvise(rest.file.fileno(), rest.position, SEND_SIZE, os.POSIX_FADV_WILLNEED)
        return True

    def look(self) -> bool:
        return self.sock.look() < self._patience

    def end(self, complete: bool) -> None:
        self.sock.rest = None
        try:
            self._file.close()
        finally:
            self._done(complete)
