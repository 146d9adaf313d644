"""``GET`` and ``HEAD`` of a key, for what is not a plain hit: those are answered before (:mod:`kci_storage.hits`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, Response, request
from werkzeug.datastructures import Headers

from kci_storage.blueprints.browse import directory
from kci_storage.blueprints.routing import download_key, exchange, services
from kci_storage.errors import ObjectChanged
from kci_storage.http_semantics import RequestHeaders

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

blueprint = Blueprint("downloads", __name__)

TRIES = 3  # of a cold object that is replaced while it is looked at


@blueprint.get("/<path:path>")
def download(path: str) -> Response:
    """An object, or the part of it that is asked for; with a trailing slash, a directory page."""
    if path.endswith("/"):
        return directory()
    key = download_key()
    conditions = RequestHeaders.from_environ(request.environ)
    whole = request.method == "GET" and conditions == RequestHeaders()
    for attempt in range(TRIES):
        content = services().objects.open(key, whole=whole)
        exchange().cache = content.status.value
        try:
            status, headers, body = services().responder.respond(content, request.environ, conditions)
        except ObjectChanged:
            content.close()
            if attempt == TRIES - 1:
                raise
        except BaseException:
            content.close()
            raise
        else:
            return as_sent(status, headers, body)
    raise AssertionError("unreachable")


class AsItIs(Response):
    """A response whose headers are sent as they are; Werkzeug's own takes the Last-Modified from a 304."""

    def get_wsgi_headers(self, environ: WSGIEnvironment) -> Headers:
        return self.headers


def as_sent(status: int, headers: list[tuple[str, str]], body: object) -> Response:
    """The response exactly so: with these headers alone, and its body as it is, for ``sendfile``."""
    response = AsItIs(body, status, direct_passthrough=True)  # type: ignore[arg-type]
    response.headers.clear()
    response.headers.extend(headers)
    return response
