# SPDX-License-Identifier: LGPL-2.1-or-later
"""A short memory of keys that are not there.

CI jobs poll for files that are not built yet, and crawlers ask for what never was. Each process asks the backend for
one such key only every :data:`LIFETIME` seconds. An upload or deletion through any worker of this server ends the
memory of its key at once: it moves a counter in a file that all of them see.
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
STRIPES = 64  # counters; a change also ends the memory of the few other keys that share its own
REMEMBERED = 10_000  # keys; then the memory starts afresh


class Miss(NamedTuple):
    """That a key was not there."""

    until: float  # on the monotonic clock, in seconds
    changes: int  # what its counter was before the backend was asked


class NegativeCache:
    """The missing keys that one process remembers.

    :param path: the file of the counters, one for all processes.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._changes = SharedCounters(path, STRIPES)
        self._clock = clock
        self._misses: dict[str, Miss] = {}

    def changes(self, key: str) -> int:
        """A number that moves whenever the key is uploaded or deleted; to be read before the backend is asked."""
        with contextlib.suppress(InsufficientStorage):  # no room for the counters: then nobody moves them
            return self._changes.read()[_stripe(key)]
        return 0

    def remember(self, key: str, changes: int) -> None:
        """The backend said that there is no such object.

        :param changes: what :meth:`changes` said before it was asked.
        """
        if len(self._misses) >= REMEMBERED:
            self._misses.clear()
        self._misses[key] = Miss(self._clock() + LIFETIME, changes)

    def remembers(self, key: str) -> bool:
        """Whether the key was not there a moment ago, and has not changed since."""
        miss = self._misses.get(key)
        if miss is None:
            return False
        if self._clock() < miss.until and self.changes(key) == miss.changes:
            return True
        self._misses.pop(key, None)
        return False

    def changed(self, key: str) -> None:
        """The key has been uploaded or deleted: what any process knew of it is old."""
        moved = [0] * STRIPES
        moved[_stripe(key)] = 1
        with contextlib.suppress(InsufficientStorage):  # what is old is then forgotten after LIFETIME
            self._changes.add(*moved)


def _stripe(key: str) -> int:
    return zlib.crc32(key.encode()) % STRIPES
