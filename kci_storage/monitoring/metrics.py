"""What Prometheus gets to know. No other module imports it.

Counters live in files of each worker, which any of them reads (``PROMETHEUS_MULTIPROC_DIR`` must be set before this
module is imported). A worker goes on with the files, and so with the counts, of the dead one whose number it has: no
count is lost or moved, and there are never more files than for as many workers as there were at a time. What can
simply be looked up, such as free space, is looked up at each scrape. Labels are few and known: a route, never a path;
an error's label of :data:`kci_storage.errors.TABLE`, never its message.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.values import MultiProcessValue
from prometheus_flask_exporter import PrometheusMetrics

from kci_storage.drivers.base import Digests, Driver, Expectation, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.errors import TABLE, StorageError, WriteConflict, meaning
from kci_storage.monitoring import numbering

if TYPE_CHECKING:
    from kci_storage.cache.directory import Cache
    from kci_storage.store.objects import CacheStatus
    from kci_storage.wsgi.exchange import Exchange

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
STARTING_SECONDS = 1  # a worker takes microseconds to fill a file that it has made
CHALLENGES = ("shown", "solved", "passed", "slowed")
RULES = ("useragent", "subnet", "rate", "concurrency")
OPERATIONS = ("stat", "read", "commit", "delete", "list", "probe")
DURATIONS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)  # seconds; a root file system on a slow link takes minutes


def _process() -> int | str:
    """Whose files are written; the library asks at each count, since a process may have been forked meanwhile."""
    return numbering.own or os.getpid()


if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    values.ValueClass = MultiProcessValue(_process)  # as the library's page on its multiprocess mode says

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
_operations = Counter("kci_storage_backend_operations", "Requests to the driver, by result", ["operation", "result"])
_operation_seconds = Histogram(
    "kci_storage_backend_operation_duration_seconds",
    "Until the driver answered; for a read, until its first byte could be",
    ["operation"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
)


@functools.cache
def _request_counters(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """Those of one kind of request; looking labels up costs more than counting."""
    return _requests.labels(method, route, status), _request_seconds.labels(method, route)


@functools.cache
def _served_counter(result: str) -> Counter:
    return _served.labels(result)


def forget_worker(name: str) -> None:
    """The worker of that name is gone: what it was doing, it does no more. Its counts stay."""
    mark_process_dead(name)


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
        for operation in OPERATIONS:
            _operations.labels(operation, "ok")
            _operation_seconds.labels(operation)
        for label in ("ok", *(row.label for row in TABLE.values())):
            _uploads.labels(label)
            _fills.labels(label)
            _archives.labels(label)
        _archives.labels("partial_failure")
        for label in ("ok", "failed"):
            _archived_files.labels(label)

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
            _uploads.labels(_label(exc)).inc()
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
            _archives.labels(_label(exc)).inc()
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

    def measured(self, driver: Driver) -> Driver:
        """The driver, with every call counted and timed."""
        return MeasuredDriver(driver)

    def page(self, accept: str | None) -> tuple[bytes, str]:
        """The metrics of all workers and of the machine, and their content type."""
        registry = CollectorRegistry()
        registry.register(self)  # type: ignore[arg-type]
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            MultiProcessCollector(registry)
        encode, content_type = choose_encoder(accept or "")
        deadline = time.monotonic() + STARTING_SECONDS
        while True:
            try:
                return encode(registry), content_type
            except struct.error:  # a worker that is starting has made one of its files, and not yet filled it
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def collect(self) -> Iterator[Metric]:
        """What is looked up at a scrape; prometheus_client calls it."""
        host = platform.node()
        usage = self._cache.usage.read()
        yield _gauge("storage_files_cached", "Files in the cache", {"hostname": host}, usage[0])
        yield _gauge("kci_storage_cache_bytes", "Bytes in the cache", {"hostname": host}, usage[1])
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


def mounts(folders: Iterable[Path]) -> Iterator[tuple[str, str, Path]]:
    """The device and the mount point that each folder lies on, and a folder there that exists: it itself, if it does.

    The local driver makes its folder with the first upload.
    """
    mounted = {partition.mountpoint: partition.device for partition in psutil.disk_partitions(all=True)}
    for folder in folders:
        path = folder.resolve()
        path = next(parent for parent in (path, *path.parents) if parent.exists())
        mount = next((str(parent) for parent in (path, *path.parents) if str(parent) in mounted), "/")
        yield mounted.get(mount, "unknown"), mount, path


def machine_metrics() -> Iterator[Metric]:
    """The machine's processor, memory and load."""
    times = psutil.cpu_times()
    cpu = CounterMetricFamily("kci_storage_machine_cpu_seconds", "Processor time of all cores", labels=["mode"])
    for mode in ("user", "system", "idle", "iowait"):
        cpu.add_metric([mode], getattr(times, mode, 0.0))
    yield cpu
    memory = psutil.virtual_memory()
    yield _gauge("kci_storage_machine_memory_total_bytes", "The machine's memory", {}, memory.total)
    yield _gauge("kci_storage_machine_memory_available_bytes", "Memory to be had", {}, memory.available)
    load = GaugeMetricFamily("kci_storage_machine_load", "Load average", labels=["minutes"])
    for minutes, average in zip(("1", "5", "15"), os.getloadavg(), strict=True):
        load.add_metric([minutes], average)
    yield load


def _gauge(name: str, help_text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


@contextlib.contextmanager
def _counted(counter: Counter) -> Iterator[None]:
    """Count the block's outcome: ``ok``, or the label of its error."""
    try:
        yield
    except Exception as exc:
        counter.labels(_label(exc)).inc()
        raise
    counter.labels("ok").inc()


def _label(error: Exception) -> str:
    return meaning(error).label if isinstance(error, StorageError) else "internal"


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


@contextlib.contextmanager
def _operation(name: str) -> Iterator[None]:
    """Count and time a call of the driver."""
    started = time.monotonic()
    result = "ok"
    try:
        yield
    except Exception as exc:
        result = _label(exc)
        raise
    finally:
        _operations.labels(name, result).inc()
        _operation_seconds.labels(name).observe(time.monotonic() - started)


class MeasuredDriver(Driver):
    """A driver around a driver, which counts and times."""

    def __init__(self, driver: Driver):
        self._driver = driver
        self.wants_md5 = driver.wants_md5

    @classmethod
    def from_config(cls, config: Any) -> Driver:
        """It is made around a driver, not from a configuration."""
        raise TypeError("a MeasuredDriver is made around another driver")

    def stat(self, key: str) -> ObjectInfo:
        with _operation("stat"):
            return self._driver.stat(key)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        with _operation("read"):
            return self._driver.read(key, start, stop, etag)

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        return MeasuredWriter(self._driver.writer(key, content_type, tags))

    def delete(self, key: str) -> None:
        with _operation("delete"):
            self._driver.delete(key)

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        with _operation("list"):
            return self._driver.list(prefix, delimiter, marker, details)

    def probe(self) -> None:
        with _operation("probe"):
            self._driver.probe()

    def close(self) -> None:
        self._driver.close()


class MeasuredWriter(ObjectWriter):
    """A writer around a writer, which counts and times its commit."""

    def __init__(self, writer: ObjectWriter):
        self._writer = writer

    def write(self, data: bytes | memoryview) -> None:
        self._writer.write(data)

    def commit(
        self,
        digests: Digests,
        expected: str | Expectation = Expectation.ANYTHING,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        with _operation("commit"):
            return self._writer.commit(digests, expected, replay)

    @property
    def held(self) -> int:
        return self._writer.held

    def flush(self) -> None:
        self._writer.flush()

    def abort(self) -> None:
        self._writer.abort()
