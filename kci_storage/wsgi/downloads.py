# SPDX-License-Identifier: LGPL-2.1-or-later
"""Downloads, answered before the framework sees the request.

Most requests are downloads. Flask's dispatch would be most of the cost of a hit, and a good part of the cost of a
small cold object. Any other request goes to the application. So does a download that fails, since the application
makes all error responses (:mod:`kci_storage.blueprints.errors`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kci_storage import keys
from kci_storage.errors import BadKey, ObjectChanged, Refused
from kci_storage.http.answers import STATUS_LINES
from kci_storage.http.conditions import RequestHeaders
from kci_storage.net import slots
from kci_storage.net.bodies import SMALL_FILE
from kci_storage.store.objects import Objects
from kci_storage.wsgi.exchange import EXCHANGE
from kci_storage.wsgi.responder import DownloadResponse, Responder

ROUTE = "download"  # the view's name, for the metrics
FAILURE = "kci_storage.failure"  # the environ's key for the exception that a download has raised
TRIES = 3  # attempts at a cold object that is replaced while it is opened


class Downloads:
    """WSGI middleware that answers downloads.

    :param app: gets all other requests, and the downloads that fail, with the exception under :data:`FAILURE`.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], objects: Objects, responder: Responder):
        self._app = app
        self._objects = objects
        self._responder = responder

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return self._pass_on(environ, start_response)
        try:
            key = keys.for_put(environ["PATH_INFO"])
        except BadKey:
            return self._other_spelling(environ, start_response)
        try:
            response = self._respond(key, environ)
        except Refused:  # the client has too many downloads; the access control answers
            raise
        except Exception as exc:  # noqa: BLE001  (the application raises it)
            environ[FAILURE] = exc
            slots.may_block()
            return self._app(environ, start_response)
        start_response(STATUS_LINES[response.status], response.headers)
        return response.body

    def _other_spelling(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """The path of a key or a folder may have segments ``.``. The server's own routes have one spelling each."""
        path = keys.without_dot_segments(environ["PATH_INFO"])
        if path == environ["PATH_INFO"] or not _is_of_objects(path):
            return self._pass_on(environ, start_response)
        environ["PATH_INFO"] = path
        return self(environ, start_response)

    def _pass_on(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ[EXCHANGE].count_as_running()
        slots.may_block()
        return self._app(environ, start_response)

    def _respond(self, key: str, environ: dict[str, Any]) -> DownloadResponse:
        conditions = RequestHeaders.from_environ(environ)
        for _ in range(TRIES - 1):
            try:
                return self._respond_once(key, environ, conditions)
            except ObjectChanged:
                continue
        return self._respond_once(key, environ, conditions)

    def _respond_once(self, key: str, environ: dict[str, Any], conditions: RequestHeaders) -> DownloadResponse:
        exchange = environ[EXCHANGE]
        content = self._objects.open(key, environ["REQUEST_METHOD"], conditions, exchange.count_as_running)
        exchange.route, exchange.cache = ROUTE, content.status.value
        try:
            if content.info.size > SMALL_FILE:
                exchange.count_as_running()
            return self._responder.respond(content, environ, conditions)
        except BaseException:
            content.close()
            raise


def _is_of_objects(path: str) -> bool:
    """Whether a path is that of a key or of a folder of keys, rather than one of the server's own."""
    try:
        keys.for_put(f"{path}x" if path.endswith("/") and path != "/" else path)
    except BadKey:
        return False
    return True
