"""Reading and deleting objects: what the views call, over the driver, the cache and the fills."""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kci_storage.cache import Cache, Record
from kci_storage.drivers.base import Driver, LocalObjects, ObjectInfo
from kci_storage.errors import ObjectNotFound, Overloaded, PreconditionFailed, StorageError
from kci_storage.fill import READ_SIZE, AlreadyCached, CorruptObject, Fill, Fills
from kci_storage.locks import POLL_INTERVAL
from kci_storage.misses import Misses

if TYPE_CHECKING:
    from kci_storage.metrics import Metrics

FOLLOW_AHEAD = 1024 * 1024  # bytes; a range that begins this little ahead of a running fill follows it
STALE_GRACE = 5  # seconds; after a revalidation that failed, the backend is not asked again for so long
REVALIDATION_STRIPES = 64


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
    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop``; never silently fewer.

        :raises ObjectChanged: before the first byte: the version is gone; ask anew.
        :raises StorageError: they cannot be had.
        """

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

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            data = os.pread(self.fd, min(READ_SIZE, stop - start), start)
            if not data:
                raise StorageError("the file became shorter while it was sent", detail=self.path)
            start += len(data)
            yield data

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

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        assert self._fill is not None
        try:
            for data in self._fill.read(start, stop):
                start += len(data)
                yield data
        except CorruptObject:
            raise
        except StorageError:
            # A full disk here, a filler lost in another process: what fails a fill need not fail a download.
            self._metrics.uncached()
            with self._driver.read(self.info.key, start, stop, etag=self.info.etag) as reader:
                yield from reader

    def close(self) -> None:
        if self._fill is not None:
            self._fill.leave()
            self._fill = None


class RemoteContent(Content):
    """An object of which only the properties are here, and maybe only a part is wanted."""

    status = CacheStatus.MISS

    def __init__(self, driver: Driver, fills: Fills, info: ObjectInfo, metrics: Metrics):
        self.info = info
        self._driver = driver
        self._metrics = metrics
        self._fills = fills

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        fill = self._fill_to_follow(start, stop)
        if fill is None:
            with self._driver.read(self.info.key, start, stop, etag=self.info.etag) as reader:
                yield from reader
            return
        with contextlib.closing(FilledContent(self._driver, self.info, fill, self._metrics)) as content:
            yield from content.read(start, stop)

    def _fill_to_follow(self, start: int, stop: int) -> Fill | None:
        """The running fill if it soon gets there, or a new one for who wants all; else None.

        A reader of a far range, such as a crawler that wants the end of every image, starts no fill.
        """
        if stop - start == self.info.size:
            fill = self._fills.join(self.info.key)
        elif (running := self._fills.join_running(self.info.key)) is not None:
            fill = running
        else:
            return None
        try:
            usable = fill.wait_for_info(timeout=STALE_GRACE).etag == self.info.etag
        except AlreadyCached:
            usable = False
        except BaseException:
            fill.leave()
            raise
        if usable and start <= fill.available + FOLLOW_AHEAD:
            return fill
        fill.leave()
        return None

    def close(self) -> None:
        pass


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
        self._freshness = Freshness(revalidate_after)

    def open(self, key: str, *, whole: bool = True) -> Content:
        """The object, to be read.

        :param whole: False: maybe only its properties are wanted, or some of its bytes, so that nothing is fetched
            yet if it is not here.
        :raises ObjectNotFound: there is none.
        :raises Overloaded: an upload of the key took too long to wait for.
        :raises BackendError: it is not here, and cannot be fetched.
        """
        content = self._open(key, whole)
        self._metrics.served(content.status)
        return content

    def open_hit(self, key: str) -> FileContent | None:
        """The object if it lies on this machine and may be served without asking anybody, else None."""
        if self._local is not None:
            try:
                content = self._open_local(self._local, key)
            except StorageError:
                return None  # who asks for it in full will be told
        else:
            entry = self._cache.lookup(key)
            if entry is None:
                return None
            content = FileContent(entry.record.info, CacheStatus.HIT, entry.fd, entry.path)
            if self._freshness.is_due(entry.record):
                content.close()
                return None
        self._metrics.served(content.status)
        return content

    @staticmethod
    def _open_local(local: LocalObjects, key: str) -> FileContent:
        info, fd = local.open(key)
        return FileContent(info, CacheStatus.HIT, fd, None)

    def _open(self, key: str, whole: bool) -> Content:
        if self._local is not None:
            return self._open_local(self._local, key)
        deadline = time.monotonic() + self._wait_timeout
        while True:
            content = self._open_copy(key) or self._open_cold(key, whole)
            if content is not None:
                return content
            if time.monotonic() > deadline:
                raise Overloaded("an upload of this file is running; try later", retry_after=5)
            time.sleep(POLL_INTERVAL)

    def _open_copy(self, key: str) -> FileContent | None:
        entry = self._cache.lookup(key)
        if entry is None:
            return None
        try:
            status = self._revalidate(entry.record) if self._freshness.is_due(entry.record) else CacheStatus.HIT
        except BaseException:
            os.close(entry.fd)
            raise
        if status is CacheStatus.MISS:
            os.close(entry.fd)
            return None
        return FileContent(entry.record.info, status, entry.fd, entry.path)

    def _open_cold(self, key: str, whole: bool) -> Content | None:
        """A content that is fetched; None when one has to look again."""
        if self._cache.is_being_written(key):
            return None
        if self._misses.remembers(key):
            raise ObjectNotFound("no such file")
        uploads = self._misses.uploads(key)
        try:
            if whole:
                return self._open_fill(key)
            return RemoteContent(self._driver, self._fills, self._driver.stat(key), self._metrics)
        except ObjectNotFound:
            self._misses.remember(key, uploads)
            raise

    def _open_fill(self, key: str) -> FilledContent | None:
        fill = self._fills.join(key)
        try:
            return FilledContent(self._driver, fill.wait_for_info(self._wait_timeout), fill, self._metrics)
        except AlreadyCached:
            fill.leave()
            return None
        except BaseException:
            fill.leave()
            raise

    def _revalidate(self, record: Record) -> CacheStatus:
        """Ask the backend whether the copy is still right: HIT, MISS when it is not, STALE when nobody knows.

        :raises ObjectNotFound: the object was deleted.
        """
        with self._freshness.turn(record) as due:
            if not due:
                return CacheStatus.HIT
            try:
                current = self._driver.stat(record.info.key)
            except ObjectNotFound:
                self._cache.remove_version(record)
                self._metrics.revalidated("deleted")
                raise
            except StorageError:
                self._freshness.postpone(record, STALE_GRACE)
                self._metrics.revalidated("failed")
                return CacheStatus.STALE
            if current.etag != record.info.etag:
                self._cache.remove_version(record)
                self._metrics.revalidated("changed")
                return CacheStatus.MISS
            self._cache.confirm(record)
            self._freshness.confirm(record)
            self._metrics.revalidated("fresh")
            return CacheStatus.HIT

    def delete(self, key: str, may_delete: Callable[[str | None], bool] | None = None) -> None:
        """Delete the object and its copy.

        :param may_delete: None: always; else it is given the present version's ETag.
        :raises ObjectNotFound: there is none.
        :raises PreconditionFailed: the present version may not be deleted.
        :raises WriteConflict: an upload of the key took too long to wait for.
        :raises BackendError: it failed, or nobody knows.
        """
        with self._metrics.waiting_for(self._cache.writing(key, self._wait_timeout)):
            self._cache.announce_commit(key)
            try:
                if may_delete is not None and not may_delete(self._driver.stat(key).etag):
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


class Freshness:
    """Which copies were checked when, by this process.

    :param period: seconds for which a check holds; 0: for ever.
    """

    def __init__(self, period: float):
        self._period = period
        self._good_until: dict[str, float] = {}  # by generation; seconds since the epoch
        self._stripes = [threading.Lock() for _ in range(REVALIDATION_STRIPES)]

    def is_due(self, record: Record) -> bool:
        """Whether the copy has to be checked before it is served."""
        if not self._period and not record.doubtful:
            return False
        until = self._good_until.get(record.generation)
        if until is None:
            until = 0.0 if record.doubtful else record.validated + self._period
        return time.time() >= until

    @contextlib.contextmanager
    def turn(self, record: Record) -> Iterator[bool]:
        """Check during the block, one thread at a time for a key; the block gets whether it is still due."""
        with self._stripes[hash(record.info.key) % REVALIDATION_STRIPES]:
            yield self.is_due(record)

    def confirm(self, record: Record) -> None:
        """The copy was right now."""
        self.postpone(record, self._period or float("inf"))

    def postpone(self, record: Record, seconds: float) -> None:
        """Do not check the copy again for so long."""
        if len(self._good_until) > 100_000:
            self._good_until.clear()
        self._good_until[record.generation] = time.time() + seconds
