"""What is done for a connection without a thread of its own: sending to slow readers, and closing with patience."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kci_storage.net.client_socket import ClientSocket

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # between two looks at all of them
SEND_SIZE = 1024 * 1024  # bytes for one reader before the next one's turn

LINGER_SECONDS = 3.0  # for which a client may go on sending after its connection was closed
LINGER_BYTES = 64 * 1024 * 1024  # that it may send in them
DRAIN_SIZE = 256 * 1024  # bytes


class Task(Protocol):
    """Something that goes on whenever its socket is ready."""

    sock: socket.socket
    event: int  # of the selectors module

    def go_on(self) -> bool:
        """The socket is ready: do what is possible without waiting; whether there is more to do.

        :raises OSError: the connection is broken.
        """

    def look(self) -> bool:
        """Once a second: whether it may go on."""

    def end(self, complete: bool) -> None:
        """It is done, or was given up."""


class Background:
    """One thread for the tasks of all connections."""

    def __init__(self) -> None:
        self._new: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._tasks: set[Task] = set()
        threading.Thread(target=self._run, name="background", daemon=True).start()

    def add(self, task: Task) -> None:
        """Take over a connection. Any thread may call this."""
        self._new.put(task)
        with contextlib.suppress(BlockingIOError):  # it has been woken often enough
            self._wake_writer.send(b"x")

    def _run(self) -> None:
        looked = time.monotonic()
        while True:
            for key, _ in self._selector.select(TICK_SECONDS):
                if key.data is None:
                    self._take_new()
                else:
                    self._go_on(key.data)
            if time.monotonic() - looked >= TICK_SECONDS:
                looked = time.monotonic()
                for task in tuple(self._tasks):
                    if not _look(task):
                        self._end(task, complete=False)

    def _take_new(self) -> None:
        self._wake_reader.recv(4096)
        with contextlib.suppress(queue.Empty):
            while True:
                self._begin(self._new.get_nowait())

    def _begin(self, task: Task) -> None:
        try:
            self._selector.register(task.sock, task.event, task)
        except (OSError, ValueError):  # closed meanwhile
            task.end(complete=False)
            return
        self._tasks.add(task)
        self._go_on(task)

    def _go_on(self, task: Task) -> None:
        if task not in self._tasks:
            return  # it ended while its event was on the way
        try:
            if not task.go_on():
                self._end(task, complete=True)
        except OSError:
            self._end(task, complete=False)

    def _end(self, task: Task, complete: bool) -> None:
        self._tasks.discard(task)
        self._selector.unregister(task.sock)
        try:
            task.end(complete)
        except Exception:  # the thread is for all connections
            log.exception("event=background_failed")


def _look(task: Task) -> bool:
    try:
        return task.look()
    except OSError:
        return False


class Lingering:
    """Closes a connection so that the client gets what was sent to it (RFC 9112, 9.6).

    If it were closed while the client still sends, it would be reset, and the client might lose the answer that tells
    it why. So only our side is closed at first, and what still comes is thrown away for a while.
    """

    event = selectors.EVENT_READ

    def __init__(self, sock: socket.socket):
        self.sock = sock
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
        self.sock.close()


class Sending:
    """Sends what is left of a file to a reader that is slower than the file.

    :param patience: seconds for which the reader may take nothing.
    :param done: called with whether all was sent, by the background's thread.
    """

    event = selectors.EVENT_WRITE

    def __init__(self, sock: ClientSocket, patience: float, done: Callable[[bool], None]):
        assert sock.rest is not None
        self.sock = sock
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
