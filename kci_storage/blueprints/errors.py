"""Errors over HTTP: one line of text, or RFC 9457 for those who prefer JSON; and the headers of all answers."""

from __future__ import annotations

import logging

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from kci_storage import logfmt
from kci_storage.blueprints.context import exchange
from kci_storage.errors import StorageError, Unauthorized, meaning
from kci_storage.http import problems
from kci_storage.monitoring.metrics import METHODS
from kci_storage.wsgi.responder import CORS_HEADERS

log = logging.getLogger(__name__)

CACHE_CONTROL = "public, no-cache"  # of all but objects: a missing file may be there at the next look
REQUEST_HEADERS = "Range, If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since, If-Range, X-Request-ID"


def install(app: Flask) -> None:
    """Have the application answer errors so, and everything with the headers that browsers ask for."""
    app.register_error_handler(StorageError, storage_error)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(Exception, unexpected_error)
    app.after_request(serve_the_public)
    app.before_request(note_route)


def note_route() -> None:
    """Tell the log and the metrics which view answers."""
    if request.endpoint is not None:
        exchange().route = request.endpoint.rpartition(".")[2]
    if request.method not in METHODS:
        request.prom_do_not_track = True  # type: ignore[attr-defined]  # the exporter makes a label of each method


def serve_the_public(response: Response) -> Response:
    """Public answers may be read by scripts of any site, and kept by caches that ask before they use them.

    A token is never sent by a browser on its own, so what needs one may be read too; but it is for its owner alone.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        response.headers.setdefault("Cache-Control", CACHE_CONTROL)
        for name, value in CORS_HEADERS:
            response.headers[name] = value
    if request.method == "OPTIONS":
        response.headers["Access-Control-Allow-Methods"] = "GET, HEAD"
        response.headers["Access-Control-Allow-Headers"] = REQUEST_HEADERS
        response.headers["Access-Control-Max-Age"] = "86400"
    return response


def storage_error(error: StorageError) -> Response:
    """The answer that the table of errors gives."""
    kind = meaning(error)
    exchange().failed(error)
    log.debug(logfmt.line(event="error", request_id=exchange().request_id), exc_info=error)
    response = failure(kind.status, kind.title, error.message)
    if isinstance(error, Unauthorized):
        log.warning(
            logfmt.line(
                event="auth_failed", reason=error.detail, ip=request.remote_addr, request_id=exchange().request_id
            )
        )
        response.headers["WWW-Authenticate"] = "Bearer"
        response.headers["Cache-Control"] = "no-store"
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def http_error(error: HTTPException) -> Response:
    """The answer to what Flask itself refuses: no such route, or not with this method."""
    response = failure(error.code or 500, error.name, error.name)
    for name, value in error.get_headers():
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response


def unexpected_error(error: Exception) -> Response:
    """The answer to a defect of ours. The log has the traceback."""
    log.exception(logfmt.line(event="internal_error", request_id=exchange().request_id, error=repr(error)))
    return failure(500, "Internal Server Error", "internal error; the request ID leads to it in the server's log")


def failure(status: int, title: str, message: str) -> Response:
    """One line of text, or problem details as JSON."""
    content_type, body = problems.body(status, title, message, request.headers.get("Accept"))
    response = Response(body, status, content_type=content_type)
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def without_body(status: int) -> Response:
    """A response that consists of headers alone."""
    response = Response(status=status)
    response.headers.remove("Content-Type")
    return response
