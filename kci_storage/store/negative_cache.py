# SPDX-License-Identifier: LGPL-2.1-or-later
"""The negative cache: keys that the backend did not have a moment ago.

CI jobs poll for files that are not built yet, and crawlers ask for files that never existed. Each process asks the
backend about one such key only every :data:`LIFETIME` seconds, or as often as copies are revalidated. An upload or
deletion through any worker of this server invalidates the key's entry at once, in every worker: it increments a
counter in a file that all of them read.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kci_storage.errors import InsufficientStorage
from kci_storage.files.counters import SharedCounters

LIFETIME = 2.0  # seconds; also how long an upload through another machine may go unnoticed
STRIPES = 64  # counters; a change also invalidates the few other keys that share its counter
MAX_ENTRIES = 10_000  # keys; a full cache is emptied


class Question(NamedTuple):
    """A question to the backend about a key."""

    asked: float  # on the monotonic clock, in seconds
    changes: int  # the key's counter then


class MissingKey(NamedTuple):
    """A key that the backend did not have."""

    until: float  # on the monotonic clock, in seconds
    changes: int  # the key's counter before the backend was asked


class NegativeCache:
    """The missing keys that one process remembers.

    :param path: the file of the counters, shared by all processes.
    :param revalidate_after: seconds after which copies are revalidated; 0: never.
    :param clock: a monotonic clock, in seconds.
    """

    def __init__(self, path: Path, revalidate_after: float = 0, clock: Callable[[], float] = time.monotonic):
        self._changes = SharedCounters(path, STRIPES)
        self._lifetime = min(LIFETIME, revalidate_after or LIFETIME)  # seconds
        self._clock = clock
        self._entries: dict[str, MissingKey] = {}

    def changes(self, key: str) -> int:
        """A number that grows whenever the key is uploaded or deleted, or may have been."""
        with contextlib.suppress(InsufficientStorage):  # no room for the file: then no process can count either
            return self._changes.read()[_stripe(key)]
        return 0

    def question(self, key: str) -> Question:
        """To be called before the backend is asked about a key."""
        return Question(self._clock(), self.changes(key))

    def remember(self, key: str, question: Question) -> None:
        """Record that the backend has no such object.

        :param question: what :meth:`question` returned before the backend was asked.
        """
        if len(self._entries) >= MAX_ENTRIES:
            self._entries.clear()
        self._entries[key] = MissingKey(question.asked + self._lifetime, question.changes)

    def remembers(self, key: str) -> bool:
        """Whether the key was missing a moment ago, and has not changed since."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        if self._clock() < entry.until and self.changes(key) == entry.changes:
            return True
        self._entries.pop(key, None)
        return False

    def changed(self, key: str) -> None:
        """The key has been uploaded or deleted, or may have been: invalidate its entry in every process."""
        increments = [0] * STRIPES
        increments[_stripe(key)] = 1
        with contextlib.suppress(InsufficientStorage):  # then old entries expire after LIFETIME
            self._changes.add(*increments)


def _stripe(key: str) -> int:
    return zlib.crc32(key.encode()) % STRIPES
