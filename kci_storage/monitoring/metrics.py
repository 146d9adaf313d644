# SPDX-License-Identifier: LGPL-2.1-or-later
"""The metrics of requests and services, and the page that Prometheus scrapes.

Values that can be read at any time, such as free space, are read at each scrape. The labels' values are a small fixed
set: a route, never a path; an error's label in :data:`kci_storage.errors.TABLE`, never its message.
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


_VERSION = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){2}", re.ASCII)  # of an exposition format

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
SCRAPE_TRIES = 3  # attempts while files vanish
CHALLENGES = ("shown", "solved", "passed", "slowed")
RULES = ("useragent", "subnet", "rate", "concurrency")
DURATIONS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)  # seconds; large files on slow links take minutes


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
_wrong_digests = Counter(
    "kci_storage_wrong_digests", "Objects fetched that lack the digest that another program stored with them"
)
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
    """The counters of one kind of request, cached since looking up labels costs more than counting."""
    return _requests.labels(method, route, status), _request_seconds.labels(method, route)


@functools.cache
def _served_counter(result: str) -> Counter:
    return _served.labels(result)


class Metrics:
    """Counts the events that services report, and makes the page that Prometheus scrapes.

    :param cache: its size is read at each scrape.
    :param disks: folders on the disks whose space is shown.
    :param credential_end: when the backend will refuse the driver's credential, in seconds since the epoch; None:
        never, or unknown.
    """

    def __init__(self, cache: Cache, disks: Iterable[Path], credential_end: float | None = None):
        self._cache = cache
        self._credential_end = credential_end
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
        """A response has been sent, or the client is gone."""
        method = exchange.environ["REQUEST_METHOD"]
        method, route = method if method in METHODS else "other", exchange.route or "none"
        requests, seconds = _request_counters(method, route, exchange.status)
        requests.inc()
        seconds.observe(exchange.duration)
        _sent.inc(exchange.sent)
        if exchange.body.received:
            _received.inc(exchange.body.received)

    def refused(self, rule: str) -> None:
        """A request was refused.

        :param rule: the label of its error, one of :data:`RULES`.
        """
        _refused.labels(rule).inc()

    def challenged(self, result: str) -> None:
        """A browser's download was challenged, or a browser solved the challenge.

        :param result: one of :data:`CHALLENGES`.
        """
        _challenges.labels(result).inc()

    def served(self, status: CacheStatus) -> None:
        """An object was opened."""
        _served_counter(status.value).inc()

    def uncached(self) -> None:
        """The rest of a download comes directly from the backend, since its fill ended early."""
        _uncached.inc()

    def wrong_digest(self) -> None:
        """An object was fetched whose content does not have the digest that another program stored with it."""
        _wrong_digests.inc()

    def revalidated(self, result: str) -> None:
        """A copy was revalidated.

        :param result: ``fresh``, ``changed``, ``deleted``, or ``failed``.
        """
        _revalidations.labels(result).inc()

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Count a fill, which runs during the block."""
        _filling.inc()
        try:
            with _counted(_fills):
                yield
        finally:
            _filling.dec()

    def evicted(self, files: int, size: int) -> None:
        """Copies were evicted.

        :param size: of all of them, in bytes.
        """
        _evicted_files.inc(files)
        _evicted_bytes.inc(size)

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """Count a failed upload request, which is answered during the block; :meth:`uploaded` counts stored files."""
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
        """Count an archive that is received and uploaded during the block; an error means that nothing was stored."""
        _archiving.inc()
        try:
            yield
        except Exception as exc:
            _archives.labels(label(exc)).inc()
            raise
        finally:
            _archiving.dec()

    def archived(self, uploaded: int, failed: int, size: int) -> None:
        """An archive's upload has ended.

        :param uploaded: the number of stored files.
        :param failed: the number of files that were not stored.
        :param size: of the stored files, in bytes.
        """
        _archives.labels("partial_failure" if failed else "ok").inc()
        _archived_files.labels("ok").inc(uploaded)
        _archived_files.labels("failed").inc(failed)
        _archived_bytes.inc(size)

    @contextlib.contextmanager
    def waiting_for(self, lock: AbstractContextManager[None]) -> Iterator[None]:
        """Hold a key's lock during the block, and measure the time until it was acquired.

        :raises WriteConflict: others held it for too long.
        """
        with contextlib.ExitStack() as held:
            with _lock_wait():
                held.enter_context(lock)
            yield

    def watch(self, app: Any) -> None:
        """Collect the views' own metrics (``flask_http_request_…``: time until the headers, exceptions)."""
        PrometheusMetrics(app, path=None, group_by="endpoint", default_latency_as_histogram=False)

    def page(self, accept: str | None) -> tuple[bytes, str]:
        """The metrics of all workers and of the machine, and their content type.

        :param accept: the value of ``Accept``.
        """
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
        """The metrics that are read at a scrape; prometheus_client calls it."""
        host = platform.node()
        usage = self._cache.usage.read()
        yield gauge("storage_files_cached", "Files in the cache", {"hostname": host}, usage[0])
        yield gauge("kci_storage_cache_bytes", "Bytes in the cache", {"hostname": host}, usage[1])
        if self._credential_end is not None:
            text = "When the backend will refuse the driver's credential"
            yield gauge("kci_storage_credential_end_timestamp_seconds", text, {}, self._credential_end)
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
    """The encoder and the content type that ``Accept`` asks for. Members with an invalid version are ignored."""
    valid = (member for member in accept.split(",") if _has_valid_versions(member))
    return choose_encoder(",".join(valid))


def _has_valid_versions(member: str) -> bool:
    """Whether all versions in a member of ``Accept`` are valid.

    >>> _has_valid_versions("text/plain; version=1.0.0; q=0.5"), _has_valid_versions("text/plain; version=x")
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
