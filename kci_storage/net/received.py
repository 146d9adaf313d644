# SPDX-License-Identifier: LGPL-2.1-or-later
"""What has come on a connection and is yet to be read: a request's head, its body, and what may follow it."""

from __future__ import annotations

import io
import sys
from typing import Any, Protocol

from kci_storage.net.client_socket import ClientSocket

LEAST_READ = 8 * 1024  # bytes that are asked for when nobody knows how many will come
MOST_READ = 1024 * 1024  # bytes that are asked for at a time


class Received:
    """Bytes that came ahead of who reads them, and then those that come.

    :param sock: the client's.
    :param ahead: what has come.
    """

    def __init__(self, sock: ClientSocket, ahead: bytes):
        self._sock = sock
        self._ahead = ahead

    def read(self, size: int | None = None, read_ahead: int | None = None) -> bytes:
        """So many bytes, fewer only when the client sends no more.

        :param size: None: what is there, or comes next; empty when the client sends no more.
        :param read_ahead: how many of what comes next are wanted.
        :raises ConnectionResetError: the client is gone, or stands still.
        """
        if size is None:
            return self.take() or self._sock.recv(max(LEAST_READ, min(read_ahead or 0, MOST_READ)))
        pieces = bytearray(self._ahead)
        while len(pieces) < size and (data := self._sock.recv(min(size - len(pieces), MOST_READ))):
            pieces += data
        self._ahead = bytes(pieces[size:])
        return bytes(pieces[:size])

    def unread(self, data: bytes) -> None:
        """Put back what comes before what is left."""
        self._ahead = data + self._ahead

    def take(self) -> bytes:
        """What came ahead."""
        ahead, self._ahead = self._ahead, b""
        return ahead

    def readinto(self, buffer: memoryview) -> int:
        """Put what is there, or comes next, at the beginning of the buffer; how many bytes; 0: no more come.

        What comes goes straight from the socket into the buffer.
        """
        if not self._ahead:
            return self._sock.recv_into(buffer)
        size = min(len(self._ahead), len(buffer))
        buffer[:size], self._ahead = self._ahead[:size], self._ahead[size:]
        return size


class LengthBody(io.RawIOBase):
    """A request's body of known length.

    It ends where it should, or sooner when the client goes away: then there is less of it than was announced.
    """

    def __init__(self, received: Received, length: int):
        self._received = received
        self.remaining = length  # bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Put the next bytes, as many as there are, at the beginning of ``buffer``; how many; 0: no more come.

        :raises ConnectionResetError: the client is gone, or stands still.
        """
        view = memoryview(buffer)[: self.remaining]
        size = self._received.readinto(view) if view else 0
        self.remaining -= size
        return size

    def read(self, size: int = -1) -> bytes:
        """So many bytes, or all that are left; fewer when no more come.

        :raises ConnectionResetError: the client is gone, or stands still.
        """
        wanted = self.remaining if size is None or size < 0 else min(size, self.remaining)
        data = self._received.read(wanted) if wanted else b""
        self.remaining -= len(data)
        return data

    @property
    def is_read(self) -> bool:
        """Whether nothing of it is left on the connection."""
        return self.remaining == 0


class Reader(Protocol):
    """Reads chunks."""

    def read(self, size: int) -> bytes:
        """So many bytes of their content; fewer only at the end.

        :raises Exception: of many kinds: the coding is broken, or the client is gone.
        """


class ChunkedBody(io.RawIOBase):
    """A request's body that comes in chunks (RFC 9112, 7.1)."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self.is_read = False  # whether nothing of it is left on the connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """So many bytes, or all that are left; fewer at the end.

        :raises Exception: the coding is broken, or the client is gone.
        """
        size = sys.maxsize if size is None or size < 0 else size
        data = self._reader.read(size)
        if len(data) < size:
            self.is_read = True
        return data
