# SPDX-License-Identifier: LGPL-2.1-or-later
"""The threads that answer requests, and the memory that they leave behind."""

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

MOMENT = 0.02  # seconds that a wait has lasted before its slot is released; most waits are over by then
SLOW_PER_THREAD = 4  # threads that wait for slow clients, for each of those that work: beyond, the slowest have to go


LARGE_TRANSFER = 16 * 1024 * 1024  # bytes; what is smaller leaves little memory behind

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep less


class Threads:
    """Threads that work, so many at a time, and beside them those that wait for slow clients, or for other requests.

    A thread that waits for its client does nothing else, and needs no processor: it gives its slot to another one,
    and takes it back when the client has moved. So clients that are slow by intent or by their link hold up nobody
    else. There may be as many as connections: with a limit of their own, a worker that has reached it would hold the
    requests that it has accepted, while another one has threads to spare.

    A thread that waits for the backend or another request (:func:`.slots.waiting`) keeps its slot for a moment, since
    most such waits are over by then. Then the slot is free for a request that needs one. The number of such waits is
    limited where they can be refused, since nobody drops their clients.

    :param size: how many work at a time: the slots.
    :param changed: called by any thread when a slot has become free, or is no longer.
    """

    def __init__(self, size: int, changed: Callable[[], None]):
        self.size = size
        self._released = 0  # slots of threads that wait
        self._changed = changed
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._spare = 0  # idle threads; below zero: calls that wait for one
        self._waiting: set[Any] = set()  # the clients for whom threads wait
        self._begun: dict[object, float] = {}  # other waits that still have a slot: when each began, in order
        self._bounded = 0  # threads that wait, and could have been refused that

    def submit(self, function: Callable[[], None]) -> None:
        """Have a function called by a thread, as soon as one is free."""
        self._queue.put(function)
        with self._lock:
            self._spare -= 1
            self._fill()

    @contextlib.contextmanager
    def released_for(self, client: Any) -> Iterator[None]:
        """The calling thread does nothing but wait for a client during the block."""
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
        """The calling thread does nothing but wait for the backend, or for others, during the block.

        :param bounded: whether it can be refused that.
        :raises Overloaded: too many do of those that can.
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
        """Those of threads that wait, now. To be asked for when a slot is needed: so they are released in time."""
        with self._lock:
            if self._release_due():
                self._fill()
            return self._released

    def _release_due(self) -> bool:
        """Release the slots of waits that have lasted for a moment; whether there were some."""
        due = time.monotonic() - MOMENT
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
        """Whether no more than half of the threads are at work, or wait for work that is sure to come."""
        return 2 * (self._threads - self._spare - self._released) <= self.size

    @property
    def is_crowded(self) -> bool:
        """Whether more threads wait for slow clients than are worth their memory, or there can be no more threads."""
        return len(self._waiting) > SLOW_PER_THREAD * self.size or self._spare < 0

    def waited_for(self) -> list[Any]:
        """The clients for whom threads wait."""
        with self._lock:
            return list(self._waiting)

    def _fill(self) -> None:
        """Start a thread if one is wanted and there is a slot for it."""
        if self._spare < 0 and self._threads - self._released < self.size:
            try:
                threading.Thread(target=self._run, name="request", daemon=True).start()
            except RuntimeError:  # the system has none to give; those that are there go on
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
            except BaseException:  # the thread is for all calls
                log.exception("event=call_failed")
            with self._lock:
                if self._threads - self._released > self.size:  # it came for one that waited, and that is back
                    self._threads -= 1
                    return
                self._spare += 1


def give_back_memory(transferred: int) -> None:
    """After a transfer of so many bytes: return to the system what it has left (malloc_trim(3)).

    Pieces of large transfers pass through many threads, and glibc keeps for each thread what it has freed. So a
    worker would stay as large as its busiest moment was.
    """
    if _trim is not None and transferred >= LARGE_TRANSFER:
        _trim(0)
