# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns: how many fills of one process run at once, and how many requests may wait for theirs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from kci_storage.errors import Overloaded
from kci_storage.fills.fill import Fill

TURN_INTERVAL = 1.0  # seconds between two looks whether anybody still waits for a fill that may not begin yet


class Turns:
    """The turns of one process.

    :param at_once: how many fills may run.
    :param queue_size: how many requests may wait for fills that may not run yet; further ones are refused at once.
    """

    def __init__(self, at_once: int, queue_size: int):
        self._free = threading.BoundedSemaphore(at_once)
        self._queue_size = queue_size
        self._queued: set[Fill] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, fill: Fill) -> Iterator[None]:
        """One of the fills that may run at once, as soon as there is one.

        :raises Overloaded: too many requests wait, or none any more.
        """
        if not self._free.acquire(blocking=False):
            self._wait_for_turn(fill)
        try:
            yield
        finally:
            self._free.release()

    def check_join(self, fill: Fill) -> None:
        """Refuse one more request for a fill that may not run yet.

        :raises Overloaded: too many requests wait already.
        """
        with self._lock:
            if fill in self._queued and self._waiting() >= self._queue_size:
                raise _overloaded()

    def _wait_for_turn(self, fill: Fill) -> None:
        try:
            with self._lock:
                self._queued.add(fill)
                if self._waiting() > self._queue_size:
                    raise _overloaded()
            while not self._free.acquire(timeout=TURN_INTERVAL):
                if fill.followers == 0:
                    raise _overloaded()
        finally:
            with self._lock:
                self._queued.discard(fill)

    def _waiting(self) -> int:
        """How many requests wait. The caller holds the lock."""
        return sum(fill.followers for fill in self._queued)


def _overloaded() -> Overloaded:
    return Overloaded("too many files are being fetched; try later", retry_after=5)
