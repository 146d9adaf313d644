# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the views' errors are over HTTP, and the headers that all their answers have."""

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

OF_BODY = ("content-type", "content-length")  # headers that say something of the body that Flask would send


def install(app: Flask) -> None:
    """Have the application answer errors so, and everything with the headers that browsers ask for."""
    app.register_error_handler(StorageError, storage_error)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(Exception, unexpected_error)
    app.before_request(note_route)
    app.after_request(add_common_headers)
    app.after_request(redirect_to_path)


def note_route() -> None:
    """Tell the log and the metrics which view answers.

    :raises ObjectNotFound: the path is another spelling of a route's, which is nobody's (``//metrics``).
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
    """Answers may be read by scripts of any site, and public ones kept by caches that ask before they use them.

    A token is never sent by a browser on its own, so what needs one may be read too; but it is for its owner alone.
    """
    for name, value in (NOSNIFF, *CORS_HEADERS):
        response.headers[name] = value
    if request.method in ("GET", "HEAD", "OPTIONS"):
        response.headers.setdefault("Cache-Control", ASK_FIRST)
    if request.method == "OPTIONS":
        response.headers.update(preflight(request.headers.get("Access-Control-Request-Headers")))
    return response


def redirect_to_path(response: Response) -> Response:
    """Have a redirect name a path of this server: by which name and scheme a client reaches it, a proxy may know."""
    if response.location is not None:
        url = urlsplit(response.location)
        response.location = url._replace(scheme="", netloc="").geturl()
        response.set_data(f"it is at {response.location}\n")
        response.content_type = "text/plain; charset=utf-8"
    return response


def storage_error(error: StorageError) -> Response:
    """The answer that the table of errors gives."""
    return failure(noted(error))


def noted(error: StorageError) -> Problem:
    """What an error is over HTTP; the log is told more."""
    request_id = exchange().request_id
    exchange().failed(error)
    log.debug(logfmt.line(event="error", request_id=request_id), exc_info=error)
    if isinstance(error, Unauthorized):
        log.warning(
            logfmt.line(event="auth_failed", reason=error.detail, ip=request.remote_addr, request_id=request_id)
        )
    return problems.of(error)


def http_error(error: HTTPException) -> Response:
    """The answer to what Flask itself refuses: most often a method that the route does not have."""
    message = error.name
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        message = f"{request.method} is not for this path, but {', '.join(sorted(error.valid_methods))}"
    headers = [
        header for header in error.get_headers() if header[0].lower() not in ("content-type", "content-length")
    ]
    return failure(Problem(error.code or 500, error.name, message, headers))


def unexpected_error(error: Exception) -> Response:
    """The answer to a defect of ours. The log has the traceback."""
    log.exception(logfmt.line(event="internal_error", request_id=exchange().request_id, error=repr(error)))
    message = "internal error; the request ID leads to it in the server's log"
    return failure(Problem(500, "Internal Server Error", message))


def failure(problem: Problem) -> Response:
    """The answer to this request when something is wrong."""
    status, headers, body = exchange().answer(problem)
    return Response(body, status, headers)


def without_body(status: int) -> Response:
    """A response that consists of headers alone."""
    response = Response(status=status)
    response.headers.remove("Content-Type")
    return response
