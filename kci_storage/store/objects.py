# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading and deleting objects, for the views: over the driver, the cache and the fills."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import Record
from kci_storage.cache.freshness import Freshness, Revalidation
from kci_storage.cache.settling import Settler
from kci_storage.drivers.base import Driver, LocalObjects, ObjectInfo
from kci_storage.errors import (
    InsufficientStorage,
    ObjectNotFound,
    OutcomeUnknown,
    Overloaded,
    PreconditionFailed,
    WriteConflict,
)
from kci_storage.events import CacheStatus, Events
from kci_storage.files.locks import POLL_INTERVAL
from kci_storage.fills.fill import AlreadyCached
from kci_storage.fills.fills import Fills
from kci_storage.http.conditions import UNCONDITIONAL, RequestHeaders, bounded_range
from kci_storage.http.ranges import ByteRange
from kci_storage.net import slots
from kci_storage.store.changing import changing
from kci_storage.store.contents import Content, FileContent, FilledContent, RemoteContent
from kci_storage.store.negative_cache import NegativeCache
from kci_storage.store.single_flight import SingleFlight

MAX_DIRECT_RANGE = 1024 * 1024  # bytes of a range that is read at once, before its object's properties are known
DELETIONS = 10  # tries to delete whatever is there, while other machines replace it
MAX_POLL_INTERVAL = 0.1  # seconds; a request that has waited for an upload for a second need not be exact to 10 ms


def _ignore() -> None:
    """The caller need not be told."""


class Objects:
    """The objects of the store.

    :param local: the driver, if it can open objects as local files; else None.
    :param wait_timeout: seconds to wait for an upload of the key, or for a backend's first byte.
    :param revalidate_after: seconds after which a copy is revalidated with the backend; 0: never.
    """

    def __init__(
        self,
        driver: Driver,
        local: LocalObjects | None,
        cache: Cache,
        fills: Fills,
        negative_cache: NegativeCache,
        events: Events,
        *,
        wait_timeout: float,
        revalidate_after: float,
    ):
        self._driver = driver
        self._local = local
        self._cache = cache
        self._fills = fills
        self._negative_cache = negative_cache
        self._events = events
        self._wait_timeout = wait_timeout
        self._settler = Settler(driver, cache)
        self._freshness = Freshness(driver, cache, self._settler, events, revalidate_after)
        self._questions: SingleFlight[ObjectInfo] = SingleFlight()

    def open(
        self,
        key: str,
        method: str = "GET",
        conditions: RequestHeaders = UNCONDITIONAL,
        before_blocking: Callable[[], None] = _ignore,
    ) -> Content:
        """Open an object for reading.

        :param method: the request's; another one than ``GET`` needs only the object's properties.
        :param conditions: the request's preconditions and range; with these, no more is fetched of an object that is
            not cached than the request needs.
        :param before_blocking: called before this call may block; what it raises is passed on.
        :raises ObjectNotFound: there is no such object.
        :raises Overloaded: an upload of the key took too long to wait for.
        :raises BackendError: the object is not cached, and cannot be fetched.
        """
        content = self._open(key, method, conditions, before_blocking)
        self._events.served(content.status)
        return content

    @staticmethod
    def _open_local(local: LocalObjects, key: str) -> FileContent:
        info, fd = local.open(key)
        return FileContent(info, CacheStatus.HIT, fd, None)

    def _open(
        self, key: str, method: str, conditions: RequestHeaders, before_blocking: Callable[[], None]
    ) -> Content:
        if self._local is not None:
            return self._open_local(self._local, key)
        started = time.monotonic()
        while True:
            copied = self._open_copy(key, before_blocking)
            content = copied or self._open_cold(key, method, conditions, before_blocking)
            if content is not None:
                return content
            self._wait_for_writer(key, started)

    def _wait_for_writer(self, key: str, started: float) -> None:
        """Wait until the key's upload may have ended. It looks less often the longer it has waited."""
        with slots.waiting():
            while True:
                waited = time.monotonic() - started
                if waited > self._wait_timeout:
                    raise Overloaded("an upload of this file is running; try later", retry_after=5)
                time.sleep(min(MAX_POLL_INTERVAL, max(POLL_INTERVAL, waited / 10)))
                if self._cache.has_copy(key) or not self._cache.is_being_written(key):
                    return

    def _open_copy(self, key: str, before_blocking: Callable[[], None]) -> FileContent | None:
        entry = self._cache.lookup(key)
        while entry is not None:
            content = FileContent(entry.record.info, CacheStatus.HIT, entry.fd, entry.path)
            if not self._freshness.is_due(entry.record) or self._is_served(entry.record, content, before_blocking):
                return content
            content.close()
            checked, entry = entry.record, self._cache.lookup(key)
            if entry is not None and entry.record.generation == checked.generation:  # it could not be removed
                os.close(entry.fd)
                return None
        return None

    def _is_served(self, record: Record, content: FileContent, before_blocking: Callable[[], None]) -> bool:
        """Whether a copy that has to be revalidated is served. If not, it has been replaced or removed."""
        try:
            before_blocking()
            verdict = self._freshness.check(record)
        except BaseException:
            content.close()
            raise
        if verdict is Revalidation.UNKNOWN:
            content.status = CacheStatus.STALE
        return verdict in (Revalidation.UNKNOWN, Revalidation.FRESH)

    def _open_cold(
        self, key: str, method: str, conditions: RequestHeaders, before_blocking: Callable[[], None]
    ) -> Content | None:
        """Open an object that is not cached; None: the caller has to look into the cache again."""
        before_blocking()
        if self._cache.is_being_written(key):
            return None
        if not self._cache.doubt_of(key).is_over(time.time()):
            info = self._settler.settle(key)
            if self._cache.doubt_of(key).concerns(info.etag, time.time()):
                return self._remote(None, info)  # what another request has been told may be out of date by now
        if self._negative_cache.remembers(key):
            raise ObjectNotFound("no such file")
        question = self._negative_cache.question(key)
        try:
            return self._fetch(key, method, conditions)
        except AlreadyCached:
            return None
        except InsufficientStorage:  # a fill could not even begin
            self._events.uncached()
            return self._open_remote(key, None)
        except ObjectNotFound:
            self._negative_cache.remember(key, question)
            raise

    def _fetch(self, key: str, method: str, conditions: RequestHeaders) -> Content:
        if method == "GET" and conditions == UNCONDITIONAL:
            return self._open_fill(key)
        wanted = bounded_range(conditions) if method == "GET" else None
        if wanted is not None and wanted.length <= MAX_DIRECT_RANGE and self._fills.progress(key) is None:
            return self._open_range(key, wanted)
        return self._open_remote(key, self._fills)

    def _open_range(self, key: str, wanted: ByteRange) -> RemoteContent:
        """Open a small range: one request to the backend gets it together with the object's properties."""
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
        # A request that comes after a change on this server must not share an answer from before it.
        question = key, self._negative_cache.changes(key)
        info = self._questions.share(question, lambda: self._driver.stat(key))
        return self._remote(fills, info)

    def _remote(self, fills: Fills | None, info: ObjectInfo) -> RemoteContent:
        return RemoteContent(self._driver, fills, info, self._events, self._wait_timeout)

    def delete(self, key: str, may_delete: Callable[[ObjectInfo], bool] | None = None) -> None:
        """Delete the object and its copy.

        :param may_delete: called with the present version while the key is locked; None: always.
        :raises ObjectNotFound: there is no such object.
        :raises PreconditionFailed: the present version may not be deleted.
        :raises WriteConflict: an upload of the key took too long to wait for, or other machines replace the object
            all the time.
        :raises OutcomeUnknown: it may have been deleted, or still may be; the key is in doubt then.
        :raises BackendError: the deletion failed.
        """
        with self._events.waiting_for(self._cache.writing(key, self._wait_timeout)):
            slots.refuse_no_longer()  # a failure from here on has the key doubted
            try:
                self._delete(key, may_delete)
            except ObjectNotFound:
                self._forget(key)
                raise
            self._forget(key)

    def _delete(self, key: str, may_delete: Callable[[ObjectInfo], bool] | None) -> None:
        """Delete the version that is stored now. The first guess is that of the copy."""
        etag = self._cache.known_version(key) if may_delete is None else None
        for _ in range(DELETIONS):
            etag = etag or self._present_version(key, may_delete)
            try:
                with changing(self._cache, self._negative_cache, key, etag):
                    self._driver.delete(key, etag)
            except PreconditionFailed:
                etag = None
            except OutcomeUnknown as exc:
                if may_delete is None and not exc.lands_until and self._is_gone(key):
                    return
                raise
            else:
                return
        raise WriteConflict("other machines replace this file all the time; try later")

    def _present_version(self, key: str, may_delete: Callable[[ObjectInfo], bool] | None) -> str:
        present = self._driver.stat(key)
        if may_delete is not None and not may_delete(present):
            raise PreconditionFailed("the stored file is not the version that the request asks for")
        return present.etag

    def _is_gone(self, key: str) -> bool:
        try:
            self._driver.stat(key)
        except ObjectNotFound:
            return True
        return False

    def _forget(self, key: str) -> None:
        self._cache.remove(key)
        self._cache.revoke_fill(key)
        self._negative_cache.changed(key)
