# SPDX-License-Identifier: LGPL-2.1-or-later
"""``/``, ``/robots.txt``, ``/favicon.ico``, health and metrics."""

from __future__ import annotations

from importlib.resources import files

from flask import Blueprint, Response, request

from kci_storage.blueprints.context import services

blueprint = Blueprint("admin", __name__)

FAVICON = files("kci_storage.pages").joinpath("static/favicon.ico").read_bytes()


@blueprint.get("/")
def status() -> Response:
    """The text by which KernelCI's tools recognise the server."""
    return Response("KernelCI Proxy Server", mimetype="text/plain")


@blueprint.get("/robots.txt")
def robots() -> Response:
    """Asks all crawlers to stay away (RFC 9309)."""
    return Response("User-agent: *\nDisallow: /\n", mimetype="text/plain")


@blueprint.get("/favicon.ico")
def favicon() -> Response:
    """The icon in a browser's tab."""
    return Response(FAVICON, mimetype="image/x-icon", headers={"Cache-Control": "public, max-age=86400"})


@blueprint.get("/v1/health")
def health() -> Response:
    """200 while the process can answer."""
    return Response("ok", mimetype="text/plain")


@blueprint.get("/v1/ready")
def ready() -> Response:
    """200 if the backend answers, or has answered in the last second.

    :raises NotReady: it does not (503, with the reason).
    """
    services().readiness.check()
    return Response("ok", mimetype="text/plain")


@blueprint.get("/metrics")
def metrics() -> Response:
    """The metrics of all workers, for Prometheus."""
    page, content_type = services().metrics.page(request.headers.get("Accept"))
    return Response(page, content_type=content_type)
