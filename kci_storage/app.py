# SPDX-License-Identifier: LGPL-2.1-or-later
"""The application factory: ``create_app`` registers the views and wraps them in the middleware."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask
from flask.json.provider import DefaultJSONProvider

from kci_storage.blueprints import archives, auth, browse, challenge, downloads, errors, listing, status, uploads
from kci_storage.blueprints.context import KeyConverter
from kci_storage.config.reading import wants_debug
from kci_storage.config.settings import Config
from kci_storage.monitoring import logs
from kci_storage.net.threads import trim_memory
from kci_storage.services import Services, build_services, inherited_services
from kci_storage.wsgi.admission import AccessControl
from kci_storage.wsgi.downloads import Downloads
from kci_storage.wsgi.exchange import Exchange, Transport
from kci_storage.wsgi.proxies import behind_proxies


class _Json(DefaultJSONProvider):
    """Flask's own provider, but it keeps the order of the views' keys."""

    sort_keys = False


def create_app(config: Config | None = None) -> Flask:
    """The WSGI application, for one worker process.

    :param config: None: the configuration of the master that forked this process; if there is none, that of the file
        that the environment names (docs/configuration.md).
    :raises ConfigError: the configuration cannot be used.
    """
    logs.configure(debug=wants_debug())
    services = build_services(config) if config else inherited_services()

    app = Flask("kci_storage", static_folder=None, template_folder="pages/templates")
    app.json = _Json(app)
    app.url_map.merge_slashes = False
    app.url_map.converters["path"] = KeyConverter
    app.extensions["kci_storage"] = services
    services.metrics.watch(app)
    for module in (status, listing, archives, auth, browse, challenge, uploads, downloads):
        app.register_blueprint(module.blueprint)
    errors.install(app)
    app.wsgi_app = middleware(app.wsgi_app, services)  # type: ignore[method-assign]  # as Flask's documentation has it
    return app


def middleware(app: Callable[..., Any], services: Services) -> Callable[..., Any]:
    """Wrap the application in the middleware: downloads, access control, counting and logging, proxy headers."""

    def finished(exchange: Exchange) -> None:
        services.metrics.request_finished(exchange)
        logs.log_access(exchange)
        trim_memory(max(exchange.sent, exchange.body.received))

    downloading = Downloads(app, services.objects, services.responder)
    metrics = services.metrics
    access_control = AccessControl(downloading, services.policies, metrics.refused, metrics.challenged)
    wrapped: Callable[..., Any] = Transport(access_control, finished)
    proxies = services.config.server.trusted_proxies
    return behind_proxies(wrapped, proxies) if proxies else wrapped
