"""The short way of a hit: answered before the framework sees the request.

Most requests are downloads of what lies on the local disk, and Flask's dispatch would be most of their cost. What is
not a plain hit (another method, a key that breaks a rule, a copy that is to be checked, a cold object) goes to the
application, which answers hits in the same way, from the same code (:mod:`kci_storage.sending`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kci_storage import keys
from kci_storage.errors import BadKey
from kci_storage.http_semantics import RequestHeaders
from kci_storage.objects import Objects
from kci_storage.sending import STATUS_LINES, Responder
from kci_storage.transport import EXCHANGE

ROUTE = "download"  # as the view's, for the metrics


class Hits:
    """WSGI middleware that answers hits.

    :param app: gets all other requests.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], objects: Objects, responder: Responder):
        self._app = app
        self._objects = objects
        self._responder = responder

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return self._app(environ, start_response)
        try:
            content = self._objects.open_hit(keys.for_put(environ["PATH_INFO"]))
        except BadKey:
            content = None
        if content is None:
            return self._app(environ, start_response)
        response = self._responder.respond(content, environ, RequestHeaders.from_environ(environ))
        exchange = environ[EXCHANGE]
        exchange.route, exchange.cache = ROUTE, content.status.value
        start_response(STATUS_LINES[response.status], response.headers)
        return response.body
