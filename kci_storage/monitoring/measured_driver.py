# SPDX-License-Identifier: LGPL-2.1-or-later
"""A wrapper around a driver that counts and times the operations, and releases the thread's slot meanwhile.

All requests use the backend through it. So this is the one place that releases the thread's slot to another request
while a request waits for the backend (:func:`kci_storage.net.slots.waiting`; for the reasons see
docs/decisions/waiting.md).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import Counter, Histogram

from kci_storage.drivers.base import Digests, Driver, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.errors import label
from kci_storage.monitoring import multiprocess  # noqa: F401  (must precede the first counter)
from kci_storage.net import slots

OPERATIONS = ("stat", "read", "commit", "delete", "fence", "list", "probe")

_operations = Counter("kci_storage_backend_operations", "Requests to the driver, by result", ["operation", "result"])
_operation_seconds = Histogram(
    "kci_storage_backend_operation_duration_seconds",
    "Until the driver answered; for a read, until its first byte could be",
    ["operation"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
)
for _name in OPERATIONS:  # so that the series exist before the first request
    _operations.labels(_name, "ok")
    _operation_seconds.labels(_name)


@contextlib.contextmanager
def _measured(operation: str, bounded: bool = False) -> Iterator[None]:
    """Count and time a call of the driver during the block, without a slot.

    :param bounded: whether the request may be refused if too many wait already.
    :raises Overloaded: too many wait; the driver has not been called.
    """
    with slots.waiting(bounded):
        started = time.monotonic()
        result = "ok"
        try:
            yield
        except Exception as exc:
            result = label(exc)
            raise
        finally:
            _operations.labels(operation, result).inc()
            _operation_seconds.labels(operation).observe(time.monotonic() - started)


class MeasuredDriver(Driver):
    """A wrapper around a driver that counts and times its operations, and releases the thread's slot meanwhile.

    Reading operations (:meth:`stat`, :meth:`read`, :meth:`list`) are refused if too many requests wait already.
    Writing ones are not, since the request's body may have been received by then.
    """

    def __init__(self, driver: Driver):
        self._driver = driver
        self.wants_md5 = driver.wants_md5

    @classmethod
    def from_config(cls, config: Any) -> Driver:
        """Not supported: it wraps a driver and has no configuration.

        :raises TypeError: always.
        """
        raise TypeError("a MeasuredDriver is made around another driver")

    def stat(self, key: str) -> ObjectInfo:
        with _measured("stat", bounded=True):
            return self._driver.stat(key)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        with _measured("read", bounded=True):
            return MeasuredReader(self._driver.read(key, start, stop, etag))

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        return MeasuredWriter(self._driver.writer(key, content_type, tags))

    def delete(self, key: str, expected: str) -> None:
        with _measured("delete"):
            self._driver.delete(key, expected)

    def fence(self, key: str, expected: str) -> ObjectInfo | None:
        with _measured("fence"):
            return self._driver.fence(key, expected)

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        with _measured("list", bounded=True):
            return self._driver.list(prefix, delimiter, marker, details)

    def probe(self) -> None:
        with _measured("probe"):
            self._driver.probe()

    def close(self) -> None:
        self._driver.close()


class MeasuredReader(ObjectReader):
    """A wrapper around a reader that releases the thread's slot while it waits for a piece."""

    def __init__(self, reader: ObjectReader):
        self.info = reader.info
        self._reader = reader

    def readinto(self, buffer: memoryview) -> int:
        with slots.waiting(bounded=False):
            return self._reader.readinto(buffer)

    def close(self) -> None:
        self._reader.close()


class MeasuredWriter(ObjectWriter):
    """A wrapper around a writer that counts and times its commit, and releases the thread's slot while it waits."""

    def __init__(self, writer: ObjectWriter):
        self._writer = writer

    def write(self, data: bytes | memoryview) -> None:
        with slots.waiting(bounded=False):
            self._writer.write(data)

    def commit(
        self,
        digests: Digests,
        expected: str | None,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        with _measured("commit"):
            return self._writer.commit(digests, expected, replay)

    @property
    def held(self) -> int:
        return self._writer.held

    def flush(self) -> None:
        with slots.waiting(bounded=False):
            self._writer.flush()

    def abort(self) -> None:
        self._writer.abort()
