"""How a response leaves: gunicorn's own class, without what a small file need not pay for.

- A header that was found right once is not checked again.
- A small file leaves together with its head, in one system call; a large one by ``sendfile``.
"""

from __future__ import annotations

import functools
from typing import Any

from gunicorn.http import wsgi

from kci_storage.transport import SentFile, is_content_length

REMEMBERED_HEADERS = 16_384  # that were found right; about 300 bytes each
UNIQUE = "X-Request-ID"  # never the same twice, and right since it was made or matched by us


class Response(wsgi.Response):
    """A response of gunicorn's."""

    def process_headers(self, headers: list[tuple[str, str]]) -> None:
        """Check and take the application's headers; gunicorn drops those that are between it and its peer."""
        for header in headers:
            name, value = header
            if is_content_length(name):
                self.response_length = int(value)
            elif name != UNIQUE and not _may_be_sent(name, value):
                continue
            self.headers.append(header)

    def sendfile(self, respiter: Any) -> bool:
        """Send the head and the file; False when the body must be read instead."""
        file = respiter.filelike
        if self.cfg.is_ssl or self._omits_body or not isinstance(file, SentFile) or self.response_length is None:
            return bool(super().sendfile(respiter))
        self.headers_sent = True
        file.send_to(self.sock, self._head(), self.response_length)
        return True

    def _head(self) -> bytes:
        lines = self.default_headers()
        lines += [f"{name}: {value}\r\n" for name, value in self.headers]
        lines.append("\r\n")
        return "".join(lines).encode("latin-1")


@functools.lru_cache(REMEMBERED_HEADERS)
def _may_be_sent(name: str, value: str) -> bool:
    """Whether a header of the application's goes out; gunicorn has some of its own.

    :raises gunicorn.http.errors.InvalidResponseHeader: it would break the response.
    """
    response = wsgi.Response(None, None, None)
    response.process_headers([(name, value)])
    return bool(response.headers)
