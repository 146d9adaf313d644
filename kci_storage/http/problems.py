# SPDX-License-Identifier: LGPL-2.1-or-later
"""Error responses: the one place that gives an error its status line, headers and body. Pure.

The body is one line of text; problem details (RFC 9457) for clients that prefer JSON; a small page for browsers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from string import Template
from typing import NamedTuple

from kci_storage.errors import (
    ProtocolError,
    Refused,
    StorageError,
    Unauthorized,
    UnsupportedContentEncoding,
    meaning,
)
from kci_storage.http.accept import preferred
from kci_storage.http.answers import ASK_FIRST, CORS_HEADERS, NO_STORE, NOSNIFF, STATUS_LINES, Header, Headers
from kci_storage.keys import ROOT_URL

TEXT, PAGE = "text/plain", "text/html"
JSON = ("application/problem+json", "application/json")  # a client that asks for either gets the first
OWN_ROUTES = "/v1/"

# Headers of some errors.
_HEADERS: dict[type[StorageError], Header] = {
    Unauthorized: ("WWW-Authenticate", 'Bearer realm="kci-storage"'),
    UnsupportedContentEncoding: ("Accept-Encoding", "identity"),
}
# The page runs, fetches and embeds nothing.
_PAGE_HEADERS = (
    ("Content-Security-Policy", "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("Referrer-Policy", "no-referrer"),
)
_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>$status</title>
</head>
<body>
<h1>$status</h1>
<p>$message</p>
<p>$links</p>
<p>Request ID: <code>$request_id</code></p>
</body>
</html>
""")


class Problem(NamedTuple):
    """An error in terms of HTTP."""

    status: int
    title: str  # the same for all errors of a kind (RFC 9457, 3.1.4)
    message: str  # one line for the client: what is wrong and, where it helps, what to do
    headers: Iterable[Header] = ()  # in addition to those of every error
    cache_control: str = ASK_FIRST


class Answer(NamedTuple):
    """A response to an error."""

    status: str  # the status line's code and reason
    headers: Headers
    body: bytes  # must not be sent in response to HEAD


def of(error: StorageError) -> Problem:
    """An error in terms of HTTP.

    >>> of(StorageError("broken", retry_after=7)).headers
    [('Retry-After', '7')]
    """
    kind = meaning(error)
    headers = [header for cls, header in _HEADERS.items() if isinstance(error, cls)]
    if error.retry_after is not None:
        headers.append(("Retry-After", str(error.retry_after)))
    is_private = isinstance(error, Unauthorized | Refused | ProtocolError)
    return Problem(kind.status, kind.title, error.message, headers, NO_STORE if is_private else ASK_FIRST)


def answer(problem: Problem, request_id: str, accept: str | None = None, path: str = "") -> Answer:
    """The whole response, except ``Date`` and ``X-Request-ID``, which all responses get in one place.

    :param request_id: the request's, which leads to its line in the log.
    :param accept: the request's ``Accept``.
    :param path: the request's, without percent-encoding; empty: it is not known.
    """
    content_type, content = body(problem, request_id, accept, path)
    further = _PAGE_HEADERS if content_type.startswith(PAGE) else ()
    lines = [*headers(problem, content_type, len(content)), ("Vary", "Accept"), *further]
    return Answer(STATUS_LINES[problem.status], lines, content)


def headers(problem: Problem, content_type: str, size: int) -> Headers:
    """The headers of every error response, whatever its body.

    :param size: of the body, in bytes.
    """
    return [
        ("Content-Type", content_type),
        ("Content-Length", str(size)),
        ("Cache-Control", problem.cache_control),
        NOSNIFF,
        *CORS_HEADERS,
        *problem.headers,
    ]


def body(problem: Problem, request_id: str, accept: str | None, path: str = "") -> tuple[str, bytes]:
    r"""The content type and the body that a client prefers; the parameters are those of :func:`answer`.

    >>> body(Problem(404, "Not Found", "no such file"), "1", None)
    ('text/plain; charset=utf-8', b'no such file\n')
    """
    status, title, message, *_ = problem
    wanted = preferred(accept, (TEXT, *JSON, PAGE))
    if wanted in JSON:
        details = {"type": "about:blank", "title": title, "status": status, "detail": message}
        return JSON[0], json.dumps(details).encode()
    if wanted == PAGE:
        return f"{PAGE}; charset=utf-8", _page(problem, request_id, path).encode()
    # The text of a 401 has no line break: existing clients compare it.
    return f"{TEXT}; charset=utf-8", (message if status == 401 else f"{message}\n").encode()


def _page(problem: Problem, request_id: str, path: str) -> str:
    links = [f'<a href="{escape(url)}">{name}</a>' for name, url in _links(path)]
    return _PAGE.substitute(
        status=STATUS_LINES[problem.status],
        message=escape(problem.message),
        links=" · ".join(links),
        request_id=escape(request_id),
    )


def _links(path: str) -> list[tuple[str, str]]:
    """The links of an error page. The folder's URL is relative, so the path need not be encoded.

    >>> _links("/a/b"), _links("/a/b/")[0], _links("/b")
    ([('folder', './'), ('top', '/v1/browse/')], ('folder', '../'), [('top', '/v1/browse/')])
    """
    top = [("top", ROOT_URL)]
    if path.rstrip("/").count("/") < 2 or path.startswith(OWN_ROUTES):
        return top
    return [("folder", "../" if path.endswith("/") else "./"), *top]
