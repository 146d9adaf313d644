"""A driver around a driver, which counts and times what is asked of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import Counter, Histogram

from kci_storage.drivers.base import Digests, Driver, Expectation, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.errors import label
from kci_storage.monitoring import multiprocess  # noqa: F401  (before any counter is made)

OPERATIONS = ("stat", "read", "commit", "delete", "list", "probe")

_operations = Counter("kci_storage_backend_operations", "Requests to the driver, by result", ["operation", "result"])
_operation_seconds = Histogram(
    "kci_storage_backend_operation_duration_seconds",
    "Until the driver answered; for a read, until its first byte could be",
    ["operation"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
)
for _name in OPERATIONS:  # they are there before the first request
    _operations.labels(_name, "ok")
    _operation_seconds.labels(_name)


@contextlib.contextmanager
def _operation(name: str) -> Iterator[None]:
    """Count and time a call of the driver."""
    started = time.monotonic()
    result = "ok"
    try:
        yield
    except Exception as exc:
        result = label(exc)
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
