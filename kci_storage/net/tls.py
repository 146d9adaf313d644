# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS, for those who have no proxy in front.

A connection is what it is without TLS: it never blocks, its request's head is collected by the main loop, and a slow
reader is served from the background. Python's own TLS sockets keep to themselves what they have received already, so
this one encrypts and decrypts in memory (``ssl.MemoryBIO``), and leaves the socket to :class:`ClientSocket`. Files
are read and encrypted piece by piece, since ``sendfile`` goes past TLS.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
from typing import Any

from kci_storage.net.client_socket import ClientSocket

RECORD_SIZE = 16 * 1024  # bytes of plain text in a TLS record, at most (RFC 8446, 5.1)
RECEIVE_SIZE = 64 * 1024  # bytes that are taken from the kernel at a time
PIECE_SIZE = 64 * 1024  # bytes that are encrypted at a time; what a slow client has not taken of them stays in memory
_INPUT = select.POLLIN


def server_context(certfile: str, keyfile: str) -> ssl.SSLContext | None:
    """What a server needs to answer handshakes, as of TLS 1.2; None: it is to have no TLS.

    :param certfile: the certificate and those between it and its root, in PEM; empty: no TLS.
    :param keyfile: its key; empty: it is in ``certfile``.
    :raises OSError: a file cannot be read, or they do not belong together (``ssl.SSLError``).
    """
    if not certfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client of TLS 1.2 could have us work without end
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certfile, keyfile or None, password="")  # not asked for at the terminal
    return context


class TlsSocket(ClientSocket):
    """A client's socket whose other side speaks TLS.

    :param context: of the server.
    """

    is_secure = True

    def __init__(self, context: ssl.SSLContext, *arguments: Any):
        super().__init__(*arguments)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._established = False
        self.speaks_plain = False
        self._ahead = b""  # what was decrypted before anybody asked for it
        self._unsent = memoryview(b"")  # encrypted, and not yet taken by the kernel
        self._written = 0  # bytes of plain text that are in there; sent only when all of it is

    @property
    def is_handshaking(self) -> bool:  # type: ignore[override]  # a constant without TLS
        """Whether the client has begun, and not ended, to shake hands."""
        return self._gone > 0 and not self._established

    @property
    def has_more(self) -> bool:
        """Whether a record has come that can be decrypted."""
        if not self._ahead and self._established and self._incoming.pending:
            with contextlib.suppress(ssl.SSLError):  # not all of it; or what will be said when it is asked for
                self._ahead = self._tls.read(RECORD_SIZE)
        return bool(self._ahead or self._tls.pending())

    def is_ready(self, event: int, seconds: float) -> bool:
        """As of any client's socket, and what has been received already counts."""
        return (event == _INPUT and self.has_more) or super().is_ready(event, seconds)

    # Receiving

    def recv_now(self, size: int, flags: int = 0) -> bytes:
        """What is there, decrypted; the handshake is part of it.

        :raises BlockingIOError: nothing.
        :raises ConnectionResetError: this is no TLS, or not as it should be.
        """
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data
        return self._received(lambda: self._tls.read(size)) or b""

    def recv_into_now(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """The same, into a buffer."""
        size = nbytes or len(buffer)
        if self._ahead:
            data = self.recv_now(size)
            buffer[: len(data)] = data
            return len(data)
        return self._received(lambda: self._tls.read(size, buffer)) or 0

    def _received(self, read: Any) -> Any:
        """What a read gives, once enough has come; None: the client has closed the connection."""
        while True:
            try:
                self._shake_hands()
                return read()
            except ssl.SSLWantReadError:
                self._answer()
                if not self._take():
                    return None
            except ssl.SSLZeroReturnError:  # it has said that it is done
                return None
            except ssl.SSLError as exc:
                raise self._broken(exc) from exc

    def _shake_hands(self) -> None:
        if not self._established:
            self._tls.do_handshake()
            self._established = True
            self._answer()

    def _answer(self) -> None:
        """Send what TLS itself has to say, if there is room; else it goes with what is sent next."""
        with contextlib.suppress(BlockingIOError):
            self._flush()

    def _take(self) -> int:
        """Take what has come; how many bytes; 0: the client has closed the connection.

        :raises BlockingIOError: nothing has come.
        """
        data = super().recv_now(RECEIVE_SIZE)
        self._incoming.write(data)
        return len(data)

    def _broken(self, error: ssl.SSLError) -> ConnectionResetError:
        if error.reason == "HTTP_REQUEST":
            self.speaks_plain = True
            return ConnectionResetError("HTTP without TLS")
        with contextlib.suppress(OSError):
            self._flush()  # the alert, which says what is wrong
        return ConnectionResetError(f"TLS: {error.reason or error}")

    # Sending

    def send_now(self, data: Any, flags: int = 0) -> int:
        """Encrypt and send; all of what was encrypted, or nothing."""
        if not self._written:
            self._encrypt(memoryview(data)[:PIECE_SIZE])
        return self._sent()

    def send_file_now(self, fd: int, position: int, count: int) -> int:
        """The same, of a file."""
        if not self._written:
            data = os.pread(fd, min(count, PIECE_SIZE), position)
            if not data:
                return 0
            self._encrypt(data)
        return self._sent()

    def _encrypt(self, data: Any) -> None:
        try:
            self._written = self._tls.write(data)
        except ssl.SSLError as exc:
            raise ConnectionResetError(f"TLS: {exc.reason or exc}") from exc

    def _sent(self) -> int:
        self._flush()
        sent, self._written = self._written, 0
        return sent

    def _flush(self) -> None:
        """Have the kernel take all that is encrypted.

        :raises BlockingIOError: it takes no more now.
        """
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[super().send_now(self._unsent) :]

    def answer_now(self, data: bytes) -> None:
        """Send an answer as far as that is possible without waiting, to whoever speaks whatever.

        :raises OSError: it is not.
        """
        if self.speaks_plain:
            super().send_now(data)
        elif self._established:
            self.send_now(data)

    # Closing

    def shutdown(self, how: int) -> None:
        """As of any socket; before the end of what is sent comes that of TLS, so that nobody can feign it."""
        if how == socket.SHUT_WR and self._established:
            with contextlib.suppress(OSError):  # there is no room, or the client has not said so yet: no matter
                self._close_notify()
        super().shutdown(how)

    def _close_notify(self) -> None:
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()
