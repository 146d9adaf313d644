# SPDX-License-Identifier: LGPL-2.1-or-later
"""What threads leave for one that waits for sockets, and how they wake it."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items for a thread that waits in a selector, for which there is a descriptor (:meth:`fileno`).

    It is never closed: threads whose requests were given up may yet write, and would write into whatever file has got
    the pipe's number by then.
    """

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Can be read when there is something, or when somebody has called :meth:`wake`."""
        return self._reader

    def put(self, item: T) -> None:
        """Leave an item. Any thread may call this."""
        self._items.put(item)
        self.wake()

    def wake(self) -> None:
        """Wake the waiting thread. Any thread may call this."""
        with contextlib.suppress(BlockingIOError):  # it has been woken often enough
            os.write(self.writer, b"x")

    def take(self) -> Iterator[T]:
        """What there is."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._items.get_nowait()
