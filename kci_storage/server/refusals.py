# SPDX-License-Identifier: LGPL-2.1-or-later
"""Responses without the application: to malformed, late or too long heads, and when the application has failed."""

from __future__ import annotations

import re
import time
from typing import Any

from kci_storage.http import problems
from kci_storage.http.answers import NO_STORE, STATUS_LINES
from kci_storage.http.dates import http_date
from kci_storage.http.problems import Problem
from kci_storage.monitoring import logs
from kci_storage.wsgi.exchange import request_id_from

_MESSAGES = {
    400: "this is not HTTP/1.1",
    408: "the request's head took too long",
    414: "the path is too long",
    417: "the only expectation that can be met is 100-continue",
    431: "the headers are too long",
    501: "the only transfer coding is chunked",
}
_FIELDS = re.compile(rb"\r\n(accept|x-request-id):[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.IGNORECASE)
MAX_FIELD_SIZE = 1024  # bytes of a value; longer ones are ignored


def refusal(status: int, address: Any, reason: str = "IncompleteHead", text: str = "", head: bytes = b"") -> bytes:
    """The whole response, after which the connection must be closed. Writes the access line, too.

    :param address: the client's, as ``accept`` returns it.
    :param reason: for the log: the class of the error.
    :param text: the response's text; empty: the usual one for the status.
    :param head: what has come of the request, for what it says of its answer; empty: it is not known.
    """
    text = text or _MESSAGES[status]
    fields = _fields(head)
    request_id = request_id_from(fields.get("x-request-id"))
    answer = _answer(status, text, request_id, fields.get("accept"), head.startswith(b"HEAD "))
    size = len(answer.body)
    logs.log_refusal(address[0] if address else "", status, size, request_id, f"{text}: {reason}")
    return _as_bytes(answer, request_id)


def internal_error(request_id: str) -> bytes:
    """The whole response if the application has failed before it began one. The caller logs the error."""
    return _as_bytes(_answer(500, "internal error", request_id), request_id)


def _answer(
    status: int, text: str, request_id: str, accept: str | None = None, without_body: bool = False
) -> problems.Answer:
    title = STATUS_LINES[status].partition(" ")[2]
    answer = problems.answer(Problem(status, title, text, cache_control=NO_STORE), request_id, accept)
    return answer._replace(body=b"") if without_body else answer


def _as_bytes(answer: problems.Answer, request_id: str) -> bytes:
    headers = [
        ("Date", http_date(int(time.time()))),
        ("Connection", "close"),
        *answer.headers,
        ("X-Request-ID", request_id),
    ]
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {answer.status}\r\n{lines}\r\n".encode("latin-1") + answer.body


def _fields(head: bytes) -> dict[str, str]:
    r"""What a head, which may be malformed, says of its answer.

    :param head: may lack its end, and may have a part of the body behind it.

    >>> _fields(b"GET / HTTP/1.1\r\nAccept: application/json\r\nX-Request")
    {'accept': 'application/json'}
    >>> _fields(b"GET / HTTP/1.1\r\n\r\nAccept: application/json\r\n")
    {}
    """
    end = head.find(b"\r\n\r\n")
    lines = head if end < 0 else head[: end + 2]
    found = ((name.decode().lower(), value.decode("latin-1")) for name, value in _FIELDS.findall(lines))
    return {name: value for name, value in found if len(value) <= MAX_FIELD_SIZE}
