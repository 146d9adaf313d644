"""Errors over HTTP: one line of text, or RFC 9457 for those who prefer JSON; and the headers of all answers."""

from __future__ import annotations

import json
import logging

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from kci_storage import logs
from kci_storage.blueprints.routing import exchange
from kci_storage.errors import StorageError, Unauthorized, meaning
from kci_storage.http_semantics import prefers_json

log = logging.getLogger(__name__)

EXPOSED_HEADERS = (
    "Accept-Ranges, Content-Disposition, Content-Length, Content-Range, ETag, Last-Modified, Retry-After, "
    "X-Cache, X-Request-ID"
)
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


def serve_the_public(response: Response) -> Response:
    """Public answers may be read by scripts of any site, and kept by caches that ask before they use them.

    A token is never sent by a browser on its own, so what needs one may be read too; but it is for its owner alone.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        response.headers.setdefault("Cache-Control", "public, no-cache")
        response.headers["Access-Control-Allow-Origin"] = "*"
        response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
    if request.method == "OPTIONS":
        response.headers["Access-Control-Allow-Methods"] = "GET, HEAD"
        response.headers["Access-Control-Allow-Headers"] = REQUEST_HEADERS
        response.headers["Access-Control-Max-Age"] = "86400"
    return response


def storage_error(error: StorageError) -> Response:
    """The answer that the table of errors gives."""
    kind = meaning(error)
    exchange().failed(error)
    response = failure(kind.status, kind.title, error.message)
    if isinstance(error, Unauthorized):
        log.warning(
            logs.logfmt(
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
    log.exception(logs.logfmt(event="internal_error", request_id=exchange().request_id, error=repr(error)))
    return failure(500, "Internal Server Error", "internal error; the request ID leads to it in the server's log")


def failure(status: int, title: str, message: str) -> Response:
    """One line of text, or problem details as JSON."""
    if prefers_json(request.headers.get("Accept")):
        problem = {"type": "about:blank", "title": title, "status": status, "detail": message}
        body, mimetype = json.dumps(problem), "application/problem+json"
    else:
        # The body of a 401 is this word alone: existing clients compare it.
        body, mimetype = message if status == 401 else f"{message}\n", "text/plain"
    response = Response(body, status, mimetype=mimetype)
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def without_body(status: int) -> Response:
    """A response that consists of headers alone."""
    response = Response(status=status)
    response.headers.remove("Content-Type")
    return response
