"""``GET`` and ``HEAD`` of a key: http_semantics decides, objects has the content, and here they meet."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator

from flask import Blueprint, Response, request
from werkzeug.wsgi import wrap_file

from kci_storage import media
from kci_storage.blueprints.failures import failure, without_body
from kci_storage.blueprints.routing import download_key, exchange, services
from kci_storage.errors import ObjectChanged
from kci_storage.http_semantics import (
    ByteRange,
    Decision,
    MultipartRanges,
    RequestHeaders,
    decide,
    etag_header,
    http_date,
)
from kci_storage.objects import Content, FileContent
from kci_storage.transport import SentFile

blueprint = Blueprint("downloads", __name__)

TRIES = 3  # of a cold object that is replaced while it is looked at


@blueprint.get("/<path:path>")
def download(path: str) -> Response:
    """An object, or the part of it that is asked for (RFC 9110, sections 13 and 14)."""
    key = download_key()
    conditions = RequestHeaders.from_environ(request.environ)
    whole = request.method == "GET" and conditions == RequestHeaders()
    for attempt in range(TRIES):
        content = services().objects.open(key, whole=whole)
        try:
            return answer(content, conditions)
        except ObjectChanged:
            content.close()
            if attempt == TRIES - 1:
                raise
        except BaseException:
            content.close()
            raise
    raise AssertionError("unreachable")


def answer(content: Content, conditions: RequestHeaders) -> Response:
    """The response to a request with these conditions. It owns the content from now on.

    :raises ObjectChanged: the version is gone; nothing has been sent.
    """
    info = content.info
    decision = decide(request.method, conditions, info.etag, info.last_modified, info.size)
    response = with_body(content, decision)
    response.headers["ETag"] = etag_header(info.etag)
    response.headers["Last-Modified"] = http_date(info.last_modified)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Cache"] = exchange().cache = content.status.value
    return response


def with_body(content: Content, decision: Decision) -> Response:
    """The status, the body and the headers that are about the body."""
    info = content.info
    if decision.status in (304, 412):
        content.close()
        return without_body(decision.status)
    if decision.status == 416:
        content.close()
        response = failure(416, "Range Not Satisfiable", f"the file has {info.size} bytes")
        response.headers["Content-Range"] = f"bytes */{info.size}"
        return response
    content_type = media.for_download(info.content_type, info.key)
    if len(decision.ranges) > 1:
        response = several_ranges(content, decision.ranges, content_type)
    else:
        response = one_range(content, decision, content_type)
    response.headers["Content-Disposition"] = media.disposition(
        info.key, content_type, force_attachment=request.args.get("download") == "1"
    )
    return response


def one_range(content: Content, decision: Decision, content_type: str) -> Response:
    """The whole object, or one part of it."""
    size = content.info.size
    wanted = decision.ranges[0] if decision.ranges else ByteRange(0, size)
    response = Response(status=decision.status, content_type=content_type)
    if decision.status == 206:
        response.headers["Content-Range"] = wanted.content_range(size)
    if request.method == "HEAD":
        content.close()
    elif isinstance(content, FileContent):
        file = SentFile(content.fd, wanted.start, content.close)
        response.response = wrap_file(request.environ, file)  # type: ignore[arg-type]
        response.direct_passthrough = True
    else:
        response.response = streamed(content, content.read(wanted.start, wanted.stop))
    response.content_length = wanted.length
    return response


def several_ranges(content: Content, ranges: tuple[ByteRange, ...], content_type: str) -> Response:
    """Several parts, as ``multipart/byteranges``."""
    body = MultipartRanges(ranges, content.info.size, content_type, secrets.token_hex(16))

    def pieces() -> Iterator[bytes]:
        for segment in body.segments:
            if isinstance(segment, bytes):
                yield segment
            else:
                yield from content.read(segment.start, segment.stop)

    response = Response(streamed(content, pieces()), 206, content_type=body.content_type)
    response.content_length = body.content_length
    return response


def streamed(content: Content, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, of which the first is here already, so that an error can still become a proper answer."""
    first = next(pieces, b"")
    return _closing(content, itertools.chain((first,), pieces))


def _closing(content: Content, pieces: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from pieces
    finally:
        content.close()
