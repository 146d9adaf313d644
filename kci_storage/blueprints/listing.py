# SPDX-License-Identifier: LGPL-2.1-or-later
"""``/v1/list``: all keys, streamed one page of the backend at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator

from flask import Blueprint, Response, request, stream_with_context

from kci_storage.blueprints.context import services
from kci_storage.drivers.base import ObjectInfo, Page
from kci_storage.http.accept import prefers_json
from kci_storage.http.conditions import etag_header
from kci_storage.http.dates import http_date

blueprint = Blueprint("listing", __name__)


@blueprint.get("/v1/list")
def list_keys() -> Response:
    """All keys with a prefix, one per line, in the backend's order."""
    prefix = request.args.get("prefix", "")
    as_json = request.args.get("format") == "json" or prefers_json(request.headers.get("Accept"))
    pages = listed(prefix, details=as_json)
    first = next(pages)  # so that a backend that fails is an error, not an empty list
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
    """The list's lines, a page at a time."""
    for page in itertools.chain((first,), others):
        yield "".join(line(info) + "\n" for info in page.objects).encode()


def text_line(info: ObjectInfo) -> str:
    """The key alone."""
    return info.key


def json_line(info: ObjectInfo) -> str:
    """The key and its properties, as JSON."""
    return json.dumps(
        {
            "path": info.key,
            "size": info.size,
            "etag": etag_header(info.etag),
            "last_modified": http_date(info.last_modified),
        },
        ensure_ascii=False,
    )
