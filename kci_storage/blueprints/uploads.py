# SPDX-License-Identifier: LGPL-2.1-or-later
"""``POST /upload``, ``PUT`` and ``DELETE`` of a key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from urllib.parse import quote

from flask import Blueprint, Response, jsonify, request

from kci_storage import keys, logfmt
from kci_storage.blueprints.context import authenticated, exchange, services
from kci_storage.blueprints.errors import without_body
from kci_storage.drivers.base import ObjectInfo
from kci_storage.errors import BadRequest, UnsupportedContentEncoding
from kci_storage.http import media
from kci_storage.http.conditions import RequestHeaders, conditional_write, etag_header, write_allowed
from kci_storage.http.digest_fields import parse_content_md5, parse_repr_digest
from kci_storage.http.multipart import FORM_OVERHEAD, boundary_of, too_large
from kci_storage.store.form_receiver import FormPlan, store_form
from kci_storage.store.uploads import ExpectedDigests, Stored
from kci_storage.wsgi.exchange import RequestBody

blueprint = Blueprint("uploads", __name__)
log = logging.getLogger(__name__)


@blueprint.post("/upload")
@blueprint.post("/v1/file")
def upload() -> Response:
    """Store the files of a multipart form."""
    with services().metrics.uploading():
        email = authenticated()
        permissions = services().permissions
        permissions.check_folder(email, "")
        body, boundary = admitted_body(FORM_OVERHEAD), form_boundary()
        plan = FormPlan(
            admit=lambda key: permissions.check(email, key), content_type=stored_type(), tags=stored_tags(email)
        )
        return report(store_form(services().uploads, body, boundary, plan), 200)


@blueprint.put("/<path:path>")
def put(path: str) -> Response:
    """Store the body under the key."""
    with services().metrics.uploading():
        email = authenticated()
        key = keys.for_put(request.environ["PATH_INFO"])
        services().permissions.check(email, key)
        refuse_partial_put()
        body, content_type, tags = admitted_body(0), stored_type()(key), stored_tags(email)(key)
        stored = services().uploads.put(key, content_type, body, expected_digests(), replacement_rule(), tags)
    response = report([stored], 201 if stored.created else 200)
    response.headers["ETag"] = etag_header(stored.info.etag)
    return response


@blueprint.delete("/<path:path>")
def delete(path: str) -> Response:
    """Delete the object."""
    email = authenticated()
    key = keys.for_put(request.environ["PATH_INFO"])
    services().permissions.check(email, key)
    services().objects.delete(key, replacement_rule())
    log.info(logfmt.line(event="deleted", key=key, user=email, request_id=exchange().request_id))
    return without_body(204)


def admitted_body(overhead: int) -> RequestBody:
    """The request's body, unless the headers already show that it cannot be stored.

    :param overhead: bytes by which it may exceed the limit, which then holds for each file.
    :raises UploadTooLarge: it is longer than that.
    :raises UnsupportedContentEncoding: it is encoded (RFC 9110, 15.5.16).
    """
    if request.headers.get("Content-Encoding", "").lower() not in ("", "identity"):
        raise UnsupportedContentEncoding("a file is stored as it is sent: send it without Content-Encoding")
    body, limit = exchange().body, services().config.server.max_upload_bytes
    if body.length is not None and body.length > limit + overhead:
        raise too_large(limit)
    return body


def refuse_partial_put() -> None:
    """Refuse a partial PUT, such as that of ``curl -C -``: a part must not replace the whole file (RFC 9110, 14.5).

    :raises BadRequest: the request has a ``Content-Range``.
    """
    if "Content-Range" in request.headers:
        raise BadRequest("a file is stored as a whole: send it without Content-Range")


def form_boundary() -> bytes:
    """The boundary of the multipart form.

    :raises BadForm: the body is not a multipart form.
    """
    return boundary_of(request.headers.get("Content-Type", ""))


def stored_type() -> Callable[[str], str]:
    """The function that gives the content type to store for a key: the requested one, else by the key's extension."""
    requested = media.normalise(request.headers.get("Content-Type-Upstream"))
    return lambda key: requested or media.guess(key)


def stored_tags(email: str) -> Callable[[str], Mapping[str, str]]:
    """The function that gives the tags to store for a key."""
    retention = services().policies.retention
    return lambda key: retention.tags(email, key)


def expected_digests() -> ExpectedDigests:
    """The digests of the body in the request's headers."""
    md5, digests = request.headers.get("Content-MD5"), request.headers.get("Repr-Digest")
    return ExpectedDigests(
        md5=parse_content_md5(md5) if md5 is not None else None,
        sha256=parse_repr_digest(digests) if digests is not None else None,
    )


def replacement_rule() -> Callable[[ObjectInfo | None], bool] | None:
    """The function that decides, by the request's conditions, whether the current version may be replaced or deleted.

    :returns: None: the request has no conditions.
    """
    headers = RequestHeaders.from_environ(request.environ)
    if not conditional_write(headers):
        return None

    def holds(info: ObjectInfo | None) -> bool:
        return write_allowed(headers, info.etag, info.last_modified) if info else write_allowed(headers, None, None)

    return holds


def report(stored: list[Stored], status: int) -> Response:
    """Log the stored files; the response that lists them."""
    for item in stored:
        log_stored(item, exchange().user, exchange().request_id)
    files = [
        {
            "path": item.info.key,
            "size": item.info.size,
            "etag": etag_header(item.info.etag),
            "sha256": item.sha256,
            "url": "/" + quote(item.info.key),
        }
        for item in stored
    ]
    response = jsonify({"files": files})
    response.status_code = status
    return response


def log_stored(stored: Stored, user: str | None, request_id: str) -> None:
    """Log that a user has stored a file."""
    info = stored.info
    log.info(
        logfmt.line(
            event="stored", key=info.key, size=info.size, sha256=stored.sha256, user=user, request_id=request_id
        )
    )
