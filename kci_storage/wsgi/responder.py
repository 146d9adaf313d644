# SPDX-License-Identifier: LGPL-2.1-or-later
"""The response to a download: the one place that turns a content and a request's conditions into a WSGI response.

It is independent of the framework, since downloads are answered without one (:mod:`kci_storage.wsgi.downloads`).
"""

from __future__ import annotations

import enum
import functools
import itertools
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from kci_storage.drivers.base import ObjectInfo
from kci_storage.fills.fill import Region
from kci_storage.http import media
from kci_storage.http.answers import CORS_HEADERS, NOSNIFF, Headers
from kci_storage.http.conditions import Decision, RequestHeaders, decide, etag_header
from kci_storage.http.dates import http_date
from kci_storage.http.digest_fields import repr_digest_header
from kci_storage.http.problems import Problem
from kci_storage.http.ranges import ByteRange, MultipartRanges
from kci_storage.net.bodies import SentFile, SentSegments
from kci_storage.store.contents import Content, FileContent
from kci_storage.wsgi.exchange import CONNECTION, EXCHANGE

FileWrapper = Callable[..., Iterable[bytes]]

SEND_DIRECTLY = "HTTP_X_SEND_DIRECTLY"  # nginx sets it when it could not open the file: replaced, or not readable
_PLAIN_RANGE = re.compile(r"bytes=(?:[0-9]{1,15}-[0-9]{0,15}|-[0-9]{1,15})")
REMEMBERED_VERSIONS = 10_000  # versions whose headers are cached; about 1 KiB each


class DownloadResponse(NamedTuple):
    """A WSGI response."""

    status: int
    headers: Headers
    body: Iterable[bytes]


class Purpose(enum.Enum):
    """How the client wants a file, as its query says."""

    DOWNLOAD = "download"  # as stored; a browser shows the types that are safe to show
    ATTACHMENT = "attachment"  # ?download=1: a browser saves it
    READING = "reading"  # ?view=1: a browser unpacks and shows a compressed text


class Responder:
    """Makes the responses to downloads.

    :param cache_control: the ``Cache-Control`` of all of them.
    :param cache_directory: the folder with the copies.
    :param accel_redirect: nginx's internal location over that folder, if nginx in front sends the copies; else empty.
    """

    def __init__(self, cache_control: str, cache_directory: Path, accel_redirect: str = ""):
        self._cache_control = cache_control
        self._common = (("Cache-Control", cache_control), NOSNIFF, *CORS_HEADERS)
        self._cache_directory = cache_directory
        self._accel_redirect = accel_redirect

    def respond(self, content: Content, environ: dict[str, Any], conditions: RequestHeaders) -> DownloadResponse:
        """The response to a ``GET`` or ``HEAD`` of an object (RFC 9110, sections 13 and 14).

        The response owns the content from now on, and closes it at the body's end.

        :raises ObjectChanged: the version is gone; nothing has been sent.
        """
        info, method = content.info, environ["REQUEST_METHOD"]
        decision = decide(method, conditions, info.etag, info.last_modified, info.size)
        if decision.status == 416:
            content.close()
            return self._unsatisfiable(content, environ)
        headers = [*_validators(info), ("X-Cache", content.status.value), *self._common]
        if decision.status in (304, 412):
            content.close()
            if decision.status == 412:  # a 304 has no body, and so no Content-Length
                headers.append(("Content-Length", "0"))
            return DownloadResponse(decision.status, headers, ())
        headers += _descriptors(info, purpose(environ["QUERY_STRING"]))
        if self._accel_redirect and isinstance(content, FileContent) and content.path is not None:
            if _nginx_agrees(environ, conditions, decision):
                return self._by_nginx(content, content.path, headers, decision)
        if len(decision.ranges) > 1:
            return _several_ranges(content, decision.ranges, headers, _file_wrapper(environ))
        return _one_range(content, decision, headers, method, _file_wrapper(environ))

    def _unsatisfiable(self, content: Content, environ: dict[str, Any]) -> DownloadResponse:
        """The answer to a range that lies beyond the end (RFC 9110, 15.5.17)."""
        info, message = content.info, f"the file has {content.info.size} bytes"
        headers = (
            *_validators(info),
            ("X-Cache", content.status.value),
            ("Content-Range", f"bytes */{info.size}"),
        )
        problem = Problem(416, "Range Not Satisfiable", message, headers, self._cache_control)
        answer = environ[EXCHANGE].answer(problem)
        return DownloadResponse(416, answer.headers, () if environ["REQUEST_METHOD"] == "HEAD" else (answer.body,))

    def _by_nginx(self, content: FileContent, path: str, headers: Headers, decision: Decision) -> DownloadResponse:
        """Have nginx send the file, or the part of it that the request's ``Range`` asks for (X-Accel-Redirect)."""
        location = self._accel_redirect + os.path.relpath(path, self._cache_directory)
        content.close()
        if decision.status == 200:  # nginx adds it itself, except to a 206
            headers = [header for header in headers if header[0] != "Accept-Ranges"]
        return DownloadResponse(200, [*headers, ("X-Accel-Redirect", location), ("Content-Length", "0")], ())


def _file_wrapper(environ: dict[str, Any]) -> FileWrapper | None:
    """The wrapper by which our own worker sends a file by ``sendfile``; None: another server answers, and gets bytes.

    Another server may have no such wrapper, and PEP 3333 does not say what a wrapper does with a file of which only a
    part is to be sent.
    """
    return environ["wsgi.file_wrapper"] if CONNECTION in environ else None


def _nginx_agrees(environ: dict[str, Any], conditions: RequestHeaders, decision: Decision) -> bool:
    """Whether nginx, given the file, would come to the same decision.

    It does not know the version's ETag, so it cannot evaluate conditions; and it treats unusual and multiple ranges
    in its own way.
    """
    if environ["REQUEST_METHOD"] != "GET" or SEND_DIRECTLY in environ:
        return False
    if conditions != RequestHeaders(range=conditions.range):
        return False
    if conditions.range is None:
        return decision.status == 200
    return decision.status == 206 and _PLAIN_RANGE.fullmatch(conditions.range) is not None


@functools.lru_cache(REMEMBERED_VERSIONS)
def _validators(info: ObjectInfo) -> tuple[tuple[str, str], ...]:
    """The headers about the version, which every response has."""
    return (
        ("ETag", etag_header(info.etag)),
        ("Last-Modified", http_date(info.last_modified)),
        ("Accept-Ranges", "bytes"),
    )


@functools.lru_cache(REMEMBERED_VERSIONS)
def _descriptors(info: ObjectInfo, asked_for: Purpose) -> tuple[tuple[str, str], ...]:
    """The headers about the content, which the responses with content have."""
    is_read = asked_for is Purpose.READING and info.content_encoding is None
    unpacked_type = media.for_reading(info.content_type, info.key) if is_read else None
    if unpacked_type is not None:
        return (
            ("Content-Type", unpacked_type),
            ("Content-Encoding", "gzip"),
            ("Content-Disposition", media.disposition(info.key[: -len(".gz")], unpacked_type)),
            *_digest(info),
        )
    content_type = media.for_download(info.content_type, info.key)
    return (
        ("Content-Type", content_type),
        ("Content-Disposition", media.disposition(info.key, content_type, asked_for is Purpose.ATTACHMENT)),
        *((("Content-Encoding", info.content_encoding),) if info.content_encoding else ()),
        *_digest(info),
    )


def _digest(info: ObjectInfo) -> tuple[tuple[str, str], ...]:
    """The digest of the whole stored file, also when a part of it is sent (RFC 9530, section 3)."""
    return (("Repr-Digest", repr_digest_header(info.sha256)),) if info.sha256 is not None else ()


def purpose(query: str) -> Purpose:
    """What a query string asks for.

    >>> purpose("a=b&download=1"), purpose("view=1"), purpose("")
    (<Purpose.ATTACHMENT: 'attachment'>, <Purpose.READING: 'reading'>, <Purpose.DOWNLOAD: 'download'>)
    """
    if query:
        fields = parse_qs(query)
        if fields.get("download", [""])[-1] == "1":
            return Purpose.ATTACHMENT
        if fields.get("view", [""])[-1] == "1":
            return Purpose.READING
    return Purpose.DOWNLOAD


def _one_range(
    content: Content, decision: Decision, headers: Headers, method: str, wrap_file: FileWrapper | None
) -> DownloadResponse:
    """The whole object, or one part of it."""
    size = content.info.size
    wanted = decision.ranges[0] if decision.ranges else ByteRange(0, size)
    if decision.status == 206:
        headers.append(("Content-Range", wanted.content_range(size)))
    headers.append(("Content-Length", str(wanted.length)))
    if method == "HEAD":
        content.close()
        return DownloadResponse(decision.status, headers, ())
    if wrap_file is None:
        return DownloadResponse(decision.status, headers, _as_bytes(content, content.read(wanted.start, wanted.stop)))
    if isinstance(content, FileContent):
        return DownloadResponse(
            decision.status, headers, wrap_file(SentFile(content.fd, wanted.start, content.close))
        )
    return DownloadResponse(decision.status, headers, _arriving(content, wanted, wrap_file))


def _several_ranges(
    content: Content, ranges: tuple[ByteRange, ...], headers: Headers, wrap_file: FileWrapper | None
) -> DownloadResponse:
    """Several parts, as ``multipart/byteranges``; those of a file by ``sendfile``."""
    part_type = dict(headers)["Content-Type"]
    body = MultipartRanges(ranges, content.info.size, part_type, secrets.token_hex(16))

    def pieces(read: Callable[[int, int], Iterator[bytes | Region]]) -> Iterator[bytes | Region]:
        for segment in body.segments:
            if isinstance(segment, bytes):
                yield segment
            else:
                yield from read(segment.start, segment.stop)

    headers = [header for header in headers if header[0] != "Content-Type"]
    headers += (("Content-Type", body.content_type), ("Content-Length", str(body.content_length)))
    if wrap_file is not None and isinstance(content, FileContent):
        file = SentSegments(pieces(content.segments), content.fd, content.close)
        return DownloadResponse(206, headers, wrap_file(file))
    return DownloadResponse(206, headers, _as_bytes(content, pieces(content.read)))


def _as_bytes(content: Content, pieces: Iterator[Any]) -> Iterable[bytes]:
    """A body of bytes, whose first piece has been read."""
    return _Pieces(content, _begun(pieces)[1])


def _arriving(content: Content, wanted: ByteRange, wrap_file: FileWrapper) -> Iterable[bytes]:
    """A body that is still arriving, sent by ``sendfile`` if it is written to a file meanwhile."""
    first, segments = _begun(content.segments(wanted.start, wanted.stop))
    if isinstance(first, Region):
        return wrap_file(SentSegments(segments, first.fd, content.close))
    return _Pieces(content, segments)


def _begun(segments: Iterator[Any]) -> tuple[Any, Iterator[Any]]:
    """The first segment, and all segments. Waits for the first one, so that an error still gets its own status."""
    first = next(segments, b"")
    return first, itertools.chain((first,), segments)


class _Pieces:
    """A body of bytes. A generator that is never started would not close the content."""

    def __init__(self, content: Content, pieces: Iterator[Any]):
        self._content = content
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        self._content.close()
