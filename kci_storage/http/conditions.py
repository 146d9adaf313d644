"""What RFC 9110 says about one request for one version of an object, as pure decisions.

Header values and the version's ETag, time and size go in; a status and byte ranges come out. Nothing here knows a
socket, a file or Flask. No header value, however hostile, raises, except in the two ``parse_`` functions for digests,
whose malformed input is the client's error.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

from kci_storage.errors import BadRequest

MAX_RANGES = 64  # of one request
_MAX_DIGITS = 18  # of an offset; what is longer is beyond any file
_BOUNDED_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")
_BEYOND_ANY_FILE = 10**_MAX_DIGITS


@dataclass(frozen=True, slots=True)
class RequestHeaders:
    """The values of the headers that conditions and ranges are made of; None: not sent."""

    if_match: str | None = None
    if_unmodified_since: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None
    if_range: str | None = None
    range: str | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, Any]) -> RequestHeaders:
        """Those of a WSGI environment.

        >>> RequestHeaders.from_environ({"HTTP_RANGE": "bytes=0-"}).range
        'bytes=0-'
        """
        sent = {field: environ[name] for name, field in _ENVIRON_NAMES if name in environ}
        return cls(**sent) if sent else UNCONDITIONAL


_ENVIRON_NAMES = tuple((f"HTTP_{field.upper()}", field) for field in RequestHeaders.__slots__)
UNCONDITIONAL = RequestHeaders()


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many bytes."""
        return self.stop - self.start

    def content_range(self, size: int) -> str:
        """The value of ``Content-Range``, whose last position is inclusive (RFC 9110 section 14.4).

        :param size: of the whole object, in bytes.

        >>> ByteRange(0, 10).content_range(100)
        'bytes 0-9/100'
        """
        return f"bytes {self.start}-{self.stop - 1}/{size}"


def bounded_range(headers: RequestHeaders) -> ByteRange | None:
    """The one range of which both ends are known, if a request asks for that and nothing else.

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
    """How to answer: 200, 206, 304, 412 or 416; with 206, the one range, or the parts of a multipart body."""

    status: int
    ranges: tuple[ByteRange, ...] = ()


_WHOLE = Decision(200)
_NOT_MODIFIED = Decision(304)
_PRECONDITION_FAILED = Decision(412)
_UNSATISFIABLE = Decision(416)


def decide(method: str, headers: RequestHeaders, etag: str, last_modified: int, size: int) -> Decision:
    """How to answer a request for an object that is there, by RFC 9110 section 13.2.2.

    :param etag: of the present version; strong, without quotes.
    :param last_modified: seconds since the epoch.
    :param size: bytes.

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
    """Whether a PUT or DELETE with these headers depends on what is there."""
    return (headers.if_match, headers.if_none_match, headers.if_unmodified_since) != (None, None, None)


def write_allowed(headers: RequestHeaders, etag: str | None, last_modified: int | None) -> bool:
    """Whether a PUT or DELETE may go on; else it is 412 (RFC 9110 section 13.2.2).

    :param etag: of the version that is there, without quotes; None: there is none.
    :param last_modified: of the same, seconds since the epoch.

    >>> create = RequestHeaders(if_none_match="*")
    >>> write_allowed(create, "v1", 0), write_allowed(create, None, None)
    (False, True)
    """
    if etag is None or last_modified is None:
        return headers.if_match is None  # section 13.1.4: what is not there has no date to compare
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

    A date counts as strong. Section 8.8.2.2 asks that the file did not change twice within its second, which a server
    that keeps only the last version cannot know; but it lets a client send a date only where that client knows of no
    ETag, and every response of ours has one.
    """
    if if_range is None:
        return True
    date = parse_http_date(if_range)
    return date == last_modified if date is not None else _entity_tags(if_range) == [(False, etag)]


# Possessive, as a header of nothing but blanks would else cost the square of its length.
_MEMBER = re.compile(r'[ \t]*+(?:(W/)?"([^"]*)"|([^", \t]*+))[ \t]*+(?:,|\Z)')


def _entity_tags(value: str) -> list[tuple[bool, str]]:
    """The members of a list of entity tags: whether each is weak, and its opaque part.

    A member without quotes, as scripts send it, is taken as a strong tag. A list that is malformed otherwise has no
    members: it then names no version, so that nothing is replaced because of it and no body is held back.
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


_RANGE_SPEC = re.compile(r"([0-9]*)-([0-9]*)\Z")


class _Malformed(Exception):
    """A Range header that is to be ignored as a whole."""


def _select(value: str, size: int) -> Decision:
    """The ranges of a Range header.

    It is ignored, as RFC 9110 section 14.2 always allows, when it is malformed, abusive (more than 64 ranges, or
    together twice the file or more), or for an empty file: no range of nothing is satisfiable, but a client that
    resumes with ``bytes=0-`` means all that there is.
    """
    try:
        asked = _parse_ranges(value, size)
    except _Malformed:
        return _WHOLE
    if size == 0 or sum(part.length for part in asked) >= 2 * size:
        return _WHOLE
    return Decision(206, _coalesce(asked)) if asked else _UNSATISFIABLE


def _parse_ranges(value: str, size: int) -> list[ByteRange]:
    """The satisfiable ranges, in the order asked for, clamped to the size."""
    unit, _, specs = value.partition("=")
    members = [member for text in specs.split(",") if (member := text.strip(" \t"))]
    if unit.lower() != "bytes" or not 0 < len(members) <= MAX_RANGES:
        raise _Malformed
    ranges = [_parse_range(member, size) for member in members]
    return [part for part in ranges if part.length > 0]


def _parse_range(spec: str, size: int) -> ByteRange:
    """One range, clamped; empty when it is unsatisfiable."""
    match = _RANGE_SPEC.match(spec)
    if match is None or spec == "-":
        raise _Malformed
    first, last = (_offset(digits) for digits in match.groups())
    if first is None:
        return ByteRange(max(0, size - (last or 0)), size)
    if last is None:
        return ByteRange(min(first, size), size)
    if last < first:
        raise _Malformed
    return ByteRange(min(first, size), min(last + 1, size))


def _offset(digits: str) -> int | None:
    """A number of bytes; it never reaches the length that ``int`` refuses or takes long for."""
    if not digits:
        return None
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= _MAX_DIGITS else _BEYOND_ANY_FILE


def _coalesce(ranges: list[ByteRange]) -> tuple[ByteRange, ...]:
    """Join those that overlap or touch; else the order asked for is kept (RFC 9110 section 15.3.7.2)."""
    joined: list[tuple[int, ByteRange]] = []
    for place, part in sorted(enumerate(ranges), key=lambda item: item[1].start):
        if joined and part.start <= joined[-1][1].stop:
            first, before = joined.pop()
            place, part = min(place, first), ByteRange(before.start, max(before.stop, part.stop))
        joined.append((place, part))
    return tuple(part for _, part in sorted(joined, key=lambda item: item[0]))


@dataclass(frozen=True, slots=True)
class MultipartRanges:
    """A ``multipart/byteranges`` body (RFC 9110 section 14.6), described without its content.

    :param ranges: the parts; two or more, as one range alone is no multipart body.
    :param size: of the whole object, in bytes.
    :param part_type: the object's content type, which each part repeats.
    :param boundary: of 1 to 70 letters and digits that are not in the content: random ones.
    """

    ranges: tuple[ByteRange, ...]
    size: int
    part_type: str
    boundary: str

    @property
    def content_type(self) -> str:
        """That of the response."""
        return f"multipart/byteranges; boundary={self.boundary}"

    @property
    def content_length(self) -> int:
        """That of the response, in bytes."""
        return sum(len(part) if isinstance(part, bytes) else part.length for part in self.segments)

    @property
    def segments(self) -> tuple[bytes | ByteRange, ...]:
        """What to send, in order: literal bytes, and ranges of the content.

        >>> MultipartRanges((ByteRange(0, 1), ByteRange(8, 9)), 9, "text/plain", "b").segments[0]
        b'--b\\r\\nContent-Type: text/plain\\r\\nContent-Range: bytes 0-0/9\\r\\n\\r\\n'
        """
        return tuple(self._segments())

    def _segments(self) -> Iterator[bytes | ByteRange]:
        before = ""
        for part in self.ranges:
            yield self._literal(f"{before}--{self.boundary}\r\n{self._part_head(part)}\r\n")
            yield part
            before = "\r\n"
        yield self._literal(f"\r\n--{self.boundary}--\r\n")

    def _part_head(self, part: ByteRange) -> str:
        return f"Content-Type: {self.part_type}\r\nContent-Range: {part.content_range(self.size)}\r\n"

    @staticmethod
    def _literal(text: str) -> bytes:
        return text.encode("latin-1", "replace")


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = f"(?P<month>{'|'.join(_MONTHS)})"
_TIME = "(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE | re.ASCII)
    for pattern in (
        rf"[a-z]{{3}}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT\Z",  # IMF-fixdate
        rf"[a-z]{{6,9}}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT\Z",  # RFC 850
        rf"[a-z]{{3}} {_MONTH} (?P<day>[0-9 ][0-9]) {_TIME} (?P<year>[0-9]{{4}})\Z",  # asctime
    )
)
_LAST_DATE = 253402300799  # the end of the year 9999


def http_date(timestamp: int) -> str:
    """A time as an IMF-fixdate; one outside the years 1970 to 9999 as the nearest that has one.

    :param timestamp: seconds since the epoch.

    >>> http_date(784111777)
    'Sun, 06 Nov 1994 08:49:37 GMT'
    """
    return formatdate(min(max(timestamp, 0), _LAST_DATE), usegmt=True)


def parse_http_date(value: str | None, now: float | None = None) -> int | None:
    """The seconds since the epoch of a date in any of HTTP's three formats; None when it is no such date.

    :param now: the time by which a two-digit year is read; None: the clock's. More than 50 years in the future means
        the past (RFC 9110 section 5.6.7).

    >>> parse_http_date("Sunday, 06-Nov-94 08:49:37 GMT"), parse_http_date("yesterday")
    (784111777, None)
    """
    if value is None:
        return None
    match = next((match for date in _DATES if (match := date.match(value.strip(" \t")))), None)
    return None if match is None else _timestamp(match, now)


def _timestamp(match: re.Match[str], now: float | None) -> int | None:
    year, day, hour, minute, second = (int(match[name]) for name in ("year", "day", "hour", "minute", "second"))
    month = _MONTHS.index(match["month"].lower()) + 1
    if len(match["year"]) == 2:
        year = _full_year(year, time.time() if now is None else now)
    if second > 60:  # 60 is a leap second
        return None
    try:
        return int(datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp()) + second
    except ValueError:
        return None


def _full_year(two_digits: int, now: float) -> int:
    latest = time.gmtime(now).tm_year + 50
    return latest - (latest - two_digits) % 100


def etag_header(etag: str) -> str:
    """The value of ``ETag`` for a strong tag.

    >>> etag_header("v1")
    '"v1"'
    """
    return f'"{etag}"'


_WEIGHT = re.compile(r"(?:0(?:\.[0-9]*)?|1(?:\.0*)?)\Z")


def quality(accept: str, media_type: str) -> float:
    """How much an ``Accept`` header wants a media type, 0 to 1, by its most specific member (section 12.5.1).

    >>> quality("text/*;q=0.5, */*;q=0.1", "text/plain"), quality("text/html", "text/plain")
    (0.5, 0.0)
    """
    weights: dict[str, float] = {}
    for member in accept.split(","):
        media_range, *parameters = (part.strip(" \t").lower() for part in member.split(";"))
        weights[media_range] = max(_weight(parameters), weights.get(media_range, 0.0))
    for media_range in (media_type, f"{media_type.partition('/')[0]}/*", "*/*"):
        if media_range in weights:
            return weights[media_range]
    return 0.0


def _weight(parameters: list[str]) -> float:
    value = next((text[2:] for text in parameters if text.startswith("q=")), "1")
    return float(value) if _WEIGHT.match(value) else 0.0


def prefers_json(accept: str | None, over: str = "text/plain") -> bool:
    """Whether a client wants JSON more than what it would get else.

    :param accept: the value of ``Accept``; None, or ``*/*``, prefers nothing.
    :param over: the media type that it would get else.

    >>> prefers_json("application/json"), prefers_json("*/*")
    (True, False)
    """
    if not accept:
        return False
    json = max(quality(accept, "application/json"), quality(accept, "application/problem+json"))
    return json > quality(accept, over)


def parse_content_md5(value: str) -> bytes:
    """The 16 bytes of a ``Content-MD5`` header (RFC 1864).

    :raises BadRequest: it is not the base64 of 16 bytes.
    """
    return _digest("Content-MD5", value.strip(" \t"), 16)


_SF_KEY = r"[a-z*][a-z0-9_.*-]*"
_DIGEST_MEMBER = re.compile(rf"[ \t]*({_SF_KEY})=:([A-Za-z0-9+/=]*):(?:;[ ]*{_SF_KEY}(?:=[^;,\" \t]*)?)*[ \t]*\Z")


def parse_repr_digest(value: str) -> bytes | None:
    """The 32 bytes of ``sha-256`` in a ``Repr-Digest`` header (RFC 9530), the last one if there are several.

    :returns: None when only other algorithms are there.
    :raises BadRequest: it is no dictionary of byte sequences (RFC 8941), or the digest has another length.
    """
    digest = None
    for text in value.split(",") if value.strip(" \t") else ():
        member = _DIGEST_MEMBER.match(text)
        if member is None:
            raise BadRequest("Repr-Digest is not a list of digests such as sha-256=:<base64>:")
        if member[1] == "sha-256":
            digest = member[2]
    return None if digest is None else _digest("Repr-Digest", digest, 32)


def repr_digest_header(sha256: str) -> str:
    """The value of ``Repr-Digest`` (RFC 9530).

    :param sha256: hex.

    >>> repr_digest_header("00" * 32)
    'sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:'
    """
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def _digest(header: str, text: str, length: int) -> bytes:
    padding = "=" * (-len(text) % 4)  # RFC 8941 section 4.2.7 asks to do without it
    try:
        digest = base64.b64decode(text + padding, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != length:
        raise BadRequest(f"{header} has no base64 of {length} bytes")
    return digest
