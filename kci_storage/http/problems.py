"""What the body of an error is: one line of text, or problem details (RFC 9457) for those who prefer JSON."""

from __future__ import annotations

import json

from kci_storage.http.accept import prefers_json


def body(status: int, title: str, message: str, accept: str | None) -> tuple[str, bytes]:
    """The content type and the body of an error.

    :param accept: the request's ``Accept``.

    >>> body(404, "Not Found", "no such file", None)
    ('text/plain; charset=utf-8', b'no such file\\n')
    """
    if prefers_json(accept):
        problem = {"type": "about:blank", "title": title, "status": status, "detail": message}
        return "application/problem+json", json.dumps(problem).encode()
    # The body of a 401 is this word alone: existing clients compare it.
    return "text/plain; charset=utf-8", (message if status == 401 else f"{message}\n").encode()
