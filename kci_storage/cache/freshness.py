# SPDX-License-Identifier: LGPL-2.1-or-later
"""Revalidation: whether a cached copy is still the version that the backend has.

A copy is checked when it is due and requested. All requests for one copy share one check, and wait a few seconds at
most. While the backend is down, stale copies are served without waiting, and one check every few seconds finds out
when it is back.

A doubtful copy is due at each request, and requests do not share its checks: an answer to a question from before a
request may be older than what another reader has seen meanwhile.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from concurrent.futures import Future

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import Record
from kci_storage.cache.settling import Settler
from kci_storage.drivers.base import Driver
from kci_storage.errors import ObjectNotFound, StorageError
from kci_storage.events import Events
from kci_storage.net import slots

log = logging.getLogger(__name__)

MAX_WAIT = 5.0  # seconds that a request waits for a check before it gets the copy unchecked
RETRY_INTERVAL = 5.0  # seconds after a failed check before the backend is asked again
MAX_REMEMBERED = 100_000  # checked copies that are remembered; a full memory is emptied


class Revalidation(enum.Enum):
    """The outcome of a check; the value is the metric's label."""

    FRESH = "fresh"
    CHANGED = "changed"
    DELETED = "deleted"
    UNKNOWN = "failed"  # the backend did not answer


class Freshness:
    """The checks of one process.

    :param period: seconds for which a check is valid; 0: for ever.
    """

    def __init__(self, driver: Driver, cache: Cache, settler: Settler, events: Events, period: float):
        self._driver = driver
        self._cache = cache
        self._settler = settler
        self._events = events
        self._period = period
        self._fresh_until: dict[str, float] = {}  # by generation; seconds since the epoch
        self._running: dict[str, Future[Revalidation]] = {}  # by generation
        self._is_down = False  # whether the backend left the last check without an answer
        self._retry_at = 0.0  # on the monotonic clock, in seconds
        self._mutex = threading.Lock()

    def is_due(self, record: Record) -> bool:
        """Whether the copy has to be revalidated before it is served."""
        if record.doubtful or not self._period:
            return record.doubtful
        until = self._fresh_until.get(record.generation, record.validated + self._period)
        return time.time() >= until

    def check(self, record: Record) -> Revalidation:
        """Ask the backend whether it still has the copy's version. Threads that do so at the same time share a check.

        A copy of another version is removed. A doubtful one may get a new record, so the caller looks it up again.
        This takes :data:`MAX_WAIT` seconds at most.
        """
        with self._mutex:
            if not self.is_due(record):  # answered since the caller looked
                return Revalidation.FRESH
            question = self._running.get(record.generation) or self._ask(record)
        if question is None or self._is_down:
            return Revalidation.UNKNOWN
        try:
            with slots.waiting(bounded=False):
                return question.result(MAX_WAIT)
        except TimeoutError:
            self._is_down = True
            return Revalidation.UNKNOWN

    def _ask(self, record: Record) -> Future[Revalidation] | None:
        """Start a check; None: the backend failed moments ago. The caller holds the mutex."""
        if time.monotonic() < self._retry_at:
            return None
        if self._is_down:
            self._retry_at = time.monotonic() + RETRY_INTERVAL  # this check alone finds out whether it is back
        question: Future[Revalidation] = Future()
        threading.Thread(target=self._answer, args=(record, question), name="revalidate", daemon=True).start()
        if not record.doubtful:
            self._running[record.generation] = question
        return question

    def _answer(self, record: Record, question: Future[Revalidation]) -> None:
        verdict = Revalidation.UNKNOWN
        try:
            verdict = self._compare(record)
        finally:
            self._events.revalidated(verdict.value)
            with self._mutex:
                self._is_down = verdict is Revalidation.UNKNOWN
                self._retry_at = time.monotonic() + RETRY_INTERVAL if self._is_down else 0.0
                self._running.pop(record.generation, None)
            question.set_result(verdict)

    def _compare(self, record: Record) -> Revalidation:
        asked = time.time()  # the answer may be as old as the question
        key = record.info.key
        try:
            current = self._settler.settle(key) if record.doubtful else self._driver.stat(key)
        except ObjectNotFound:
            self._cache.remove_version(record)
            return Revalidation.DELETED
        except StorageError:
            return Revalidation.UNKNOWN
        if current.etag != record.info.etag:
            self._cache.remove_version(record)
            return Revalidation.CHANGED
        if not record.doubtful:
            self._confirm(record, asked)
        return Revalidation.FRESH

    def _confirm(self, record: Record, asked: float) -> None:
        if len(self._fresh_until) >= MAX_REMEMBERED:
            self._fresh_until.clear()
        self._fresh_until[record.generation] = asked + self._period
