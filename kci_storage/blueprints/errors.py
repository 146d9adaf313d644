# SPDX-License-Identifier: LGPL-2.1-or-later
"""The views' error responses, and the headers that all their responses have."""

from __future__ import annotations

import logging
from urllib.parse import urlsplit

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from kci_storage import logfmt
from kci_storage.blueprints.context import exchange
from kci_storage.errors import ObjectNotFound, StorageError, Unauthorized
from kci_storage.http import problems
from kci_storage.http.answers import ASK_FIRST, CORS_HEADERS, NOSNIFF, preflight
from kci_storage.http.problems import Problem
from kci_storage.monitoring.metrics import METHODS

log = logging.getLogger(__name__)

BODY_HEADERS = ("content-type", "content-length")  # they describe the body of Werkzeug's own error response


def install(app: Flask) -> None:
    """Install the error handlers and the common headers in the application."""
    app.register_error_handler(StorageError, storage_error)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(Exception, unexpected_error)
    app.before_request(note_route)
    app.after_request(add_common_headers)
    app.after_request(redirect_to_path)


def note_route() -> None:
    """Note for the log and the metrics which view answers.

    :raises ObjectNotFound: the path is another spelling of a route, such as ``//metrics``.
    """
    if request.method not in METHODS:
        request.prom_do_not_track = True  # type: ignore[attr-defined]  # the exporter makes a label of each method
    rule = request.url_rule
    if rule is None:
        return
    if not rule.arguments and rule.rule != (request.environ["PATH_INFO"] or "/"):
        raise ObjectNotFound("no such file")
    exchange().route = rule.endpoint.rpartition(".")[2]


def add_common_headers(response: Response) -> Response:
    """Let scripts of any site read the response, and let caches keep a public one that they revalidate before use.

    Scripts may read the responses to requests with a token, too: a browser never sends a token on its own.
    """
    for name, value in (NOSNIFF, *CORS_HEADERS):
        response.headers[name] = value
    if request.method in ("GET", "HEAD", "OPTIONS"):
        response.headers.setdefault("Cache-Control", ASK_FIRST)
    if request.method == "OPTIONS":
        response.headers.update(preflight(request.headers.get("Access-Control-Request-Headers")))
    return response


def redirect_to_path(response: Response) -> Response:
    """Make a redirect's target a path: behind a proxy, clients may use another host name and scheme."""
    if response.location is not None:
        url = urlsplit(response.location)
        response.location = url._replace(scheme="", netloc="").geturl()
        response.set_data(f"it is at {response.location}\n")
        response.content_type = "text/plain; charset=utf-8"
    return response


def storage_error(error: StorageError) -> Response:
    """The response by the table of errors (:data:`kci_storage.errors.TABLE`)."""
    return failure(logged(error))


def logged(error: StorageError) -> Problem:
    """Log an error with its details; the error in terms of HTTP, for the client."""
    request_id = exchange().request_id
    exchange().failed(error)
    log.debug(logfmt.line(event="error", request_id=request_id), exc_info=error)
    if isinstance(error, Unauthorized):
        log.warning(
            logfmt.line(event="auth_failed", reason=error.detail, ip=request.remote_addr, request_id=request_id)
        )
    return problems.of(error)


def http_error(error: HTTPException) -> Response:
    """The response to a request that Flask itself refuses, most often for a method that the route does not have."""
    message = error.name
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        message = f"{request.method} is not for this path, but {', '.join(sorted(error.valid_methods))}"
    headers = [header for header in error.get_headers() if header[0].lower() not in BODY_HEADERS]
    return failure(Problem(error.code or 500, error.name, message, headers))


def unexpected_error(error: Exception) -> Response:
    """The response to a bug in the server. The log has the traceback."""
    log.exception(logfmt.line(event="internal_error", request_id=exchange().request_id, error=repr(error)))
    message = "internal error; the request ID leads to it in the server's log"
    return failure(Problem(500, "Internal Server Error", message))


def failure(problem: Problem) -> Response:
    """The error response to the current request."""
    status, headers, body = exchange().answer(problem)
    return Response(body, status, headers)


def without_body(status: int) -> Response:
    """A response without a body."""
    response = Response(status=status)
    response.headers.remove("Content-Type")
    return response
