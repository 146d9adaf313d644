# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading and deleting objects: what the views call, over the driver, the cache and the fills."""

from __future__ import annotations

import time
from collections.abc import Callable

from kci_storage.cache.directory import Cache
from kci_storage.cache.freshness import Freshness, Revalidation
from kci_storage.drivers.base import Driver, LocalObjects, ObjectInfo
from kci_storage.errors import InsufficientStorage, ObjectNotFound, Overloaded, PreconditionFailed, StorageError
from kci_storage.events import CacheStatus, Events
from kci_storage.files.locks import POLL_INTERVAL
from kci_storage.fills.fill import AlreadyCached
from kci_storage.fills.fills import Fills
from kci_storage.http.conditions import UNCONDITIONAL, RequestHeaders, bounded_range
from kci_storage.http.ranges import ByteRange
from kci_storage.net import slots
from kci_storage.store.contents import Content, FileContent, FilledContent, RemoteContent
from kci_storage.store.negative_cache import NegativeCache
from kci_storage.store.single_flight import SingleFlight

DIRECT_SIZE = 1024 * 1024  # bytes of a range that is asked for at once, before its object's properties are known
LONGEST_POLL = 0.1  # seconds; who has waited for an upload for a second need not be told within 10 ms of its end


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
        misses: NegativeCache,
        events: Events,
        *,
        wait_timeout: float,
        revalidate_after: float,
    ):
        self._driver = driver
        self._local = local
        self._cache = cache
        self._fills = fills
        self._misses = misses
        self._events = events
        self._wait_timeout = wait_timeout
        self._freshness = Freshness(driver, cache, events, revalidate_after)
        self._questions: SingleFlight[ObjectInfo] = SingleFlight()

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
        self._events.served(content.status)
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
        with slots.waiting():
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
            verdict = self._freshness.check(entry.record)
        except BaseException:
            content.close()
            raise
        if verdict is Revalidation.UNKNOWN:
            content.status = CacheStatus.STALE
        elif verdict is not Revalidation.FRESH:
            content.close()
            return None
        return content

    def _open_cold(
        self, key: str, method: str, conditions: RequestHeaders, lasts: Callable[[], None]
    ) -> Content | None:
        """A content that is fetched; None when one has to look again."""
        lasts()
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
            self._events.uncached()
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
            self._driver, self._fills, reader.info, self._events, self._wait_timeout, (wanted, reader)
        )

    def _open_fill(self, key: str) -> FilledContent:
        fill = self._fills.join(key)
        try:
            return FilledContent(self._driver, fill.wait_for_info(self._wait_timeout), fill, self._events)
        except BaseException:
            fill.leave()
            raise

    def _open_remote(self, key: str, fills: Fills | None) -> RemoteContent:
        # Who asks after a change on this server must not share an answer from before it.
        question = key, self._misses.changes(key)
        info = self._questions.share(question, lambda: self._driver.stat(key))
        return RemoteContent(self._driver, fills, info, self._events, self._wait_timeout)

    def delete(self, key: str, may_delete: Callable[[ObjectInfo], bool] | None = None) -> None:
        """Delete the object and its copy.

        :param may_delete: None: always; else it is given the present version, while nobody can replace it.
        :raises ObjectNotFound: there is none.
        :raises PreconditionFailed: the present version may not be deleted.
        :raises WriteConflict: an upload of the key took too long to wait for.
        :raises BackendError: it failed, or nobody knows.
        """
        with self._events.waiting_for(self._cache.writing(key, self._wait_timeout)):
            slots.refuse_no_longer()  # a failure from here on has the copy doubted
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
