# SPDX-License-Identifier: LGPL-2.1-or-later
"""What answers have in common: their status lines, and the headers of all that scripts of any site may read. Pure."""

from __future__ import annotations

import re
from http import HTTPStatus

Header = tuple[str, str]
Headers = list[Header]

# By RFC 9110, section 15; two of Python's names are older before Python 3.13.
STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus} | {
    413: "413 Content Too Large",
    414: "414 URI Too Long",
    416: "416 Range Not Satisfiable",
}

NO_STORE = "no-store"
ASK_FIRST = "public, no-cache"  # a missing file may be there at the next look
NOSNIFF = ("X-Content-Type-Options", "nosniff")

EXPOSED_HEADERS = (
    "Accept-Ranges, Content-Disposition, Content-Encoding, Content-Length, Content-Range, ETag, Last-Modified, "
    "Repr-Digest, Retry-After, X-Cache, X-Request-ID"
)
# Answers may be read by scripts of any site; a token is never sent by a browser on its own.
CORS_HEADERS = (
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Expose-Headers", EXPOSED_HEADERS),
)

REQUEST_HEADERS = "Range, If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since, If-Range, X-Request-ID"
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # RFC 9110, 5.6.2
_FIELD_NAMES = re.compile(rf"{_TOKEN}(?:[ \t]*,[ \t]*{_TOKEN})*")


def preflight(asked: str | None) -> Headers:
    """What a browser is told that asks before a request from another site (CORS, "CORS-preflight fetch").

    :param asked: ``Access-Control-Request-Headers``: what the request is to have. All of them are allowed, since
        none makes a public answer less public.

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
