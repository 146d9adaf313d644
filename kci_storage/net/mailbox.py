# SPDX-License-Identifier: LGPL-2.1-or-later
"""A queue for a thread that waits in a selector: other threads put items, and wake it."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items for a thread that waits in a selector, where it registers the mailbox's descriptor (:meth:`fileno`).

    A mailbox is never closed: threads of abandoned requests may still write to its pipe, and would then write to
    another file that has got the same descriptor.
    """

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """A descriptor that is readable when there are items, or after a call of :meth:`wake`."""
        return self._reader

    def put(self, item: T) -> None:
        """Add an item, and wake the waiting thread. Any thread may call this."""
        self._items.put(item)
        self.wake()

    def wake(self) -> None:
        """Wake the waiting thread. Any thread may call this."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so the thread will wake anyway
            os.write(self.writer, b"x")

    def take(self) -> Iterator[T]:
        """Remove and yield all items."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._items.get_nowait()
