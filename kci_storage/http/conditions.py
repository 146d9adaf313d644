# SPDX-License-Identifier: LGPL-2.1-or-later
"""Conditional requests and range requests (RFC 9110, sections 13 and 14), as pure decisions.

Header values and the version's ETag, time and size go in; a status and byte ranges come out. No header value, however
malformed, raises an exception.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kci_storage.http.dates import parse_http_date
from kci_storage.http.ranges import ByteRange, MalformedRange, coalesce, parse_ranges

_BOUNDED_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")


@dataclass(frozen=True, slots=True)
class RequestHeaders:
    """The values of the headers for conditions and ranges; None: not sent."""

    if_match: str | None = None
    if_unmodified_since: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None
    if_range: str | None = None
    range: str | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, Any]) -> RequestHeaders:
        """The headers in a WSGI environment.

        >>> RequestHeaders.from_environ({"HTTP_RANGE": "bytes=0-"}).range
        'bytes=0-'
        """
        sent = {field: environ[name] for name, field in _ENVIRON_NAMES if name in environ}
        return cls(**sent) if sent else UNCONDITIONAL


_ENVIRON_NAMES = tuple((f"HTTP_{field.upper()}", field) for field in RequestHeaders.__slots__)
UNCONDITIONAL = RequestHeaders()


def bounded_range(headers: RequestHeaders) -> ByteRange | None:
    """The one range with both ends given, if a request asks for that and has no condition; else None.

    >>> bounded_range(RequestHeaders(range="bytes=5-9"))
    ByteRange(start=5, stop=10)
    >>> bounded_range(RequestHeaders(range="bytes=5-")), bounded_range(RequestHeaders(range="bytes=9-5"))
    (None, None)
    """
    found = _BOUNDED_RANGE.fullmatch(headers.range or "")
    if found is None or headers != RequestHeaders(range=headers.range):
        return None
    wanted = ByteRange(int(found[1]), int(found[2]) + 1)
    return wanted if wanted.length > 0 else None


@dataclass(frozen=True, slots=True)
class Decision:
    """The status (200, 206, 304, 412 or 416) and, with 206, the one range or the parts of a multipart body."""

    status: int
    ranges: tuple[ByteRange, ...] = ()


_WHOLE = Decision(200)
_NOT_MODIFIED = Decision(304)
_PRECONDITION_FAILED = Decision(412)
_UNSATISFIABLE = Decision(416)


def decide(method: str, headers: RequestHeaders, etag: str, last_modified: int, size: int) -> Decision:
    """The decision on a request for an object that exists (RFC 9110 section 13.2.2).

    :param etag: of the current version; strong, without quotes.
    :param last_modified: of the current version, in seconds since the epoch.
    :param size: of the current version, in bytes.

    >>> decide("GET", RequestHeaders(range="bytes=-1000"), "v1", 0, 100)
    Decision(status=206, ranges=(ByteRange(start=0, stop=100),))
    >>> decide("GET", RequestHeaders(if_none_match='W/"v1"', range="bytes=0-9"), "v1", 0, 100)
    Decision(status=304, ranges=())
    """
    if headers is UNCONDITIONAL or headers == UNCONDITIONAL:
        return _WHOLE
    if not _is_wanted_version(headers, etag, last_modified):
        return _PRECONDITION_FAILED
    if _is_known_version(method, headers, etag, last_modified):
        return _NOT_MODIFIED if method in ("GET", "HEAD") else _PRECONDITION_FAILED
    if method == "GET" and headers.range is not None and _range_applies(headers.if_range, etag, last_modified):
        return _select(headers.range, size)
    return _WHOLE


def conditional_write(headers: RequestHeaders) -> bool:
    """Whether a PUT or DELETE with these headers depends on the current version."""
    return (headers.if_match, headers.if_none_match, headers.if_unmodified_since) != (None, None, None)


def write_allowed(headers: RequestHeaders, etag: str | None, last_modified: int | None) -> bool:
    """Whether the conditions of a PUT or DELETE hold; if not, the status is 412 (RFC 9110 section 13.2.2).

    :param etag: of the current version, without quotes; None: the object does not exist.
    :param last_modified: of the current version, in seconds since the epoch; None: the object does not exist.

    >>> create = RequestHeaders(if_none_match="*")
    >>> write_allowed(create, "v1", 0), write_allowed(create, None, None)
    (False, True)
    """
    if etag is None or last_modified is None:
        return headers.if_match is None  # section 13.1.4: without a date, If-Unmodified-Since is ignored
    return decide("PUT", headers, etag, last_modified, size=0) != _PRECONDITION_FAILED


def _is_wanted_version(headers: RequestHeaders, etag: str, last_modified: int) -> bool:
    """Steps 1 and 2 of RFC 9110 section 13.2.2: whether the client's If-Match or If-Unmodified-Since holds."""
    if headers.if_match is not None:
        return _names_strongly(headers.if_match, etag)
    limit = parse_http_date(headers.if_unmodified_since)
    return limit is None or last_modified <= limit


def _is_known_version(method: str, headers: RequestHeaders, etag: str, last_modified: int) -> bool:
    """Steps 3 and 4: whether the client has this version already."""
    if headers.if_none_match is not None:
        return _names_weakly(headers.if_none_match, etag)
    if method not in ("GET", "HEAD"):
        return False
    known = parse_http_date(headers.if_modified_since)
    return known is not None and last_modified <= known


def _range_applies(if_range: str | None, etag: str, last_modified: int) -> bool:
    """Step 5: whether If-Range, if sent, names exactly this version (section 13.1.5).

    A date counts as a strong validator. Section 8.8.2.2 demands that the file did not change twice within that
    second, which a server that keeps only the last version cannot know. But a client may send a date only if it has
    no ETag (section 13.1.5), and all our responses have one.
    """
    if if_range is None:
        return True
    date = parse_http_date(if_range)
    return date == last_modified if date is not None else _entity_tags(if_range) == [(False, etag)]


# Possessive quantifiers: without them, a header of blanks alone would take quadratic time.
_MEMBER = re.compile(r'[ \t]*+(?:(W/)?"([^"]*)"|([^", \t]*+))[ \t]*+(?:,|\Z)')


def _entity_tags(value: str) -> list[tuple[bool, str]]:
    """The members of a list of entity tags: whether each is weak, and its opaque part.

    A member without quotes, as some scripts send it, counts as a strong tag. A list that is malformed otherwise has
    no members: it then matches no version, so it never permits a write, and never leads to a response without a body.
    """
    tags = []
    position = 0
    while position < len(value):
        member = _MEMBER.match(value, position)
        if member is None:
            return []
        weak, quoted, bare = member.groups()
        if quoted is not None or bare:
            tags.append((weak is not None, bare if quoted is None else quoted))
        position = member.end()
    return tags


def _names_strongly(value: str, etag: str | None) -> bool:
    if etag is None:
        return False
    return value.strip(" \t") == "*" or (False, etag) in _entity_tags(value)


def _names_weakly(value: str, etag: str | None) -> bool:
    if etag is None:
        return False
    return value.strip(" \t") == "*" or any(tag == etag for _, tag in _entity_tags(value))


def _select(value: str, size: int) -> Decision:
    """The decision on a Range header.

    The header is ignored, as RFC 9110 section 14.2 always allows, if it is malformed or abusive (more than 64 ranges,
    or twice the file's size or more in all), or if the file is empty: no range of an empty file is satisfiable, but a
    client that resumes with ``bytes=0-`` wants the whole file.
    """
    try:
        asked = parse_ranges(value, size)
    except MalformedRange:
        return _WHOLE
    if size == 0 or sum(part.length for part in asked) >= 2 * size:
        return _WHOLE
    return Decision(206, coalesce(asked)) if asked else _UNSATISFIABLE


def etag_header(etag: str) -> str:
    """The value of ``ETag`` for a strong tag.

    >>> etag_header("v1")
    '"v1"'
    """
    return f'"{etag}"'
