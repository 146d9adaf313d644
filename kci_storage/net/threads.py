# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pool of threads that answer requests, and the return of memory that they have freed."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from kci_storage.errors import Overloaded
from kci_storage.net import slots

log = logging.getLogger(__name__)

RELEASE_SECONDS = 0.02  # after which a wait's slot is released; most waits end before
SLOW_PER_SLOT = 4  # threads per slot that may wait for slow clients; beyond, the slowest clients are shed
LARGE_TRANSFER = 16 * 1024 * 1024  # bytes; smaller ones leave little freed memory

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other allocators keep less


class Threads:
    """A pool of threads. The number of working threads is limited by slots; threads that wait release theirs.

    A thread that waits for a slow client uses no processor: it releases its slot to another thread until the client
    makes progress. So slow clients, whether by intent or by their link, do not delay others. The number of such
    threads is limited only by that of the connections: with a limit of their own, a worker at that limit would hold
    up requests that it has accepted, while another worker has free threads.

    A thread that waits for the backend or another request (:func:`.slots.waiting`) keeps its slot for
    :data:`RELEASE_SECONDS`, since most such waits end before. Then a request that needs a slot can have it. The
    number of waits that may be refused is limited, since their clients cannot be shed.

    :param size: how many threads may work at a time: the number of slots.
    :param changed: called by any thread when the number of released slots has changed.
    """

    def __init__(self, size: int, changed: Callable[[], None]):
        self.size = size
        self._released = 0  # slots of threads that wait
        self._changed = changed
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._spare = 0  # idle threads; below zero: calls that wait for a thread
        self._waiting: set[Any] = set()  # the clients that threads wait for
        self._begun: dict[object, float] = {}  # other waits that still have a slot: when each began, in order
        self._bounded = 0  # running waits that count against slots.MAX_WAITING

    def submit(self, function: Callable[[], None]) -> None:
        """Call a function in a thread of the pool, as soon as one is free."""
        self._queue.put(function)
        with self._lock:
            self._spare -= 1
            self._fill()

    @contextlib.contextmanager
    def released_for(self, client: Any) -> Iterator[None]:
        """Release the calling thread's slot during the block, in which it only waits for a client."""
        with self._lock:
            self._waiting.add(client)
        try:
            with self._slot_released():
                yield
        finally:
            with self._lock:
                self._waiting.discard(client)

    @contextlib.contextmanager
    def waiting(self, bounded: bool) -> Iterator[None]:
        """Make the calling thread's slot available during the block, in which it only waits for other than a client.

        :param bounded: whether this wait counts against :data:`.slots.MAX_WAITING`.
        :raises Overloaded: that number is reached.
        """
        wait = object()
        with self._lock:
            if bounded and self._bounded >= slots.MAX_WAITING:
                raise Overloaded("too many requests wait for others to end; try later", retry_after=5)
            self._bounded += bounded
            self._begun[wait] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._bounded -= bounded
                if self._begun.pop(wait, None) is None:
                    self._released -= 1

    @property
    def released_slots(self) -> int:
        """The number of released slots. Before it is read, the slots of long waits are released."""
        with self._lock:
            if self._release_due():
                self._fill()
            return self._released

    def _release_due(self) -> bool:
        """Release the slots of waits that have lasted for :data:`RELEASE_SECONDS`; whether there were some."""
        due = time.monotonic() - RELEASE_SECONDS
        before = self._released
        while (oldest := next(iter(self._begun), None)) is not None and self._begun[oldest] <= due:
            del self._begun[oldest]
            self._released += 1
        return self._released > before

    @contextlib.contextmanager
    def _slot_released(self) -> Iterator[None]:
        with self._lock:
            self._released += 1
            self._fill()
        self._changed()
        try:
            yield
        finally:
            with self._lock:
                self._released -= 1

    @property
    def has_plenty(self) -> bool:
        """Whether at most half of the slots are in use."""
        return 2 * (self._threads - self._spare - self._released) <= self.size

    @property
    def is_crowded(self) -> bool:
        """Whether too many threads wait for slow clients, or the system has no thread for a free slot."""
        has_no_thread_for_a_slot = self._spare < 0 and self._threads - self._released < self.size
        return len(self._waiting) > SLOW_PER_SLOT * self.size or has_no_thread_for_a_slot

    def waited_for(self) -> list[Any]:
        """The clients that threads wait for."""
        with self._lock:
            return list(self._waiting)

    def _fill(self) -> None:
        """Start a thread if a call waits for one and a slot is free."""
        if self._spare < 0 and self._threads - self._released < self.size:
            try:
                threading.Thread(target=self._run, name="request", daemon=True).start()
            except RuntimeError:  # the system's limit is reached; the existing threads go on
                log.warning("event=no_thread threads=%d", self._threads)
                return
            self._threads += 1
            self._spare += 1

    def _run(self) -> None:
        slots.occupy(self)
        while True:
            call = self._queue.get()
            try:
                call()
            except BaseException:  # no call may end the thread
                log.exception("event=call_failed")
            with self._lock:
                if self._threads - self._released > self.size:  # it was started for a released slot, now in use again
                    self._threads -= 1
                    return
                self._spare += 1


def trim_memory(transferred: int) -> None:
    """Return freed memory to the system after a large transfer (malloc_trim(3)).

    The pieces of large transfers are freed by many threads, and glibc keeps freed memory per thread. Without this, a
    worker would stay as large as at its peak.

    :param transferred: bytes.
    """
    if _trim is not None and transferred >= LARGE_TRANSFER:
        _trim(0)
