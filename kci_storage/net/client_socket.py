# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client's socket, which never blocks in the kernel, and which measures how slow its client is.

The time-out is always for the next *progress*. With Python's ``sendall``, it would be for all of the data; and a
socket becomes writable only when a third of its buffer is free, for which a reader of 20 KiB/s needs a minute.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kci_storage.net import slots
from kci_storage.net.bodies import SentFile, SentSegments

if TYPE_CHECKING:
    from kci_storage.net.threads import Threads

SLOW_SECONDS = 0.05  # a client for which a thread waits longer than this is slow
QUICK_RATE = 1024 * 1024  # bytes for which a client may be waited for by another second, up to SLOW_SECONDS
QUICK_SIZE = 1024 * 1024  # bytes that are sent to a quick client in one call
LONG_FILE = 4 * QUICK_SIZE  # bytes from which on a response is sent in such calls
GRACE_SECONDS = 30.0  # for which a client may be slower than MIN_RATE
MIN_RATE = 4096  # bytes per second; slower clients are shed when there are too many
LOOKS = 4  # at a client's progress, in the time for which it may make none

_NO_LINGERING = struct.pack("@ii", 1, 0)  # socket(7)


class Pace:
    """Whether a client keeps up, counting only the time in which the server waits for it.

    A bucket of seconds: waiting takes them out, and each ``MIN_RATE`` bytes that the client receives or sends put one
    in.

    :param grace: the bucket's size, in seconds.

    >>> pace = Pace(10)
    >>> pace.begin(now=0)
    >>> pace.look(9, transferred=0), pace.is_behind(9, 0), pace.is_behind(11, 0)
    (9, False, True)
    >>> pace.look(11, transferred=100_000), pace.is_behind(20, 100_000)  # the bucket is full again
    (0, False)
    """

    def __init__(self, grace: float):
        self._grace = grace
        self._credit = grace
        self._transferred = 0
        self._seen_at = self._moved_at = 0.0

    def begin(self, now: float) -> None:
        """The server waits for the client from now on. What it received until now counts in its favour."""
        self._seen_at = self._moved_at = now

    def look(self, now: float, transferred: int) -> float:
        """Note the client's progress.

        :param now: on the monotonic clock, in seconds.
        :param transferred: bytes that have gone over the connection in all.
        :returns: for how many seconds the client has made none.
        """
        if transferred > self._transferred:
            self._moved_at = now
        self._credit = self._balance(now, transferred)
        self._seen_at, self._transferred = now, transferred
        return now - self._moved_at

    def is_behind(self, now: float, transferred: int) -> bool:
        """Whether the client has been too slow; the parameters are those of :meth:`look`."""
        return self._balance(now, transferred) < 0

    def _balance(self, now: float, transferred: int) -> float:
        earned = (transferred - self._transferred) / MIN_RATE
        return min(self._grace, self._credit + earned - (now - self._seen_at))


@dataclass(slots=True)
class Rest:
    """The part of a file that is left to send to a slow reader. Its sender calls :meth:`close` at the end."""

    file: SentFile
    fd: int  # of the file
    position: int  # of the next byte to send
    stop: int  # behind the last byte

    def close(self) -> None:
        """Close the file, and tell it how far it has been sent."""
        self.file.seek(self.position)
        self.file.close()


class ClientSocket(socket.socket):
    """A client's socket. Its methods that may block release the thread's slot while they wait for the client.

    A client that makes no progress for too long is treated as one that has reset the connection.

    :param patience: for how many seconds the client may make no progress.
    :param threads: the pool of the threads that wait for it.
    """

    def __init__(self, sock: socket.socket, patience: float, threads: Threads):
        super().__init__(fileno=sock.detach())
        super().setblocking(False)
        self._patience = patience
        self._threads = threads
        self._moved = 0  # bytes handed to the kernel, or received from it
        self._queued = array.array("i", [0])
        self._allowance = SLOW_SECONDS  # for which a thread may still wait for the client without releasing its slot
        self._allowed_at = 0  # ``_moved`` when the allowance was computed
        self._awaits_input = False
        self.pace = Pace(min(GRACE_SECONDS, patience))
        self.rest: Rest | None = None  # of the response, if the client is too slow for a thread to wait

    is_handshaking = False  # whether a TLS handshake has begun and not yet ended
    is_encrypted = False  # whether the connection is encrypted
    received_plain_http = False  # whether the client sent plain HTTP to a TLS port

    @property
    def has_more(self) -> bool:
        """Whether there are bytes to read of which the kernel does not know."""
        return False

    # The methods of a blocking socket, and their non-blocking counterparts

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As of a blocking socket."""
        while True:
            try:
                return self.recv_now(size, flags)
            except BlockingIOError:
                self._wait(select.POLLIN)
            except TimeoutError as exc:  # the kernel's: TCP_USER_TIMEOUT
                raise _stalled() from exc

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As of a blocking socket."""
        while True:
            try:
                return self.recv_into_now(buffer, nbytes, flags)
            except BlockingIOError:
                self._wait(select.POLLIN)
            except TimeoutError as exc:
                raise _stalled() from exc

    def recv_now(self, size: int, flags: int = 0) -> bytes:
        """The bytes that have come; empty: the client sends no more.

        :raises BlockingIOError: none have come.
        """
        data = super().recv(size, flags)
        self._moved += len(data)
        return data

    def recv_into_now(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Put the bytes that have come into the buffer.

        :returns: how many; 0: the client sends no more.
        :raises BlockingIOError: none have come.
        """
        size = super().recv_into(buffer, nbytes, flags)
        self._moved += size
        return size

    def send_now(self, data: Any, flags: int = 0) -> int:
        """Send as much as the kernel accepts without blocking.

        :returns: how many bytes.
        :raises BlockingIOError: it accepts none now; the next call must have the same data.
        """
        sent = super().send(data, flags)
        self._moved += sent
        return sent

    def send(self, data: Any, flags: int = 0) -> int:
        """As of a blocking socket."""
        while True:
            try:
                return self.send_now(data, flags)
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except TimeoutError as exc:
                raise _stalled() from exc

    def answer_now(self, data: bytes) -> None:
        """Send a short answer as far as possible without blocking.

        :raises OSError: it cannot be sent.
        """
        self.send_now(data)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As of a blocking socket."""
        sent = self.send(data, flags)
        if sent < len(data):
            view = memoryview(data)[sent:]
            while view:
                view = view[self.send(view, flags) :]

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """As of any socket, but if the client is slow, the end of a plain file is left to :attr:`rest`.

        :returns: how many bytes have been sent.
        :raises ConnectionResetError: the client is gone, or makes no progress.
        """
        slots.may_block()
        if isinstance(file, SentSegments):
            return file.send_to(self)
        assert count is not None
        fd, position, stop = file.fileno(), offset, offset + count
        try:
            if count >= LONG_FILE and not self.is_encrypted:
                for reached in self._sent_while_quick(fd, offset, stop):
                    position = reached
            while position < stop:
                sent = self._send_some(fd, position, stop - position)
                if sent == 0:
                    break  # the file has become shorter, which its owner handles
                if sent is not None:
                    position += sent
                elif isinstance(file, SentFile) and not self._is_ready_soon(select.POLLOUT):
                    self.rest = Rest(file, fd, position, stop)
                    file.keep()
                    break
                else:
                    self._wait(select.POLLOUT)
        finally:
            file.seek(position)
        return position - offset

    def _sent_while_quick(self, fd: int, position: int, stop: int) -> Iterator[int]:
        """Send a part of a file as long as the client keeps up; yields the position that has been reached.

        The kernel waits for the client here, which saves two switches each time that a buffer is full: a tenth of the
        time of a long file. It waits for at most ``SLOW_SECONDS`` for room for each 64 KiB, so a client below 1.25
        MiB/s is not quick.
        """
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, int(SLOW_SECONDS * 1e6)))
        os.set_blocking(self.fileno(), True)
        try:
            while position < stop:
                size = min(QUICK_SIZE, stop - position)
                sent = self._send_some(fd, position, size) or 0
                position += sent
                yield position
                if sent < size:
                    break
        finally:
            os.set_blocking(self.fileno(), False)

    def send_rest(self, limit: int) -> bool:
        """Send a piece of :attr:`rest`, as much as the kernel accepts without blocking.

        :param limit: at most this many bytes.
        :returns: whether all has been sent.
        :raises OSError: the connection is broken, or the file has become shorter.
        """
        rest = self.rest
        assert rest is not None
        sent = self._send_some(rest.fd, rest.position, min(limit, rest.stop - rest.position))
        if sent == 0:
            raise OSError(errno.EIO, "the file became shorter while it was sent")
        rest.position += sent or 0
        return rest.position == rest.stop

    def _send_some(self, fd: int, position: int, count: int) -> int | None:
        """How many bytes of a file the kernel has accepted; 0: there are none; None: it accepts none now."""
        try:
            return self.send_file_now(fd, position, count)
        except BlockingIOError:
            return None
        except TimeoutError as exc:
            raise _stalled() from exc

    def send_file_now(self, fd: int, position: int, count: int) -> int:
        """Send as much of a file as the kernel accepts without blocking.

        :returns: how many bytes; 0: the file ends at that position.
        :raises BlockingIOError: it accepts none now; the next call must have the same position.
        """
        sent = os.sendfile(self.fileno(), fd, position, count)
        self._moved += sent
        return sent

    # The client's pace

    def _transferred(self) -> int:
        """How many bytes the client has sent, or has acknowledged."""
        fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, self._queued)
        return self._moved - self._queued[0]

    def begin_waiting(self, for_input: bool = False) -> None:
        """The server waits for the client from now on: to send (``for_input``), or to receive."""
        self._awaits_input = for_input
        self.pace.begin(time.monotonic())
        self.look()

    def look(self) -> float:
        """For how many seconds the client has made no progress since the server began to wait for it."""
        return self.pace.look(time.monotonic(), self._transferred())

    def is_behind(self) -> bool:
        """Whether the client has been slower than :data:`MIN_RATE` for longer than its grace."""
        try:
            return self.pace.is_behind(time.monotonic(), self._transferred())
        except (OSError, ValueError):  # closed meanwhile
            return False

    def reset(self) -> None:
        """Close at once, so that the client sees an error rather than an end. Data still to be sent is lost."""
        with contextlib.suppress(OSError):  # it is closed already
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        self.close()

    def give_up(self) -> None:
        """Wake the thread that waits for the client, which then counts as gone. An answer may still be sent."""
        with contextlib.suppress(OSError):  # closed meanwhile
            self.shutdown(socket.SHUT_RD if self._awaits_input else socket.SHUT_RDWR)

    def _wait(self, event: int) -> None:
        """Wait until the socket is readable or writable.

        :raises ConnectionResetError: the client makes no progress.
        """
        slots.may_block()
        if self._is_ready_soon(event):
            return
        self.begin_waiting(for_input=event == select.POLLIN)
        with self._threads.released_for(self):
            while not self.is_ready(event, self._patience / LOOKS):
                if self.look() >= self._patience:
                    raise _stalled()
            self.look()

    def _is_ready_soon(self, event: int) -> bool:
        """Whether the socket becomes ready within the allowance of a quick client; if not, the client is slow."""
        earned = (self._moved - self._allowed_at) / QUICK_RATE
        allowance = min(SLOW_SECONDS, self._patience, self._allowance + earned)
        started = time.monotonic()
        ready = self.is_ready(event, allowance)
        self._allowance = max(0.0, allowance - (time.monotonic() - started))
        self._allowed_at = self._moved
        return ready

    def is_ready(self, event: int, seconds: float) -> bool:
        """Whether the socket becomes readable (``POLLIN``) or writable (``POLLOUT``) within so many seconds."""
        poll = select.poll()
        poll.register(self.fileno(), event)
        return bool(poll.poll(seconds * 1000))


def _stalled() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "the client stalled")
