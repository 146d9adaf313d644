# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS, for servers without a proxy in front.

A TLS connection behaves like one without TLS: it never blocks, the main loop collects its request's head, and the
background sender serves a slow reader. Python's own TLS sockets hide the bytes that they have received already, so
this one encrypts and decrypts in memory (``ssl.MemoryBIO``), and leaves the socket to :class:`ClientSocket`. Files
are read and encrypted piece by piece, since ``sendfile`` would bypass TLS.
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
RECEIVE_SIZE = 64 * 1024  # bytes that are received at a time
PIECE_SIZE = 64 * 1024  # bytes that are encrypted at a time, and held in memory until the client has received them
_INPUT = select.POLLIN


def server_context(certfile: str, keyfile: str) -> ssl.SSLContext | None:
    """The server's TLS context, for TLS 1.2 and later; None: no TLS.

    :param certfile: path of the certificate chain, in PEM; empty: no TLS.
    :param keyfile: path of the private key; empty: it is in ``certfile``.
    :raises OSError: a file cannot be read, or key and certificate do not match (``ssl.SSLError``).
    """
    if not certfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION  # else a TLS 1.2 client could cause handshakes without end
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certfile, keyfile or None, password="")  # never prompt for a password
    return context


class TlsSocket(ClientSocket):
    """A client's socket with TLS.

    :param context: the server's TLS context.
    """

    is_encrypted = True

    def __init__(self, context: ssl.SSLContext, *arguments: Any):
        super().__init__(*arguments)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._established = False
        self.received_plain_http = False
        self._ahead = b""  # plain text that has been decrypted and not yet read
        self._unsent = memoryview(b"")  # encrypted, and not yet accepted by the kernel
        self._written = 0  # bytes of plain text in the encrypted data; they count as sent only when all of it is

    @property
    def is_handshaking(self) -> bool:  # type: ignore[override]  # a constant without TLS
        """Whether a handshake has begun and not yet ended."""
        return self._moved > 0 and not self._established

    @property
    def has_more(self) -> bool:
        """Whether plain text can be read without receiving more."""
        if not self._ahead and self._established and self._incoming.pending:
            with contextlib.suppress(ssl.SSLError):  # the record is incomplete, or the next read reports the error
                self._ahead = self._tls.read(RECORD_SIZE)
        return bool(self._ahead or self._tls.pending())

    def is_ready(self, event: int, seconds: float) -> bool:
        """As :meth:`ClientSocket.is_ready`; bytes that have been received already count."""
        return (event == _INPUT and self.has_more) or super().is_ready(event, seconds)

    # Receiving

    def recv_now(self, size: int, flags: int = 0) -> bytes:
        """The plain text that has come, after the handshake, which takes place here.

        :raises BlockingIOError: nothing has come.
        :raises ConnectionResetError: the client does not speak TLS, or violates the protocol.
        """
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data
        return self._received(lambda: self._tls.read(size)) or b""

    def recv_into_now(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As :meth:`recv_now`, into a buffer; how many bytes."""
        size = nbytes or len(buffer)
        if self._ahead:
            data = self.recv_now(size)
            buffer[: len(data)] = data
            return len(data)
        return self._received(lambda: self._tls.read(size, buffer)) or 0

    def _received(self, read: Any) -> Any:
        """The result of a read, once enough has come; None: the client has closed the connection."""
        while True:
            try:
                self._shake_hands()
                return read()
            except ssl.SSLWantReadError:
                self._answer()
                if not self._take():
                    return None
            except ssl.SSLZeroReturnError:  # close_notify
                return None
            except ssl.SSLError as exc:
                raise self._broken(exc) from exc

    def _shake_hands(self) -> None:
        if not self._established:
            self._tls.do_handshake()
            self._established = True
            self._answer()

    def _answer(self) -> None:
        """Send messages of the TLS protocol itself; if the kernel takes none now, they go with the next data."""
        with contextlib.suppress(BlockingIOError):
            self._flush()

    def _take(self) -> int:
        """Receive encrypted bytes.

        :returns: how many; 0: the client has closed the connection.
        :raises BlockingIOError: nothing has come.
        """
        data = super().recv_now(RECEIVE_SIZE)
        self._incoming.write(data)
        return len(data)

    def _broken(self, error: ssl.SSLError) -> ConnectionResetError:
        if error.reason == "HTTP_REQUEST":
            self.received_plain_http = True
            return ConnectionResetError("HTTP without TLS")
        with contextlib.suppress(OSError):
            self._flush()  # the alert that tells the client
        return ConnectionResetError(f"TLS: {error.reason or error}")

    # Sending

    def send_now(self, data: Any, flags: int = 0) -> int:
        """Encrypt and send.

        :returns: how many bytes of plain text were sent.
        :raises BlockingIOError: the kernel has not accepted all of it; the next call goes on.
        """
        if not self._written:
            self._encrypt(memoryview(data)[:PIECE_SIZE])
        return self._sent()

    def send_file_now(self, fd: int, position: int, count: int) -> int:
        """As :meth:`send_now`, from a file; 0: the file has ended."""
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
        """Send all encrypted data.

        :raises BlockingIOError: the kernel accepts no more now.
        """
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[super().send_now(self._unsent) :]

    def answer_now(self, data: bytes) -> None:
        """Send a refusal as far as possible without blocking: in plain text to a client that does not speak TLS.

        :raises OSError: it cannot be sent.
        """
        if self.received_plain_http:
            super().send_now(data)
        elif self._established:
            self.send_now(data)

    # Closing

    def shutdown(self, how: int) -> None:
        """As of any socket; sends ``close_notify`` first, by which the client detects truncation (RFC 8446, 6.1)."""
        if how == socket.SHUT_WR and self._established:
            with contextlib.suppress(OSError):  # the kernel accepts no more, or the client is gone
                self._close_notify()
        super().shutdown(how)

    def _close_notify(self) -> None:
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()
