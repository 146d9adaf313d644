# SPDX-License-Identifier: LGPL-2.1-or-later
"""The status line, what browsers and crawlers ask for, health and metrics."""

from __future__ import annotations

from importlib.resources import files

from flask import Blueprint, Response, request

from kci_storage.blueprints.context import services
from kci_storage.errors import BackendError, NotReady

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
