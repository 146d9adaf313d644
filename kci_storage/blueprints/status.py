"""The status line, what browsers and crawlers ask for, health, metrics and the list of all keys."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from importlib.resources import files

from flask import Blueprint, Response, request, stream_with_context

from kci_storage import keys
from kci_storage.blueprints.context import services
from kci_storage.drivers.base import ObjectInfo, Page
from kci_storage.errors import BackendError, NotReady
from kci_storage.http.conditions import etag_header, http_date, prefers_json

blueprint = Blueprint("admin", __name__)

FAVICON = files("kci_storage.pages").joinpath("static/favicon.ico").read_bytes()


@blueprint.get("/")
def status() -> Response:
    """What KernelCI's tools look for."""
    return Response("KernelCI Proxy Server", mimetype="text/plain")


@blueprint.get("/robots.txt")
def robots() -> Response:
    """No crawler is to read all of a build farm's files (RFC 9309)."""
    return Response("User-agent: *\nDisallow: /\n", mimetype="text/plain")


@blueprint.get("/favicon.ico")
def favicon() -> Response:
    """The picture in a browser's tab."""
    return Response(FAVICON, mimetype="image/x-icon", headers={"Cache-Control": "public, max-age=86400"})


@blueprint.get("/v1/health")
def health() -> Response:
    """200 while the process can answer."""
    return Response("ok", mimetype="text/plain")


@blueprint.get("/v1/ready")
def ready() -> Response:
    """200 when the backend answers, else 503 with the reason."""
    try:
        services().driver.probe()
    except BackendError as exc:
        raise NotReady(exc.message, detail=exc.detail) from exc
    return Response("ok", mimetype="text/plain")


@blueprint.get("/metrics")
def metrics() -> Response:
    """What Prometheus scrapes, over all workers."""
    page, content_type = services().metrics.page(request.headers.get("Accept"))
    return Response(page, content_type=content_type)


@blueprint.get("/v1/list")
def list_keys() -> Response:
    """Every key, one a line, as the backend gives its pages."""
    prefix = request.args.get("prefix", "")
    as_json = request.args.get("format") == "json" or prefers_json(request.headers.get("Accept"))
    pages = listed(prefix, details=as_json)
    first = next(pages)  # so that a backend that is away is an error, not a list that ends early
    line = json_line if as_json else text_line
    return Response(
        stream_with_context(lines(first, pages, line)),
        content_type="application/x-ndjson" if as_json else "text/plain; charset=utf-8",
    )


def listed(prefix: str, *, details: bool) -> Iterator[Page]:
    """All pages of the keys that start with the prefix."""
    marker = None
    while True:
        page = services().driver.list(prefix, marker=marker, details=details)
        yield page
        marker = page.next_marker
        if marker is None:
            return


def lines(first: Page, others: Iterator[Page], line: Callable[[ObjectInfo], str]) -> Iterator[bytes]:
    """The list, a page at a time."""
    for page in itertools.chain((first,), others):
        yield "".join(line(info) + "\n" for info in page.objects if keys.is_valid(info.key)).encode()


def text_line(info: ObjectInfo) -> str:
    """The key alone."""
    return info.key


def json_line(info: ObjectInfo) -> str:
    """The key and what a client may want to compare."""
    return json.dumps(
        {
            "path": info.key,
            "size": info.size,
            "etag": etag_header(info.etag),
            "last_modified": http_date(info.last_modified),
        },
        ensure_ascii=False,
    )
