# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether cached copies are still what the backend has: asked once in a while, and never for long.

One thread asks for all that want to know about a copy, for a few seconds at most. While the backend is away, copies
are served as they are, at once, and one question every few seconds finds out when it is back.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from concurrent.futures import Future

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import Record
from kci_storage.drivers.base import Driver
from kci_storage.errors import ObjectNotFound, StorageError
from kci_storage.events import Events
from kci_storage.net import slots

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds for which a request waits for the backend when it could have a copy that is maybe old
QUIET = 5.0  # seconds after a failure for which the backend is not asked again
REMEMBERED = 100_000  # copies; then the memory of what was checked starts afresh


class Revalidation(enum.Enum):
    """What asking has shown; the value is the metric's label."""

    FRESH = "fresh"
    CHANGED = "changed"
    DELETED = "deleted"
    UNKNOWN = "failed"  # the backend is away


class Freshness:
    """What this process knows of its copies' freshness.

    :param period: seconds for which a check holds; 0: for ever.
    """

    def __init__(self, driver: Driver, cache: Cache, events: Events, period: float):
        self._driver = driver
        self._cache = cache
        self._events = events
        self._period = period
        self._good_until: dict[str, float] = {}  # by generation; seconds since the epoch
        self._running: dict[str, Future[Revalidation]] = {}  # by generation
        self._away = False  # whether the last answer was none
        self._quiet_until = 0.0  # on the monotonic clock, in seconds
        self._mutex = threading.Lock()

    def is_due(self, record: Record) -> bool:
        """Whether the copy has to be checked before it is served."""
        if not self._period and not record.doubtful:
            return False
        until = self._good_until.get(record.generation)
        if until is None:
            until = 0.0 if record.doubtful else record.validated + self._period
        return time.time() >= until

    def check(self, record: Record) -> Revalidation:
        """Ask the backend whether the copy is still right, or share the answer with who is asking.

        A copy that is not right is removed. It takes :data:`PATIENCE` at most.
        """
        with self._mutex:
            if not self.is_due(record):  # answered since the caller looked
                return Revalidation.FRESH
            question = self._running.get(record.generation) or self._ask(record)
        if question is None or self._away:
            return Revalidation.UNKNOWN
        try:
            with slots.waiting(bounded=False):
                return question.result(PATIENCE)
        except TimeoutError:
            self._away = True
            return Revalidation.UNKNOWN

    def _ask(self, record: Record) -> Future[Revalidation] | None:
        """The answer to come; None: the backend is to be left alone. The caller holds the mutex."""
        if time.monotonic() < self._quiet_until:
            return None
        if self._away:
            self._quiet_until = time.monotonic() + QUIET  # one question finds out whether it is back
        question: Future[Revalidation] = Future()
        threading.Thread(target=self._answer, args=(record, question), name="revalidate", daemon=True).start()
        self._running[record.generation] = question
        return question

    def _answer(self, record: Record, question: Future[Revalidation]) -> None:
        verdict = Revalidation.UNKNOWN
        try:
            verdict = self._compare(record)
        finally:
            self._events.revalidated(verdict.value)
            with self._mutex:
                self._away = verdict is Revalidation.UNKNOWN
                self._quiet_until = time.monotonic() + QUIET if self._away else 0.0
                del self._running[record.generation]
            question.set_result(verdict)

    def _compare(self, record: Record) -> Revalidation:
        asked = time.time()  # what the backend has said may be as old as the question
        try:
            current = self._driver.stat(record.info.key)
        except ObjectNotFound:
            self._cache.remove_version(record)
            return Revalidation.DELETED
        except StorageError:
            return Revalidation.UNKNOWN
        if current.etag != record.info.etag:
            self._cache.remove_version(record)
            return Revalidation.CHANGED
        self._cache.confirm(record)
        self._confirm(record, asked)
        return Revalidation.FRESH

    def _confirm(self, record: Record, asked: float) -> None:
        if len(self._good_until) >= REMEMBERED:
            self._good_until.clear()
        self._good_until[record.generation] = asked + (self._period or float("inf"))
