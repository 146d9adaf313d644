# SPDX-License-Identifier: LGPL-2.1-or-later
"""Response bodies that are files, or parts of files, and how they are sent."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kci_storage.errors import StorageError

SMALL_FILE = 64 * 1024  # bytes; up to here, one send of head and content is faster than sendfile


class Transfer(Protocol):
    """The exchange of a body, until its last byte has been sent: :class:`kci_storage.wsgi.exchange.Exchange`."""

    sent: int  # body bytes

    def failed(self, error: StorageError) -> None:
        """Note the error for the log."""

    def finish(self) -> None:
        """The response has been sent, or never will be."""


class SentFile:
    """A part of a file to be sent, which counts the bytes that were sent.

    :param fd: the file's descriptor; no other code may use its position.
    :param start: the offset of the first byte to send.
    :param close: called once, when the file has been sent or never will be; it must close ``fd``.
    """

    def __init__(self, fd: int, start: int, close: Callable[[], None]):
        self._fd = fd
        self._start = self._position = start
        self._close = close
        self._kept = False
        self.exchange: Transfer | None = None

    def send_to(self, sock: socket.socket, head: bytes, count: int) -> None:
        """Send a response's head and the next ``count`` bytes of the file.

        :raises ConnectionResetError: the client is gone.
        """
        if count > SMALL_FILE:
            sock.sendall(head, socket.MSG_MORE)
            sock.sendfile(self, self._start, count)
        else:
            data = os.pread(self._fd, count, self._start)
            sock.sendall(head + data)
            self._position += len(data)

    def keep(self) -> None:
        """Make the next :meth:`close` do nothing: the background sender goes on sending, and closes it later."""
        self._kept = True

    def fileno(self) -> int:
        """The descriptor, positioned at the next byte to send, as other servers expect it."""
        os.lseek(self._fd, self._position, os.SEEK_SET)
        return self._fd

    def seek(self, position: int) -> None:
        """Note how far the file has been sent; ``socket.sendfile`` calls it at its end."""
        self._position = position

    def read(self, size: int = -1) -> bytes:
        """The next bytes, for a server or a TLS connection that cannot use ``sendfile``."""
        data = os.pread(self._fd, size if size >= 0 else 1 << 20, self._position)
        self._position += len(data)
        return data

    def close(self) -> None:
        """End the response, and close the file. Idempotent."""
        if self._kept:
            self._kept = False
        elif self._fd >= 0:
            self._fd = -1
            self._close()
            if self.exchange is not None:
                self.exchange.sent = self._position - self._start
                self.exchange.finish()


class SentSegments:
    """A body that is sent while it arrives, in pieces: bytes, or regions of files, which are sent by ``sendfile``.

    :param segments: the pieces; a region has ``fd``, ``start``, ``stop``, and ``read()`` for callers that need bytes.
    :param fd: the descriptor of any file, for a server that checks whether the body is a file.
    :param close: called once, when all has been sent or never will be.
    """

    def __init__(self, segments: Iterator[Any], fd: int, close: Callable[[], None]):
        self._segments = segments
        self._bytes = self._as_bytes()
        self._fd = fd
        self._close: Callable[[], None] | None = close
        self._sent = 0
        self.exchange: Transfer | None = None

    def fileno(self) -> int:
        """The descriptor of a seekable file."""
        return self._fd

    def send_to(self, sock: socket.socket) -> int:
        """Send all pieces.

        :returns: how many bytes.
        :raises ConnectionResetError: the client is gone, or the content failed.
        """
        with cut_short(self.exchange):
            for segment in self._segments:
                if isinstance(segment, bytes):
                    sock.sendall(segment)
                    self._sent += len(segment)
                else:
                    self._send_region(sock, segment)
        return self._sent

    def _send_region(self, sock: socket.socket, region: Any) -> None:
        file = _Position(region.fd, region.start)
        try:
            sock.sendfile(file, region.start, region.stop - region.start)
        finally:
            self._sent += file.position - region.start
        if file.position < region.stop:
            raise StorageError("the file became shorter while it was sent")

    def read(self, size: int = -1) -> bytes:
        """The next piece, of any size, for a server or a TLS connection that cannot use ``sendfile``."""
        with cut_short(self.exchange):
            data = next(self._bytes, b"")
        self._sent += len(data)
        return data

    def _as_bytes(self) -> Iterator[bytes]:
        for segment in self._segments:
            if isinstance(segment, bytes):
                yield segment
            else:
                yield from segment.read()

    def close(self) -> None:
        """End the response, and close the content. Idempotent."""
        if self._close is not None:
            close, self._close = self._close, None
            close()
            if self.exchange is not None:
                self.exchange.sent = self._sent
                self.exchange.finish()


class _Position:
    """A file for ``socket.sendfile``, which calls ``seek`` with where it stopped, also when the client is gone.

    Several responses share the descriptor, so each keeps its own position.
    """

    def __init__(self, fd: int, position: int):
        self._fd = fd
        self._next = self.position = position

    def fileno(self) -> int:
        return self._fd

    def seek(self, position: int) -> None:
        self._next = self.position = position

    def read(self, size: int) -> bytes:  # ``socket.sendfile`` uses it if the system call fails
        data = os.pread(self._fd, size, self._next)
        self._next += len(data)
        return data


@contextlib.contextmanager
def cut_short(exchange: Transfer | None) -> Iterator[None]:
    """End the connection if the body fails during the block, after the response's head was sent.

    :raises ConnectionResetError: it failed.
    """
    try:
        yield
    except StorageError as exc:
        if exchange is not None:
            exchange.failed(exc)
        # It is too late for an error status. The server handles this like a client that is gone: it closes the
        # connection without the last chunk, or short of Content-Length, so the client sees that the body is cut.
        raise ConnectionResetError(errno.ECONNRESET, "the response was cut short") from exc
