# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directory pages: HTML for people, the same as JSON for programs."""

from __future__ import annotations

import gzip
import time
from importlib import resources

from flask import Blueprint, Response, jsonify, render_template, request
from markupsafe import Markup

from kci_storage import keys
from kci_storage.blueprints.context import exchange, services
from kci_storage.errors import BadKey, ObjectNotFound
from kci_storage.http.accept import prefers_json
from kci_storage.http.sizes import readable_size
from kci_storage.keys import ROOT_URL
from kci_storage.pages import csp
from kci_storage.pages.directory import Directory, browse

blueprint = Blueprint("browse", __name__)


def _template(name: str) -> Markup:
    """One of the page's own files, which must not be escaped."""
    text = resources.files("kci_storage.pages").joinpath("templates", name).read_text(encoding="utf-8")
    return Markup(text)  # noqa: S704  (it contains no input of users)


STYLE, SCRIPT, MARKS = _template("directory.css"), _template("directory.js"), _template("marks.svg")
# Any uploader may choose the names on a page, so the policy forbids all scripts but the page's own. Style and script
# are inline, so that they fit the page also if several servers of different versions answer.
POLICY = csp.policy(STYLE, SCRIPT, "img-src data:")


@blueprint.get(ROOT_URL)
def top() -> Response:
    """The top level."""
    return directory_page("")


def directory() -> Response:
    """The level for a path with a trailing slash.

    :raises ObjectNotFound: there is no object below it, or the path cannot be a folder.
    """
    exchange().route = "browse"
    try:
        prefix = keys.from_path_info(request.environ["PATH_INFO"])
        keys.check_readable(f"{prefix}x")
    except BadKey as exc:
        raise ObjectNotFound("no such folder", detail=exc.message) from exc
    return directory_page(prefix)


def directory_page(prefix: str) -> Response:
    """One page of the level below the prefix."""
    listed = browse(services().driver, prefix, request.args.get("marker"))
    as_json = prefers_json(request.headers.get("Accept"), over="text/html")
    response = jsonify(listed.to_fields()) if as_json else html(listed)
    response.headers["Vary"] = "Accept, Accept-Encoding"
    return compressed(response)


def html(listed: Directory) -> Response:
    """The page for people."""
    page = render_template(
        "directory.html",
        listed=listed,
        style=STYLE,
        script=SCRIPT,
        marks=MARKS,
        summary=summary,
        readable_size=readable_size,
        date=date,
        to_the_second=to_the_second,
    )
    response = Response(page, content_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


def compressed(response: Response) -> Response:
    """The response, compressed to a tenth if the client accepts gzip: a page of a thousand names has half a MiB.

    A page has no ETag, which would have to differ by encoding (RFC 9110, 8.8.3.3).
    """
    if request.accept_encodings["gzip"] > 0:
        response.set_data(gzip.compress(response.get_data(), compresslevel=1, mtime=0))
        response.headers["Content-Encoding"] = "gzip"
    return response


def summary(listed: Directory) -> str:
    """A page's summary: how many folders and files, and their size.

    >>> summary(Directory("a/", [], []))
    'empty'
    """
    counts = [("folder", len(listed.folders)), ("file", len(listed.files))]
    parts = [f"{count:,} {noun}{'s' if count > 1 else ''}" for noun, count in counts if count]
    if listed.files:
        parts.append(readable_size(listed.size))
    is_part = listed.next_url is not None or listed.continues
    return (" · ".join(parts) or "empty") + (" on this page" if is_part else "")


def date(timestamp: int) -> str:
    """A time to the minute, UTC.

    >>> date(0)
    '1970-01-01 00:00'
    """
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(timestamp))


def to_the_second(timestamp: int) -> str:
    """A time to the second, UTC.

    >>> to_the_second(0)
    '1970-01-01 00:00:00'
    """
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(timestamp))
