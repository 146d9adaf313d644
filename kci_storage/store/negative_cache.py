# SPDX-License-Identifier: LGPL-2.1-or-later
"""The negative cache: keys that the backend did not have a moment ago.

CI jobs poll for files that are not built yet, and crawlers ask for files that never existed. Each process asks the
backend about one such key only every :data:`LIFETIME` seconds. An upload or deletion through any worker of this
server invalidates the key's entry at once, in every worker: it increments a counter in a file that all of them read.
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


class MissingKey(NamedTuple):
    """A key that the backend did not have."""

    until: float  # on the monotonic clock, in seconds
    changes: int  # the key's counter before the backend was asked


class NegativeCache:
    """The missing keys that one process remembers.

    :param path: the file of the counters, shared by all processes.
    :param clock: a monotonic clock, in seconds.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._changes = SharedCounters(path, STRIPES)
        self._clock = clock
        self._entries: dict[str, MissingKey] = {}

    def changes(self, key: str) -> int:
        """A number that grows whenever the key is uploaded or deleted; to be read before the backend is asked."""
        with contextlib.suppress(InsufficientStorage):  # no room for the file: then no process can count either
            return self._changes.read()[_stripe(key)]
        return 0

    def remember(self, key: str, changes: int) -> None:
        """Record that the backend has no such object.

        :param changes: what :meth:`changes` returned before the backend was asked.
        """
        if len(self._entries) >= MAX_ENTRIES:
            self._entries.clear()
        self._entries[key] = MissingKey(self._clock() + LIFETIME, changes)

    def remembers(self, key: str) -> bool:
        """Whether the key was missing less than :data:`LIFETIME` seconds ago, and has not changed since."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        if self._clock() < entry.until and self.changes(key) == entry.changes:
            return True
        self._entries.pop(key, None)
        return False

    def changed(self, key: str) -> None:
        """The key has been uploaded or deleted: invalidate its entry in every process."""
        increments = [0] * STRIPES
        increments[_stripe(key)] = 1
        with contextlib.suppress(InsufficientStorage):  # then old entries expire after LIFETIME
            self._changes.add(*increments)


def _stripe(key: str) -> int:
    return zlib.crc32(key.encode()) % STRIPES
