"""Directory pages: HTML for people, the same as JSON for programs."""

from __future__ import annotations

import time

from flask import Blueprint, Response, jsonify, render_template, request

from kci_storage import keys
from kci_storage.blueprints.routing import exchange, services
from kci_storage.directory import TOP, browse
from kci_storage.errors import BadKey, ObjectNotFound
from kci_storage.http_semantics import prefers_json
from kci_storage.sizes import readable_size

blueprint = Blueprint("browse", __name__)

# A page of names that anybody may have chosen: nothing of it runs, and nothing is fetched.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"


@blueprint.get(TOP)
def top() -> Response:
    """The top level."""
    return directory_page("")


def directory() -> Response:
    """The level that a path with a trailing slash asks for.

    :raises ObjectNotFound: there is nothing below it, or it cannot be a folder.
    """
    exchange().route = "browse"
    try:
        prefix = keys.from_path_info(request.environ["PATH_INFO"])
        keys.check(f"{prefix}x")
    except BadKey as exc:
        raise ObjectNotFound("no such folder", detail=exc.message) from exc
    return directory_page(prefix)


def directory_page(prefix: str) -> Response:
    """One page of the level below the prefix."""
    listed = browse(services().driver, prefix, request.args.get("marker"))
    if prefers_json(request.headers.get("Accept"), over="text/html"):
        response = jsonify(listed.to_fields())
    else:
        response = Response(
            render_template("directory.html", listed=listed, readable_size=readable_size, date=date),
            content_type="text/html; charset=utf-8",
        )
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Vary"] = "Accept"
    return response


def date(timestamp: int) -> str:
    """A time to the minute, UTC.

    >>> date(0)
    '1970-01-01 00:00'
    """
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(timestamp))
