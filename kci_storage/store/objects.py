"""Reading and deleting objects: what the views call, over the driver, the cache and the fills."""

from __future__ import annotations

import contextlib
import enum
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kci_storage.cache.directory import Cache
from kci_storage.cache.freshness import Freshness, Verdict
from kci_storage.drivers.base import Driver, LocalObjects, ObjectInfo, ObjectReader
from kci_storage.errors import (
    BackendError,
    InsufficientStorage,
    ObjectChanged,
    ObjectNotFound,
    Overloaded,
    PreconditionFailed,
    StorageError,
)
from kci_storage.files.locks import POLL_INTERVAL
from kci_storage.fills.fill import AlreadyCached, Fill, Fills, Region
from kci_storage.fills.resuming import resumed, verified
from kci_storage.http.conditions import UNCONDITIONAL, ByteRange, RequestHeaders, bounded_range
from kci_storage.net import slots
from kci_storage.store.negative_cache import Misses
from kci_storage.store.single_flight import Flights

if TYPE_CHECKING:
    from kci_storage.monitoring.metrics import Metrics

DIRECT_SIZE = 1024 * 1024  # bytes of a range that is asked for at once, before its object's properties are known
FOLLOW_AHEAD = 1024 * 1024  # bytes; a range that begins this little ahead of a running fill follows it
LONGEST_POLL = 0.1  # seconds; who has waited for an upload for a second need not be told within 10 ms of its end


class CacheStatus(enum.Enum):
    """Where an answer came from; the value is what ``X-Cache`` says."""

    HIT = "hit"
    MISS = "miss"
    STALE = "stale"  # a copy that should have been checked, while the backend is away


class Content(ABC):
    """One version of an object, to be read. The caller closes it."""

    info: ObjectInfo
    status: CacheStatus

    @abstractmethod
    def segments(self, start: int, stop: int) -> Iterator[bytes | Region]:
        """The bytes from ``start`` up to ``stop``, where that is possible as regions of a file; never silently fewer.

        :raises ObjectChanged: before the first byte: the version is gone; ask anew.
        :raises StorageError: they cannot be had.
        """

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The same, all as bytes."""
        for segment in self.segments(start, stop):
            if isinstance(segment, bytes):
                yield segment
            else:
                yield from segment.read()

    @abstractmethod
    def close(self) -> None:
        """Let go. Idempotent."""


class FileContent(Content):
    """A complete file on this machine.

    :param fd: the file, which is closed with the content.
    :param path: where it lies.
    """

    def __init__(self, info: ObjectInfo, status: CacheStatus, fd: int, path: str | None):
        self.info = info
        self.status = status
        self.fd = fd
        self.path = path

    def segments(self, start: int, stop: int) -> Iterator[Region]:
        yield Region(self.fd, start, stop)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FilledContent(Content):
    """An object that is arriving.

    :param fill: joined by the caller, and left with the content.
    """

    status = CacheStatus.MISS

    def __init__(self, driver: Driver, info: ObjectInfo, fill: Fill, metrics: Metrics):
        self.info = info
        self._driver = driver
        self._metrics = metrics
        self._fill: Fill | None = fill

    def segments(self, start: int, stop: int) -> Iterator[bytes | Region]:
        assert self._fill is not None
        position = start
        try:
            for region in self._fill.regions(start, stop):
                position = region.stop
                yield region
        except (BackendError, ObjectNotFound):
            raise
        except StorageError:
            # A full disk here, a filler lost in another process: what fails a fill need not fail a download.
            self._metrics.uncached()
            pieces = resumed(self._driver, self.info, position, stop, begun=position > start)
            whole = stop - start == self.info.size
            if whole:
                pieces = verified(self.info, pieces, self._fill.read(0, position))
            yield from map(bytes, pieces)

    def close(self) -> None:
        if self._fill is not None:
            self._fill.leave()
            self._fill = None


class RemoteContent(Content):
    """An object of which only the properties are here, and maybe only a part is wanted.

    :param fills: None: the cache has no room for it.
    :param patience: seconds to wait for a fill to begin.
    :param begun: a part that is on its way already, closed with the content.
    """

    status = CacheStatus.MISS

    def __init__(
        self,
        driver: Driver,
        fills: Fills | None,
        info: ObjectInfo,
        metrics: Metrics,
        patience: float,
        begun: tuple[ByteRange, ObjectReader] | None = None,
    ):
        self.info = info
        self._begun = begun
        self._driver = driver
        self._metrics = metrics
        self._fills = fills
        self._patience = patience
        self._followed: list[FilledContent] = []

    def segments(self, start: int, stop: int) -> Iterator[bytes | Region]:
        if self._begun is not None and not self._wants_most(start, stop) and self._begun[0].start == start:
            return map(bytes, resumed(self._driver, self.info, start, stop, self._begun[1]))
        content = self._to_follow(self._fills, start, stop) if self._fills is not None else None
        if content is not None:
            self._followed.append(content)
            return content.segments(start, stop)
        pieces = resumed(self._driver, self.info, start, stop)
        return map(bytes, verified(self.info, pieces) if stop - start == self.info.size else pieces)

    def _wants_most(self, start: int, stop: int) -> bool:
        return 2 * (stop - start) >= self.info.size

    def _to_follow(self, fills: Fills, start: int, stop: int) -> FilledContent | None:
        """The running fill if it soon gets there, or a new one for who wants most of the object; else None.

        Who wants less, such as a crawler that reads the end of every image, starts no fill.
        """
        wants_most = self._wants_most(start, stop)
        running, here = fills.progress(self.info.key) or (None, 0)
        if start > here + FOLLOW_AHEAD:
            if wants_most:
                with contextlib.suppress(Overloaded):
                    fills.join(self.info.key).leave()
            return None
        if wants_most or (running is not None and running.etag == self.info.etag):
            return self._follow(fills.join(self.info.key))
        return None

    def _follow(self, fill: Fill) -> FilledContent | None:
        try:
            if fill.wait_for_info(self._patience).etag == self.info.etag:
                return FilledContent(self._driver, self.info, fill, self._metrics)
        except AlreadyCached:
            fill.leave()
            raise ObjectChanged("the file has just been fetched") from None  # so that the caller finds it
        except InsufficientStorage:
            self._metrics.uncached()
        except BaseException:
            fill.leave()
            raise
        fill.leave()
        return None

    def close(self) -> None:
        if self._begun is not None:
            self._begun[1].close()
        while self._followed:
            self._followed.pop().close()


def _nothing() -> None:
    """Nobody wants to know."""


class Objects:
    """The objects of the store.

    :param local: the driver's ability to open objects as local files, if it has that.
    :param wait_timeout: seconds to wait for an upload of the key, or for a backend's first byte.
    :param revalidate_after: seconds after which a copy is checked against the backend; 0: never.
    """

    def __init__(
        self,
        driver: Driver,
        local: LocalObjects | None,
        cache: Cache,
        fills: Fills,
        misses: Misses,
        metrics: Metrics,
        *,
        wait_timeout: float,
        revalidate_after: float,
    ):
        self._driver = driver
        self._local = local
        self._cache = cache
        self._fills = fills
        self._misses = misses
        self._metrics = metrics
        self._wait_timeout = wait_timeout
        self._freshness = Freshness(driver, cache, metrics, revalidate_after)
        self._questions: Flights[ObjectInfo] = Flights()

    def open(
        self,
        key: str,
        method: str = "GET",
        conditions: RequestHeaders = UNCONDITIONAL,
        lasts: Callable[[], None] = _nothing,
    ) -> Content:
        """The object, to be read.

        :param method: with another one than ``GET``, and under conditions, maybe only its properties are wanted, or
            some of its bytes: then no more than those is fetched if it is not here.
        :param lasts: called before what may take a while; what it raises ends that.
        :raises ObjectNotFound: there is none.
        :raises Overloaded: an upload of the key took too long to wait for.
        :raises BackendError: it is not here, and cannot be fetched.
        """
        content = self._open(key, method, conditions, lasts)
        self._metrics.served(content.status)
        return content

    @staticmethod
    def _open_local(local: LocalObjects, key: str) -> FileContent:
        info, fd = local.open(key)
        return FileContent(info, CacheStatus.HIT, fd, None)

    def _open(self, key: str, method: str, conditions: RequestHeaders, lasts: Callable[[], None]) -> Content:
        if self._local is not None:
            return self._open_local(self._local, key)
        started = time.monotonic()
        while True:
            content = self._open_copy(key, lasts) or self._open_cold(key, method, conditions, lasts)
            if content is not None:
                return content
            self._wait_for_writer(key, started)

    def _wait_for_writer(self, key: str, started: float) -> None:
        """Wait until something may have come of the key's upload; less often look those who have waited long."""
        with slots.released():
            while True:
                waited = time.monotonic() - started
                if waited > self._wait_timeout:
                    raise Overloaded("an upload of this file is running; try later", retry_after=5)
                time.sleep(min(LONGEST_POLL, max(POLL_INTERVAL, waited / 10)))
                if self._cache.has_copy(key) or not self._cache.is_being_written(key):
                    return

    def _open_copy(self, key: str, lasts: Callable[[], None]) -> FileContent | None:
        entry = self._cache.lookup(key)
        if entry is None:
            return None
        content = FileContent(entry.record.info, CacheStatus.HIT, entry.fd, entry.path)
        if not self._freshness.is_due(entry.record):
            return content
        try:
            lasts()
            slots.may_block()
            verdict = self._freshness.check(entry.record)
        except BaseException:
            content.close()
            raise
        if verdict is Verdict.UNKNOWN:
            content.status = CacheStatus.STALE
        elif verdict is not Verdict.FRESH:
            content.close()
            return None
        return content

    def _open_cold(
        self, key: str, method: str, conditions: RequestHeaders, lasts: Callable[[], None]
    ) -> Content | None:
        """A content that is fetched; None when one has to look again."""
        lasts()
        slots.may_block()
        if self._cache.is_being_written(key):
            return None
        if self._misses.remembers(key):
            raise ObjectNotFound("no such file")
        changes = self._misses.changes(key)
        try:
            return self._fetch(key, method, conditions)
        except AlreadyCached:
            return None
        except InsufficientStorage:  # not even for the first byte of a fill
            self._metrics.uncached()
            return self._open_remote(key, None)
        except ObjectNotFound:
            self._misses.remember(key, changes)
            raise

    def _fetch(self, key: str, method: str, conditions: RequestHeaders) -> Content:
        if method == "GET" and conditions == UNCONDITIONAL:
            return self._open_fill(key)
        wanted = bounded_range(conditions) if method == "GET" else None
        if wanted is not None and wanted.length <= DIRECT_SIZE and self._fills.progress(key) is None:
            return self._open_range(key, wanted)
        return self._open_remote(key, self._fills)

    def _open_range(self, key: str, wanted: ByteRange) -> RemoteContent:
        """A small part, which one request brings together with the object's properties."""
        reader = self._driver.read(key, wanted.start, wanted.stop)
        return RemoteContent(
            self._driver, self._fills, reader.info, self._metrics, self._wait_timeout, (wanted, reader)
        )

    def _open_fill(self, key: str) -> FilledContent:
        fill = self._fills.join(key)
        try:
            return FilledContent(self._driver, fill.wait_for_info(self._wait_timeout), fill, self._metrics)
        except BaseException:
            fill.leave()
            raise

    def _open_remote(self, key: str, fills: Fills | None) -> RemoteContent:
        # Who asks after a change on this server must not share an answer from before it.
        question = key, self._misses.changes(key)
        info = self._questions.share(question, lambda: self._driver.stat(key))
        return RemoteContent(self._driver, fills, info, self._metrics, self._wait_timeout)

    def delete(self, key: str, may_delete: Callable[[ObjectInfo], bool] | None = None) -> None:
        """Delete the object and its copy.

        :param may_delete: None: always; else it is given the present version, while nobody can replace it.
        :raises ObjectNotFound: there is none.
        :raises PreconditionFailed: the present version may not be deleted.
        :raises WriteConflict: an upload of the key took too long to wait for.
        :raises BackendError: it failed, or nobody knows.
        """
        with self._metrics.waiting_for(self._cache.writing(key, self._wait_timeout)):
            self._cache.announce_commit(key)
            try:
                if may_delete is not None and not may_delete(self._driver.stat(key)):
                    raise PreconditionFailed("the stored file is not the version that the request asks for")
                self._driver.delete(key)
            except PreconditionFailed:
                raise
            except ObjectNotFound:
                self._forget(key)
                raise
            except StorageError:
                self._cache.doubt(key)
                raise
            self._forget(key)

    def _forget(self, key: str) -> None:
        self._cache.remove(key)
        self._cache.revoke_fill(key)
        self._misses.changed(key)
