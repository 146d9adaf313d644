# SPDX-License-Identifier: LGPL-2.1-or-later
"""The metrics of requests and services, and the page that Prometheus reads.

What can simply be looked up, such as free space, is looked up at each scrape. Labels are few and known: a route,
never a path; an error's label of :data:`kci_storage.errors.TABLE`, never its message.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_flask_exporter import PrometheusMetrics

from kci_storage.errors import TABLE, WriteConflict, label
from kci_storage.monitoring import multiprocess
from kci_storage.monitoring.machine import gauge, machine_metrics, mounts

if TYPE_CHECKING:
    from kci_storage.cache.directory import Cache
    from kci_storage.events import CacheStatus
    from kci_storage.wsgi.exchange import Exchange


_VERSION = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){2}", re.ASCII)  # of a format

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
SCRAPE_TRIES = 3  # while files vanish
CHALLENGES = ("shown", "solved", "passed", "slowed")
RULES = ("useragent", "subnet", "rate", "concurrency")
DURATIONS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)  # seconds; a root file system on a slow link takes minutes


_requests = Counter(
    "kci_storage_http_requests", "Requests answered, by method, route and status", ["method", "route", "status"]
)
_request_seconds = Histogram(
    "kci_storage_http_request_duration_seconds",
    "From the request's head to the response's last byte",
    ["method", "route"],
    buckets=DURATIONS,
)
_refused = Counter("kci_storage_refused", "Requests refused before any work, by rule", ["rule"])
_challenges = Counter("kci_storage_challenges", "Browser challenges, by what became of them", ["result"])
_sent = Counter("kci_storage_sent_bytes", "Bytes of response bodies that went out")
_received = Counter("kci_storage_received_bytes", "Bytes of request bodies that came in")
_served = Counter("kci_storage_cache_requests", "Objects opened, by where they came from", ["result"])
_revalidations = Counter("kci_storage_cache_revalidations", "Copies checked against the backend", ["result"])
_uncached = Counter("kci_storage_uncached_downloads", "Downloads served past the cache: no room, or a failed fill")
_fills = Counter("kci_storage_fills", "Cold objects brought into the cache", ["result"])
_filling = Gauge("kci_storage_fills_in_progress", "Cold objects on their way in", multiprocess_mode="livesum")
_evicted_files = Counter("kci_storage_evicted_files", "Copies removed to make room")
_evicted_bytes = Counter("kci_storage_evicted_bytes", "Bytes of the copies removed to make room")
_uploads = Counter("kci_storage_uploads", "Files uploaded, by result", ["result"])
_archives = Counter("kci_storage_archives", "Archives uploaded, by result", ["result"])
_archiving = Gauge(
    "kci_storage_archives_in_progress", "Archives being received or uploaded", multiprocess_mode="livesum"
)
_archived_files = Counter("kci_storage_archive_files", "Files of archives, by whether they were stored", ["result"])
_archived_bytes = Counter("kci_storage_archive_bytes", "Bytes of the files of archives that were stored, unpacked")
_lock_seconds = Histogram(
    "kci_storage_lock_wait_seconds", "Waiting for another writer of the same key", buckets=(0.01, 0.1, 1, 5, 30)
)
_lock_timeouts = Counter("kci_storage_lock_timeouts", "Waits for another writer that were given up")


@functools.cache
def _request_counters(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """Those of one kind of request; looking labels up costs more than counting."""
    return _requests.labels(method, route, status), _request_seconds.labels(method, route)


@functools.cache
def _served_counter(result: str) -> Counter:
    return _served.labels(result)


class Metrics:
    """The events that services report, and the page that Prometheus reads.

    :param cache: what is looked up at each scrape.
    :param disks: the folders whose disks' space is shown.
    """

    def __init__(self, cache: Cache, disks: Iterable[Path]):
        self._cache = cache
        self._disks = tuple(disks)
        for rule in RULES:
            _refused.labels(rule)
        for result in CHALLENGES:
            _challenges.labels(result)
        for result in ("hit", "miss", "stale"):
            _served.labels(result)
        for result in ("fresh", "changed", "deleted", "failed"):
            _revalidations.labels(result)
        for name in ("ok", *(row.label for row in TABLE.values())):
            _uploads.labels(name)
            _fills.labels(name)
            _archives.labels(name)
        _archives.labels("partial_failure")
        for name in ("ok", "failed"):
            _archived_files.labels(name)

    def request_finished(self, exchange: Exchange) -> None:
        """A response has gone out, or the client is gone."""
        method = exchange.environ["REQUEST_METHOD"]
        method, route = method if method in METHODS else "other", exchange.route or "none"
        requests, seconds = _request_counters(method, route, exchange.status)
        requests.inc()
        seconds.observe(exchange.duration)
        _sent.inc(exchange.sent)
        if exchange.body.received:
            _received.inc(exchange.body.received)

    def refused(self, rule: str) -> None:
        """A request was not let in: the label of its error."""
        _refused.labels(rule).inc()

    def challenged(self, result: str) -> None:
        """A browser's download met the challenge, or a browser solved it."""
        _challenges.labels(result).inc()

    def served(self, status: CacheStatus) -> None:
        """An object was opened."""
        _served_counter(status.value).inc()

    def uncached(self) -> None:
        """The rest of a download comes straight from the backend, since its fill ended early."""
        _uncached.inc()

    def revalidated(self, result: str) -> None:
        """A copy was checked: ``fresh``, ``changed``, ``deleted``, or ``failed``."""
        _revalidations.labels(result).inc()

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """A cold object comes in during the block."""
        _filling.inc()
        try:
            with _counted(_fills):
                yield
        finally:
            _filling.dec()

    def evicted(self, files: int, size: int) -> None:
        """Copies of so many bytes in all were removed to make room."""
        _evicted_files.inc(files)
        _evicted_bytes.inc(size)

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """An upload request is answered during the block; its files are counted as they are stored."""
        try:
            yield
        except Exception as exc:
            _uploads.labels(label(exc)).inc()
            raise

    def uploaded(self) -> None:
        """A file was stored."""
        _uploads.labels("ok").inc()

    @contextlib.contextmanager
    def archiving(self) -> Iterator[None]:
        """An archive is received and uploaded during the block; an error means that nothing of it was stored."""
        _archiving.inc()
        try:
            yield
        except Exception as exc:
            _archives.labels(label(exc)).inc()
            raise
        finally:
            _archiving.dec()

    def archived(self, uploaded: int, failed: int, size: int) -> None:
        """So many files of an archive were stored, of so many bytes in all, and so many were not."""
        _archives.labels("partial_failure" if failed else "ok").inc()
        _archived_files.labels("ok").inc(uploaded)
        _archived_files.labels("failed").inc(failed)
        _archived_bytes.inc(size)

    @contextlib.contextmanager
    def waiting_for(self, lock: AbstractContextManager[None]) -> Iterator[None]:
        """Hold a key's lock during the block; how long that took to get is measured.

        :raises WriteConflict: it was held by others for too long.
        """
        with contextlib.ExitStack() as held:
            with _lock_wait():
                held.enter_context(lock)
            yield

    def watch(self, app: Any) -> None:
        """Have the views' own metrics (``flask_http_request_…``: time until the headers, exceptions) collected."""
        PrometheusMetrics(app, path=None, group_by="endpoint", default_latency_as_histogram=False)

    def page(self, accept: str | None) -> tuple[bytes, str]:
        """The metrics of all workers and of the machine, and their content type."""
        registry = CollectorRegistry()
        registry.register(self)
        registry.register(multiprocess.Counted())
        encode, content_type = _encoder(accept or "")
        for _ in range(SCRAPE_TRIES - 1):
            multiprocess.settle()
            with contextlib.suppress(FileNotFoundError):
                return encode(registry), content_type
        return encode(registry), content_type

    def collect(self) -> Iterator[Metric]:
        """What is looked up at a scrape; prometheus_client calls it."""
        host = platform.node()
        usage = self._cache.usage.read()
        yield gauge("storage_files_cached", "Files in the cache", {"hostname": host}, usage[0])
        yield gauge("kci_storage_cache_bytes", "Bytes in the cache", {"hostname": host}, usage[1])
        yield from self._disk_space(host)
        yield from machine_metrics()

    def _disk_space(self, host: str) -> Iterator[Metric]:
        labels = ["hostname", "diskname", "mount_point"]
        free = GaugeMetricFamily("storage_free_space", "Free bytes on the disk", labels=labels)
        total = GaugeMetricFamily("storage_total_space", "Bytes on the disk", labels=labels)
        for mount, (device, folder) in sorted(
            {mount: (dev, path) for dev, mount, path in mounts(self._disks)}.items()
        ):
            space = psutil.disk_usage(str(folder))
            free.add_metric([host, device, mount], space.free)
            total.add_metric([host, device, mount], space.total)
        yield free
        yield total


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """What the header ``Accept`` asks for: how to write a page, and its content type.

    A member that makes no sense is passed over, as if it were not there.
    """
    known = (member for member in accept.split(",") if _is_sensible(member))
    return choose_encoder(",".join(known))


def _is_sensible(member: str) -> bool:
    """Whether each version that a member of ``Accept`` names is one.

    >>> _is_sensible("text/plain; version=1.0.0; q=0.5"), _is_sensible("text/plain;version=x;version=1.0.0")
    (True, False)
    """
    parameters = (parameter.partition("=") for parameter in member.split(";")[1:])
    return all(_VERSION.fullmatch(text.strip()) for name, _, text in parameters if name.strip() == "version")


@contextlib.contextmanager
def _counted(counter: Counter) -> Iterator[None]:
    """Count the block's outcome: ``ok``, or the label of its error."""
    try:
        yield
    except Exception as exc:
        counter.labels(label(exc)).inc()
        raise
    counter.labels("ok").inc()


@contextlib.contextmanager
def _lock_wait() -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except WriteConflict:
        _lock_timeouts.inc()
        raise
    finally:
        _lock_seconds.observe(time.monotonic() - started)
