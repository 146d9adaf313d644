# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sending a response: turns the application's WSGI response into HTTP/1.1 (RFC 9112), at little cost.

- Headers that have been validated once are cached together with their lines.
- A small file is sent together with the head, by one system call; a large one by ``sendfile``.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from email.utils import formatdate
from typing import Any, NamedTuple, Protocol

from kci_storage.http.answers import TOKEN
from kci_storage.net.bodies import SentFile
from kci_storage.wsgi.exchange import is_content_length

Header = tuple[str, str]

SERVER = "gunicorn"
HIGHEST_VERSION = (1, 1)  # of HTTP that this server speaks, also with clients of a later 1.x (RFC 9110, 6.2)
REMEMBERED_HEADERS = 16_384  # validated headers in the cache; about 300 bytes each
REMEMBERED_HEADS = 4096  # responses' headers in the cache; about 2 KiB each
UNIQUE = "X-Request-ID"  # the last header: different each time, so not cached, and valid already
PIECE_SIZE = 64 * 1024  # bytes of a read, for a file that is not sent by sendfile

_STATUS = re.compile(r"[1-9][0-9]{2}(?: [\t\x20-\x7e\x80-\xff]*)?")
_NAME = re.compile(TOKEN)
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110, 5.5
# Hop-by-hop headers, and those that this server sets itself; the application's are dropped.
_OWN = frozenset(
    {
        "connection", "date", "keep-alive", "proxy-authenticate", "proxy-authorization", "server", "te", "trailer",
        "trailers", "transfer-encoding", "upgrade",
    }
)  # fmt: skip


class Socket(Protocol):
    """A client's socket."""

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of it; a client without progress counts as gone."""

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a part of a file; how many bytes were sent, or will be."""

    def reset(self) -> None:
        """End the connection so that the client sees that the body is incomplete."""


class Checked(NamedTuple):
    """The validated headers of a response."""

    length: int | None  # bytes of the body
    lines: str  # the headers as they are sent
    without_length: str  # the same without Content-Length


class WrappedFile:
    """The server's ``wsgi.file_wrapper``: a body that is sent by ``sendfile`` if possible (PEP 3333)."""

    def __init__(self, filelike: Any, block_size: int = PIECE_SIZE):
        self.filelike = filelike
        self._block_size = block_size

    def __iter__(self) -> Iterator[bytes]:
        return iter(functools.partial(self.filelike.read, self._block_size), b"")

    def close(self) -> None:
        """Close the file, if it has a ``close`` method."""
        if hasattr(self.filelike, "close"):
            self.filelike.close()


class Response:
    """A WSGI response on its way to the client.

    :param sock: the client's socket.
    :param method: the request's method.
    :param version: the request's HTTP version.
    :param keep: whether the connection may be kept.
    """

    def __init__(self, sock: Socket, method: str, version: tuple[int, int], keep: bool):
        self._sock = sock
        self._is_head = method == "HEAD"
        self._version = version
        self._keep = keep
        self._status = ""
        self._headers = Checked(None, "", "")
        self._unique = ""  # the line of the header UNIQUE
        self._has_body = self._is_chunked = self._ends_with_connection = False
        self._sent = 0  # bytes of the body
        self.headers_sent = False

    @property
    def keep(self) -> bool:
        """Whether the connection can be kept."""
        return self._keep

    def force_close(self) -> None:
        """Close the connection after this response."""
        self._keep = False

    # Called by the application

    def start_response(self, status: str, headers: list[Header], exc_info: Any = None) -> Callable[[bytes], None]:
        """Set the status and the headers (PEP 3333).

        :raises ValueError: one of them is invalid; the message names the header, but not its value.
        """
        if exc_info and self.headers_sent:
            raise exc_info[1].with_traceback(exc_info[2])
        if self._status and not exc_info:
            raise AssertionError("the response has begun already")
        if not _STATUS.fullmatch(status):
            raise ValueError(f"not a status: {status!r}")
        self._status = status
        unique = headers[-1:] if headers and headers[-1][0] == UNIQUE else []
        self._headers = _checked(tuple(headers[: len(headers) - len(unique)]))
        self._unique = _lines(unique)
        self._frame(int(status[:3]))
        return self.write

    def _frame(self, status: int) -> None:
        """Choose how the client will find the body's end (RFC 9112, 6.3)."""
        if status < 200 or status == 204:
            self._headers = Checked(None, self._headers.without_length, self._headers.without_length)
        self._has_body = not (self._is_head or status < 200 or status in (204, 304))
        self._is_chunked = self._has_body and self._headers.length is None and self._version > (1, 0)
        self._ends_with_connection = self._has_body and self._headers.length is None and not self._is_chunked
        self._keep = self._keep and not self._ends_with_connection

    # Sending

    def send(self, body: Iterable[bytes]) -> None:
        """Send the response.

        A body with neither a length nor chunks ends with the connection. If such a body fails, the connection is
        reset, since an orderly close would mean that the body is complete (RFC 9112, 8).
        """
        try:
            self._send(body)
        except BaseException:
            if self.headers_sent and self._ends_with_connection:
                self._sock.reset()
            raise

    def _send(self, body: Iterable[bytes]) -> None:
        if isinstance(body, WrappedFile) and self._send_file(body.filelike):
            return
        for data in body:
            self.write(data)
        self._end()

    def _send_file(self, file: Any) -> bool:
        """Send a file by ``sendfile``, or a body that can send itself; False: it must be read instead."""
        length = self._headers.length
        if not self._has_body:
            self._send_head()
        elif length is None:
            return False
        elif isinstance(file, SentFile):
            self.headers_sent = True
            file.send_to(self._sock, self._head(), length)  # type: ignore[arg-type]  # Socket is all that it uses
        elif not _has_descriptor(file):
            return False
        else:
            self._send_head()
            self._sent = self._sock.sendfile(file, os.lseek(file.fileno(), 0, os.SEEK_CUR), length)
            self._keep = self._keep and self._sent == length
        return True

    def write(self, data: bytes) -> None:
        """Send a piece of the body, but never more than ``Content-Length`` in all."""
        self._send_head()
        if self._headers.length is not None:
            data = data[: self._headers.length - self._sent]
        if data and self._has_body:
            self._sent += len(data)
            self._sock.sendall(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    def _end(self) -> None:
        self._send_head()
        if self._is_chunked:
            self._sock.sendall(b"0\r\n\r\n")
        elif self._has_body and self._sent != self._headers.length:
            self._keep = False  # the body is incomplete

    def _send_head(self) -> None:
        if not self.headers_sent:
            self.headers_sent = True
            self._sock.sendall(self._head())

    def _head(self) -> bytes:
        assert self._status, "the application has not begun a response"
        connection = "keep-alive" if self._keep else "close"
        major, minor = min(self._version, HIGHEST_VERSION)
        framing = "Transfer-Encoding: chunked\r\n" if self._is_chunked else ""
        return (
            f"HTTP/{major}.{minor} {self._status}\r\nServer: {SERVER}\r\nDate: {_date(int(time.time()))}\r\n"
            f"Connection: {connection}\r\n{framing}{self._headers.lines}{self._unique}\r\n"
        ).encode("latin-1")


def _has_descriptor(file: Any) -> bool:
    try:
        return bool(file.fileno() >= 0)
    except (AttributeError, OSError):
        return False


@functools.lru_cache(2)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


def _lines(headers: Iterable[Header]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers)


@functools.lru_cache(REMEMBERED_HEADS)
def _checked(headers: tuple[Header, ...]) -> Checked:
    length = next((int(value) for name, value in headers if is_content_length(name)), None)
    kept = [header for header in headers if is_content_length(header[0]) or _may_be_sent(*header)]
    return Checked(length, _lines(kept), _lines(header for header in kept if not is_content_length(header[0])))


@functools.lru_cache(REMEMBERED_HEADERS)
def _may_be_sent(name: str, value: str) -> bool:
    """Whether a header of the application's is sent.

    :raises ValueError: it is invalid.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a header's name: {name!r}")
    if not _VALUE.fullmatch(value):
        raise ValueError(f"a header's value that cannot be sent: {name}")
    return name.lower() not in _OWN
