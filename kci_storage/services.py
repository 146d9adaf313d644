# SPDX-License-Identifier: LGPL-2.1-or-later
"""The services of one worker, built from its configuration. No other module knows all of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from kci_storage import drivers
from kci_storage.access.limits import Ledger
from kci_storage.access.permissions import Permissions
from kci_storage.access.policies import Policies
from kci_storage.access.tokens import Authenticator
from kci_storage.archives.receiving import Archives
from kci_storage.archives.unpacking import Limits
from kci_storage.cache.directory import Cache
from kci_storage.cache.housekeeping import DriverUpkeep, Housekeeper
from kci_storage.config.reading import load
from kci_storage.config.settings import Config, ConfigError
from kci_storage.drivers.base import Advising, Driver, LocalObjects, Sweepable
from kci_storage.drivers.guard import GuardedDriver, GuardedFiles
from kci_storage.fills.fills import Fills
from kci_storage.monitoring.measured_driver import MeasuredDriver
from kci_storage.monitoring.metrics import Metrics
from kci_storage.store.negative_cache import NegativeCache
from kci_storage.store.objects import Objects
from kci_storage.store.readiness import SHARED, LastAnswer, Readiness
from kci_storage.store.uploads import Uploads
from kci_storage.wsgi.responder import Responder

log = logging.getLogger(__name__)


class ConfigFollower(Protocol):
    """Applies each new configuration while the worker runs."""

    def start(self) -> None:
        """Start following, in a thread."""

    def stop(self) -> None:
        """Stop following."""


class Parent(Protocol):
    """What services need of the master process that forked this one."""

    @property
    def config(self) -> Config:
        """The last valid configuration."""
        ...

    @property
    def ledger(self) -> Ledger:
        """The counts of the clients' requests, shared by all workers."""
        ...

    def follower(self, apply: Callable[[Config], None]) -> ConfigFollower:
        """A follower that calls ``apply`` with each new configuration."""
        ...


parent: Parent | None = None  # set by the master (server/reload.py) before it forks workers


@dataclass(frozen=True)
class Services:
    """What the views need."""

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
    readiness: Readiness
    housekeeper: Housekeeper
    follower: ConfigFollower | None = None

    @property
    def permissions(self) -> Permissions:
        """The current rules on which user may write which keys."""
        return self.policies.permissions

    def start(self) -> None:
        """Start the background work, in the worker process."""
        self.housekeeper.start()
        if self.follower is not None:
            self.follower.start()

    def stop(self) -> None:
        """Stop the background work, after the last request was answered."""
        if self.follower is not None:
            self.follower.stop()
        self.housekeeper.stop()
        self.fills.stop()


def inherited_services() -> Services:
    """The services of a worker, with the configuration of its master, whose changes they follow.

    :raises ConfigError: the configuration cannot be used.
    """
    if parent is None:  # not started by this program's gunicorn configuration
        return build_services(load())
    services = build_services(parent.config, parent.ledger)
    return dataclasses.replace(services, follower=parent.follower(services.policies.apply))


def build_services(config: Config, ledger: Ledger | None = None) -> Services:
    """Build the services, from the driver upwards.

    :param ledger: the counts of the clients' requests; None: new ones, of this process alone.
    :raises ConfigError: the configuration cannot be used.
    """
    driver = drivers.load(config.driver).from_config(config)
    local = GuardedFiles(driver) if isinstance(driver, LocalObjects) else None
    cache = open_cache(config)
    metrics = Metrics(cache, disks(config, local), advice_of(driver))
    housekeeper = Housekeeper(cache, config.cache, metrics, driver_upkeep(config, driver))
    guarded = GuardedDriver(MeasuredDriver(driver))
    negative_cache = NegativeCache(config.cache.directory / "uploads", config.cache.revalidate_after)
    server = config.server
    fills = Fills(
        guarded,
        cache,
        metrics,
        housekeeper.make_room,
        at_once=fills_at_once(config),
        queue_size=server.threads // 2,  # the other half is for requests that need not wait
    )
    uploads = Uploads(
        guarded,
        cache,
        negative_cache,
        metrics,
        local=local,
        lock_timeout=server.lock_timeout,
        max_bytes=server.max_upload_bytes,
    )
    return Services(
        config=config,
        driver=guarded,
        fills=fills,
        objects=Objects(
            guarded,
            local,
            cache,
            fills,
            negative_cache,
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
        readiness=Readiness(guarded.probe, LastAnswer() if ledger is None else SHARED),
        housekeeper=housekeeper,
    )


def advice_of(driver: Driver) -> float | None:
    """Log what the driver tells from its settings; when its credential ends, in seconds since the epoch."""
    if not isinstance(driver, Advising):
        return None
    for line in driver.advice():
        log.warning("event=driver_advice text=%r", line)
    return driver.credential_end()


def driver_upkeep(config: Config, driver: Driver) -> DriverUpkeep | None:
    """How the housekeeping removes what crashes left in the driver's store; None: they leave nothing there."""
    if not isinstance(driver, Sweepable):
        return None
    return DriverUpkeep(recover=driver.recover, sweep=partial(drivers.sweep, config))


def fills_at_once(config: Config) -> int:
    """How many fills this worker may run: its share of ``max_fills``, rounded up."""
    return -(-config.cache.max_fills // config.server.worker_count)


def archive_limits(config: Config) -> Limits:
    """The limits of an archive. Each of its files is an upload, so ``max_upload_bytes`` holds as well."""
    largest = min(config.archive.max_file_bytes, config.server.max_upload_bytes)
    return Limits(config.archive.max_files, largest, config.archive.max_total_bytes)


def disks(config: Config, local: LocalObjects | None) -> list[Path]:
    """The folders on whose disks objects or copies are stored."""
    return [config.cache.directory] if local is None else [config.cache.directory, config.local.storage_path]


def open_cache(config: Config) -> Cache:
    """Open the cache, and check that its directory can be used.

    :raises ConfigError: the directory cannot be used.
    """
    try:
        cache = Cache(config.cache.directory)
        cache.locks.check_usable()
    except OSError as exc:
        raise ConfigError(
            f"{config.path}: cache.directory: expected a folder on a local disk with hard links, where this user can "
            f"make files, not {config.cache.directory}: {exc.strerror}"
        ) from exc
    return cache
