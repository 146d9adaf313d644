"""The application: its parts, wired."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

from kci_storage import drivers
from kci_storage.access.limits import Ledger
from kci_storage.access.policies import Policies
from kci_storage.access.tokens import Authenticator, Permissions
from kci_storage.archives.receiving import Archives
from kci_storage.archives.unpacking import Limits
from kci_storage.blueprints import archives, auth, browse, challenge, downloads, errors, status, uploads
from kci_storage.blueprints.context import KeyConverter
from kci_storage.cache.housekeeping import Housekeeper
from kci_storage.config.settings import Config, load, wants_debug
from kci_storage.drivers.base import Driver, LocalObjects, Sweepable
from kci_storage.fills.fill import Fills
from kci_storage.monitoring import logs
from kci_storage.monitoring.metrics import Metrics
from kci_storage.net import memory
from kci_storage.server import preflight, reload
from kci_storage.store.negative_cache import Misses
from kci_storage.store.objects import Objects
from kci_storage.store.uploads import Uploads
from kci_storage.wsgi.admission import Guard
from kci_storage.wsgi.downloads import Downloads
from kci_storage.wsgi.exchange import Exchange, Transport
from kci_storage.wsgi.responder import Responder


@dataclass(frozen=True)
class Services:
    """What the views work with."""

    config: Config
    driver: Driver
    fills: Fills
    objects: Objects
    responder: Responder
    uploads: Uploads
    archives: Archives
    authenticator: Authenticator
    policies: Policies
    metrics: Metrics
    housekeeper: Housekeeper
    follower: reload.Follower | None = None

    @property
    def permissions(self) -> Permissions:
        """Who may write what, now."""
        return self.policies.permissions

    def start(self) -> None:
        """Start what runs beside requests, in the worker process."""
        self.housekeeper.start()
        if self.follower is not None:
            self.follower.start()

    def stop(self) -> None:
        """End it, when the last request has been answered."""
        if self.follower is not None:
            self.follower.stop()
        self.housekeeper.stop()
        self.fills.stop()


def create_app(config: Config | None = None) -> Flask:
    """The WSGI application, for one worker process.

    :param config: None: the one of the master that has forked this process, else the one that the environment names
        (docs/configuration.md).
    :raises ConfigError: it cannot be used.
    """
    logs.configure(debug=wants_debug())
    services = build_services(config) if config else inherited_services()

    app = Flask("kci_storage", static_folder=None, template_folder="pages/templates")
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False
    app.url_map.converters["path"] = KeyConverter
    app.extensions["kci_storage"] = services
    services.metrics.watch(app)
    for module in (status, archives, auth, browse, challenge, uploads, downloads):
        app.register_blueprint(module.blueprint)
    errors.install(app)
    app.wsgi_app = transport(app.wsgi_app, services)  # type: ignore[method-assign]
    return app


def inherited_services() -> Services:
    """The parts for a worker: what the master has given it, and how it hears of changes."""
    parent = reload.current
    if parent is None:  # another server than ours has started it
        return build_services(load())
    services = build_services(parent.config, parent.ledger)
    return dataclasses.replace(services, follower=reload.Follower(parent, services.policies.apply))


def build_services(config: Config, ledger: Ledger | None = None) -> Services:
    """The parts, from the driver upwards.

    :param ledger: where clients are counted; None: for this process alone.
    """
    driver = drivers.load(config.driver).from_config(config)
    local = driver if isinstance(driver, LocalObjects) else None
    cache = preflight.usable_cache(config)
    metrics = Metrics(cache, disks(config, local))
    sweep = partial(drivers.sweep, config) if isinstance(driver, Sweepable) else None
    housekeeper = Housekeeper(cache, config.cache, metrics, sweep)
    measured = metrics.measured(driver)
    misses = Misses(config.cache.directory / "uploads")
    server = config.server
    fills = Fills(
        measured,
        cache,
        metrics,
        housekeeper.make_room,
        at_once=fills_at_once(config),
        queue_size=server.threads // 2,  # the other half is for those who need not wait
    )
    uploads = Uploads(
        measured,
        cache,
        misses,
        metrics,
        cached=local is None,
        lock_timeout=server.lock_timeout,
        max_bytes=server.max_upload_bytes,
    )
    return Services(
        config=config,
        driver=measured,
        fills=fills,
        objects=Objects(
            measured,
            local,
            cache,
            fills,
            misses,
            metrics,
            wait_timeout=server.lock_timeout,
            revalidate_after=config.cache.revalidate_after,
        ),
        responder=Responder(server.cache_control, config.cache.directory, server.accel_redirect),
        uploads=uploads,
        archives=Archives(uploads, metrics, archive_limits(config), config.archive.parallelism),
        authenticator=Authenticator(config.secrets),
        policies=Policies(config, ledger or Ledger(rows=1)),
        metrics=metrics,
        housekeeper=housekeeper,
    )


def fills_at_once(config: Config) -> int:
    """This worker's share of ``max_fills``."""
    return -(-config.cache.max_fills // config.server.worker_count)


def archive_limits(config: Config) -> Limits:
    """How large an archive may be; each of its files is an upload, too."""
    largest = min(config.archive.max_file_bytes, config.server.max_upload_bytes)
    return Limits(config.archive.max_files, largest, config.archive.max_total_bytes)


def disks(config: Config, local: LocalObjects | None) -> list[Path]:
    """The folders whose disks fill up."""
    return [config.cache.directory] if local is None else [config.cache.directory, config.local.storage_path]


def transport(app: Callable[..., Any], services: Services) -> Callable[..., Any]:
    """The application behind the border where requests are counted and logged."""

    def finished(exchange: Exchange) -> None:
        services.metrics.request_finished(exchange)
        logs.log_access(exchange)
        memory.give_back(max(exchange.sent, exchange.body.received))

    downloading = Downloads(app, services.objects, services.responder)
    guard = Guard(downloading, services.policies, services.metrics.refused, services.metrics.challenged)
    wrapped: Callable[..., Any] = Transport(guard, finished)
    proxies = services.config.server.trusted_proxies
    return ProxyFix(wrapped, x_for=proxies, x_proto=proxies, x_host=proxies) if proxies else wrapped
