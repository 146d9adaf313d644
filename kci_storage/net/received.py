# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading requests from a connection: bytes that were received ahead, and bodies by length or in chunks."""

from __future__ import annotations

import io
import sys
from typing import Any, Protocol

from kci_storage.net.client_socket import ClientSocket

MIN_READ = 8 * 1024  # bytes of a read when the number of bytes to come is unknown
MAX_READ = 1024 * 1024  # bytes of a read


class Received:
    """A connection's bytes: first those that were received ahead, then those from the socket.

    :param sock: the client's socket.
    :param ahead: the bytes that were received already.
    """

    def __init__(self, sock: ClientSocket, ahead: bytes):
        self._sock = sock
        self._ahead = ahead

    def read(self, size: int | None = None, read_ahead: int | None = None) -> bytes:
        """Exactly ``size`` bytes, or fewer if the client sends no more.

        :param size: None: any number of bytes, as many as have come; empty: the client sends no more.
        :param read_ahead: how many bytes the caller wants in the latter case.
        :raises ConnectionResetError: the client is gone, or makes no progress.
        """
        if size is None:
            return self.take() or self._sock.recv(max(MIN_READ, min(read_ahead or 0, MAX_READ)))
        pieces = bytearray(self._ahead)
        while len(pieces) < size and (data := self._sock.recv(min(size - len(pieces), MAX_READ))):
            pieces += data
        self._ahead = bytes(pieces[size:])
        return bytes(pieces[:size])

    def unread(self, data: bytes) -> None:
        """Put bytes back in front of the others."""
        self._ahead = data + self._ahead

    def take(self) -> bytes:
        """Remove and return the bytes that were received ahead."""
        ahead, self._ahead = self._ahead, b""
        return ahead

    def readinto(self, buffer: memoryview) -> int:
        """Put the next bytes, as many as have come, at the beginning of ``buffer``, without a copy in between.

        :returns: how many bytes; 0: the client sends no more.
        """
        if not self._ahead:
            return self._sock.recv_into(buffer)
        size = min(len(self._ahead), len(buffer))
        buffer[:size], self._ahead = self._ahead[:size], self._ahead[size:]
        return size


class LengthBody(io.RawIOBase):
    """A request's body of known length. It ends early if the client sends less."""

    def __init__(self, received: Received, length: int):
        self._received = received
        self.remaining = length  # bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Put the next bytes, as many as have come, at the beginning of ``buffer``.

        :returns: how many bytes; 0: the body has ended, or the client sends no more.
        :raises ConnectionResetError: the client is gone, or makes no progress.
        """
        view = memoryview(buffer)[: self.remaining]
        size = self._received.readinto(view) if view else 0
        self.remaining -= size
        return size

    def read(self, size: int = -1) -> bytes:
        """Exactly ``size`` bytes, or fewer if the body ends before.

        :param size: -1: all that are left.
        :raises ConnectionResetError: the client is gone, or makes no progress.
        """
        wanted = self.remaining if size is None or size < 0 else min(size, self.remaining)
        data = self._received.read(wanted) if wanted else b""
        self.remaining -= len(data)
        return data

    @property
    def is_read(self) -> bool:
        """Whether the whole body has been read from the connection."""
        return self.remaining == 0


class Reader(Protocol):
    """Decodes a chunked body."""

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes of the content; fewer only at the end.

        :raises Exception: of many classes: the encoding is broken, or the client is gone.
        """


class ChunkedBody(io.RawIOBase):
    """A request's body that comes in chunks (RFC 9112, 7.1)."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self.is_read = False  # whether the whole body has been read from the connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes; fewer only at the end.

        :param size: -1: all that are left.
        :raises Exception: of many classes: the encoding is broken, or the client is gone.
        """
        size = sys.maxsize if size is None or size < 0 else size
        data = self._reader.read(size)
        if len(data) < size:
            self.is_read = True
        return data
