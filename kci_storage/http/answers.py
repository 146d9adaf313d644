# SPDX-License-Identifier: LGPL-2.1-or-later
"""Status lines, and the headers that responses have in common, such as those for cross-origin scripts. Pure."""

from __future__ import annotations

import re
from http import HTTPStatus

Header = tuple[str, str]
Headers = list[Header]

# RFC 9110, section 15; before Python 3.13, HTTPStatus has older names for these three.
STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus} | {
    413: "413 Content Too Large",
    414: "414 URI Too Long",
    416: "416 Range Not Satisfiable",
}

NO_STORE = "no-store"
ASK_FIRST = "public, no-cache"  # caches revalidate before each use: a missing file may have been uploaded since
NOSNIFF = ("X-Content-Type-Options", "nosniff")

EXPOSED_HEADERS = (
    "Accept-Ranges, Content-Disposition, Content-Encoding, Content-Length, Content-Range, ETag, Last-Modified, "
    "Repr-Digest, Retry-After, X-Cache, X-Request-ID"
)
# Scripts of any site may read responses. That exposes nothing, since a browser never sends a token on its own.
CORS_HEADERS = (
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Expose-Headers", EXPOSED_HEADERS),
)

REQUEST_HEADERS = "Range, If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since, If-Range, X-Request-ID"
TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # a regular expression (RFC 9110, 5.6.2)
_FIELD_NAMES = re.compile(rf"{TOKEN}(?:[ \t]*,[ \t]*{TOKEN})*")


def preflight(asked: str | None) -> Headers:
    """The headers of the response to a browser's preflight request (Fetch Standard, "CORS-preflight fetch").

    :param asked: ``Access-Control-Request-Headers``: the headers that the request is to have. All of them are
        allowed, since no header makes a public response less public.

    >>> dict(preflight("cache-control, x-a"))["Access-Control-Allow-Headers"]
    'cache-control, x-a'
    """
    allowed = asked if asked and _FIELD_NAMES.fullmatch(asked) else REQUEST_HEADERS
    return [
        ("Access-Control-Allow-Methods", "GET, HEAD"),
        ("Access-Control-Allow-Headers", allowed),
        ("Access-Control-Max-Age", "86400"),
        ("Vary", "Access-Control-Request-Headers"),
    ]
