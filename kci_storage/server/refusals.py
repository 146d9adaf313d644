"""Answers that do not come from the application: to heads that are malformed or late, and when it has failed."""

from __future__ import annotations

from typing import Any

from kci_storage.monitoring import logs
from kci_storage.wsgi.exchange import new_request_id

_REFUSALS = {
    400: ("Bad Request", "this is not HTTP/1.1"),
    408: ("Request Timeout", "the request's head took too long"),
    414: ("URI Too Long", "the path is too long"),
    417: ("Expectation Failed", "the only expectation that can be met is 100-continue"),
    431: ("Request Header Fields Too Large", "the headers are too long"),
    501: ("Not Implemented", "the only transfer coding is chunked"),
}


def refusal(status: int, address: Any, reason: str = "IncompleteHead", text: str = "") -> bytes:
    """The whole answer, after which the connection is to be closed; it is logged.

    :param address: the client's, as of ``accept``.
    :param reason: for the log: the class of what is wrong.
    :param text: what the answer says; empty: what is usual for the status.
    """
    title, usual = _REFUSALS[status]
    text = text or usual
    request_id, body = new_request_id(), f"{text}\n"
    head = (
        f"HTTP/1.1 {status} {title}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nX-Request-ID: {request_id}\r\n\r\n"
    )
    logs.log_refusal(address[0] if address else "", status, len(body), request_id, f"{text}: {reason}")
    return (head + body).encode()


def internal_error(request_id: str) -> bytes:
    """The whole answer to a request when the application failed before it began one; the log is the caller's."""
    body = "internal error\n"
    return (
        "HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nX-Request-ID: {request_id}\r\n\r\n{body}"
    ).encode()
