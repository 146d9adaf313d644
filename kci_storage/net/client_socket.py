# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client's socket: it tries first, then waits, and knows how slow its client is.

Its time-out is always for the next *progress*: with ``sendall`` Python would count it over all of the data, and a
socket becomes writable only when a third of its buffer is free, which a reader of 20 KiB/s takes a minute for.
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

SLOW_SECONDS = 0.05  # who lets a thread wait longer than this is slow,
QUICK_RATE = 1024 * 1024  # unless it has brought so many bytes a second for that
QUICK_SIZE = 1024 * 1024  # bytes that go to a quick client in one call,
LONG_FILE = 4 * QUICK_SIZE  # if it gets at least this much
GRACE_SECONDS = 30.0  # for which anybody may be slower than this:
LEAST_RATE = 4096  # bytes a second; below it, a client goes when there are too many
LOOKS = 4  # at what a client has taken, in the time for which it may stand still

_NO_LINGERING = struct.pack("@ii", 1, 0)  # socket(7)


class Pace:
    """Whether a client keeps up, counting only time in which it is the one that is waited for.

    A bucket of seconds: what is waited goes out, and each ``LEAST_RATE`` bytes that the client takes or gives bring a
    second in.

    :param grace: the bucket's size, in seconds.

    >>> pace = Pace(10)
    >>> pace.begin(now=0)
    >>> pace.look(9, transferred=0), pace.is_behind(9, 0), pace.is_behind(11, 0)
    (9, False, True)
    >>> pace.look(11, transferred=100_000), pace.is_behind(20, 100_000)  # it has earned the grace again
    (0, False)
    """

    def __init__(self, grace: float):
        self._grace = grace
        self._credit = grace
        self._transferred = 0
        self._seen = self._moved = 0.0

    def begin(self, now: float) -> None:
        """From now on the client is waited for. What it took until now counts in its favour."""
        self._seen = self._moved = now

    def look(self, now: float, transferred: int) -> float:
        """How long it has not moved, in seconds.

        :param now: on the monotonic clock, in seconds.
        :param transferred: bytes that have gone over the connection in all.
        """
        if transferred > self._transferred:
            self._moved = now
        self._credit = self._balance(now, transferred)
        self._seen, self._transferred = now, transferred
        return now - self._moved

    def is_behind(self, now: float, transferred: int) -> bool:
        """Whether it has been too slow, now that it is waited for."""
        return self._balance(now, transferred) < 0

    def _balance(self, now: float, transferred: int) -> float:
        earned = (transferred - self._transferred) / LEAST_RATE
        return min(self._grace, self._credit + earned - (now - self._seen))


@dataclass(slots=True)
class Rest:
    """What is left to send of a file whose reader is slow.

    Whatever sends it calls :meth:`close` at the end.
    """

    file: SentFile
    fd: int  # of the file
    position: int  # in the file, in bytes
    stop: int

    def close(self) -> None:
        """Close the file, which learns how far it went."""
        self.file.seek(self.position)
        self.file.close()


class ClientSocket(socket.socket):
    """A socket that never blocks in the kernel; its methods wait for the client as a blocking one's do.

    A client that stands still counts as one that reset the connection.

    :param patience: seconds that a client may stand still.
    :param threads: which wait for it.
    """

    def __init__(self, sock: socket.socket, patience: float, threads: Threads):
        super().__init__(fileno=sock.detach())
        super().setblocking(False)
        self._patience = patience
        self._threads = threads
        self._gone = 0  # bytes handed to the kernel or got from it
        self._queued = array.array("i", [0])
        self._allowance = SLOW_SECONDS  # seconds for which a thread may yet wait for it in its slot
        self._allowed_at = 0  # bytes that had gone then
        self._awaits_input = False
        self.pace = Pace(min(GRACE_SECONDS, patience))
        self.rest: Rest | None = None  # of the response, which its reader was too slow for

    is_handshaking = False  # whether it has begun to agree with its client on how to talk
    is_secure = False  # whether nobody listens
    speaks_plain = False  # whether its client does not know that it should be

    @property
    def has_more(self) -> bool:
        """Whether there is something to receive that the kernel does not know of."""
        return False

    # As a blocking socket does

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
        """What is there.

        :raises BlockingIOError: nothing.
        """
        data = super().recv(size, flags)
        self._gone += len(data)
        return data

    def recv_into_now(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Put what is there into the buffer.

        :raises BlockingIOError: nothing.
        """
        size = super().recv_into(buffer, nbytes, flags)
        self._gone += size
        return size

    def send_now(self, data: Any, flags: int = 0) -> int:
        """Send what the client takes without waiting.

        :raises BlockingIOError: nothing; the same data are to be sent again, when there is room.
        """
        sent = super().send(data, flags)
        self._gone += sent
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
        """Send a short answer as far as that is possible without waiting.

        :raises OSError: it is not.
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
        """As of any socket, but the end of a plain file may be left to :attr:`rest`, for a slow reader.

        What is no plain file knows how to send itself.
        """
        slots.may_block()
        if isinstance(file, SentSegments):
            return file.send_to(self)
        assert count is not None
        fd, position, stop = file.fileno(), offset, offset + count
        try:
            if count >= LONG_FILE and not self.is_secure:
                for reached in self._sent_while_quick(fd, offset, stop):
                    position = reached
            while position < stop:
                sent = self._send_some(fd, position, stop - position)
                if sent == 0:
                    break  # the file is shorter; its owner sees to that
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
        """Send a part of a file to a client as long as it keeps up; how far that went, from time to time.

        It is the kernel that waits for the client here, which spares a way out and back each time that a buffer is
        full: a tenth of the time of a long file. It waits for no longer than ``SLOW_SECONDS`` for room for each 64
        KiB, so a client of less than 1.25 MiB/s is not quick.
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

    def send_rest(self, most: int) -> bool:
        """Send what the client takes of :attr:`rest` without waiting, but at most so many bytes; whether it was all.

        :raises OSError: the connection is broken, or the file has become shorter.
        """
        rest = self.rest
        assert rest is not None
        sent = self._send_some(rest.fd, rest.position, min(most, rest.stop - rest.position))
        if sent == 0:
            raise OSError(errno.EIO, "the file became shorter while it was sent")
        rest.position += sent or 0
        return rest.position == rest.stop

    def _send_some(self, fd: int, position: int, count: int) -> int | None:
        """How much of a file went into the kernel; None: it takes nothing now."""
        try:
            return self.send_file_now(fd, position, count)
        except BlockingIOError:
            return None
        except TimeoutError as exc:
            raise _stalled() from exc

    def send_file_now(self, fd: int, position: int, count: int) -> int:
        """Send what the client takes of a file without waiting; how much; 0: there is nothing at that position.

        :raises BlockingIOError: it takes nothing; the same part is to be sent again, when there is room.
        """
        sent = os.sendfile(self.fileno(), fd, position, count)
        self._gone += sent
        return sent

    # The client's pace

    def _transferred(self) -> int:
        """Bytes that have come from the client, or have arrived there."""
        fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, self._queued)
        return self._gone - self._queued[0]

    def begin_waiting(self, for_input: bool = False) -> None:
        """The client is waited for, from now on: to make room, or for input."""
        self._awaits_input = for_input
        self.pace.begin(time.monotonic())
        self.look()

    def look(self) -> float:
        """For how many seconds the client, which is waited for, has not moved."""
        return self.pace.look(time.monotonic(), self._transferred())

    def is_behind(self) -> bool:
        """Whether the client, which is waited for, has been slower than the least rate for longer than the grace."""
        try:
            return self.pace.is_behind(time.monotonic(), self._transferred())
        except (OSError, ValueError):  # closed meanwhile
            return False

    def reset(self) -> None:
        """Close at once, so that the client sees an error rather than an end; what it has not got yet is lost."""
        with contextlib.suppress(OSError):  # it is closed already
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        self.close()

    def give_up(self) -> None:
        """Wake whoever waits for the client, for whom it is then gone. An answer may still be sent."""
        with contextlib.suppress(OSError):  # closed meanwhile
            self.shutdown(socket.SHUT_RD if self._awaits_input else socket.SHUT_RDWR)

    def _wait(self, event: int) -> None:
        """Wait until the client has given something, or made room.

        :raises ConnectionResetError: it stands still.
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
        """Whether the client lets itself be waited for no longer than a quick one; else it is slow."""
        earned = (self._gone - self._allowed_at) / QUICK_RATE
        allowance = min(SLOW_SECONDS, self._patience, self._allowance + earned)
        started = time.monotonic()
        ready = self.is_ready(event, allowance)
        self._allowance = max(0.0, allowance - (time.monotonic() - started))
        self._allowed_at = self._gone
        return ready

    def is_ready(self, event: int, seconds: float) -> bool:
        """Whether the client gives something (``POLLIN``) or takes something (``POLLOUT``) within so long."""
        poll = select.poll()
        poll.register(self.fileno(), event)
        return bool(poll.poll(seconds * 1000))


def _stalled() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "the client stalled")
