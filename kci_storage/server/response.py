"""How a response leaves: gunicorn's own class, without what a small file need not pay for.

- Headers that were found right once are not checked again, and their lines are kept.
- A small file leaves together with its head, in one system call; a large one by ``sendfile``.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

from gunicorn import util
from gunicorn.http import wsgi

from kci_storage.net.bodies import SentFile
from kci_storage.wsgi.exchange import is_content_length

Header = tuple[str, str]

REMEMBERED_HEADERS = 16_384  # that were found right; about 300 bytes each
REMEMBERED_HEADS = 4096  # all headers of a response; about 2 KiB each
UNIQUE = "X-Request-ID"  # the last one; never the same twice, and right since it was made or matched by us


class Checked(NamedTuple):
    """The headers of a response that go out."""

    headers: tuple[Header, ...]
    length: int | None  # bytes of the body
    lines: str  # the headers as they are sent


class Response(wsgi.Response):
    """A response of gunicorn's."""

    _lines: str | None = None  # of the headers, as they are sent; None: they are to be made of them

    def process_headers(self, headers: list[Header]) -> None:
        """Check and take the application's headers; gunicorn drops those that are between it and its peer."""
        unique = headers[-1:] if headers and headers[-1][0] == UNIQUE else []
        checked = _checked(tuple(headers[: len(headers) - len(unique)]))
        self.headers = [*checked.headers, *unique]
        self.response_length = checked.length
        self._lines = checked.lines + _lines(unique)

    def start_response(self, status: str, headers: list[Header], exc_info: Any = None) -> Any:
        """As gunicorn's, which may take a header away again."""
        write = super().start_response(status, headers, exc_info)
        if self.status_code < 200 or self.status_code == 204:
            self._lines = None
        return write

    def sendfile(self, respiter: Any) -> bool:
        """Send the head and the file; False when the body must be read instead."""
        file = respiter.filelike
        if self.cfg.is_ssl or self._omits_body or not isinstance(file, SentFile) or self.response_length is None:
            return bool(super().sendfile(respiter))
        self.headers_sent = True
        file.send_to(self.sock, self._head(), self.response_length)
        return True

    def send_headers(self) -> None:
        """Send the head, unless that has been done."""
        if not self.headers_sent:
            self.sock.sendall(self._head())
            self.headers_sent = True

    def _head(self) -> bytes:
        lines = _lines(self.headers) if self._lines is None else self._lines
        return f"{''.join(self.default_headers())}{lines}\r\n".encode("latin-1")

    def default_headers(self) -> list[str]:
        """As gunicorn's, but the date is not worked out anew for each response of a second."""
        major, minor = self.req.version
        connection = "close" if self.should_close() else "keep-alive"
        framing = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        return [
            f"HTTP/{major}.{minor} {self.status}\r\nServer: {self.version}\r\nDate: {_date(int(time.time()))}\r\n",
            f"Connection: {connection}\r\n{framing}",
        ]


@functools.lru_cache(2)
def _date(seconds: int) -> str:
    return util.http_date(seconds)


def _lines(headers: list[Header]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers)


@functools.lru_cache(REMEMBERED_HEADS)
def _checked(headers: tuple[Header, ...]) -> Checked:
    length = next((int(value) for name, value in headers if is_content_length(name)), None)
    kept = [header for header in headers if is_content_length(header[0]) or _may_be_sent(*header)]
    return Checked(tuple(kept), length, _lines(kept))


@functools.lru_cache(REMEMBERED_HEADERS)
def _may_be_sent(name: str, value: str) -> bool:
    """Whether a header of the application's goes out; gunicorn has some of its own.

    :raises gunicorn.http.errors.InvalidResponseHeader: it would break the response.
    """
    response = wsgi.Response(None, None, None)
    response.process_headers([(name, value)])
    return bool(response.headers)
