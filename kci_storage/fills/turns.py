# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns: how many fills of one process run at a time, and how many requests may wait for the others."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from kci_storage.errors import Overloaded
from kci_storage.fills.fill import Fill

TURN_INTERVAL = 1.0  # seconds between two checks whether a request still waits for a fill that has not begun


class Turns:
    """The turns of one process's fills.

    :param at_once: how many fills may run at a time.
    :param queue_size: how many requests may wait for fills that have not begun; further ones are refused at once.
    """

    def __init__(self, at_once: int, queue_size: int):
        self._free = threading.BoundedSemaphore(at_once)
        self._queue_size = queue_size
        self._queued: set[Fill] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, fill: Fill) -> Iterator[None]:
        """Wait until the fill may run; it may do so during the block.

        :raises Overloaded: too many requests wait, or none does any more.
        """
        if not self._free.acquire(blocking=False):
            self._wait_for_turn(fill)
        try:
            yield
        finally:
            self._free.release()

    def check_join(self, fill: Fill) -> None:
        """Check whether one more request may join the fill.

        :raises Overloaded: the fill has not begun, and too many requests wait already.
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
