# SPDX-License-Identifier: LGPL-2.1-or-later
"""Housekeeping: eviction, which keeps the cache within its limits, and sweeps, which remove what crashes left.

One thread over all workers does it, elected by a lock; when its worker dies, a thread of another worker takes over.
It checks the limits periodically, which costs three system calls, and scans the directory only when one is crossed. A
fill that needs space asks for it at once (:meth:`Housekeeper.make_room`).

What a killed worker left is removed in two steps. Each worker that starts looks into the few small folders where
locks, spools and the driver's temporary files are. Parts and claims lie among the copies, where only a sweep finds
them: so the elected thread sweeps soon after any worker has ended. It learns that from a file that each worker has
locked for as long as it lives.

A scan runs in a process of its own (:mod:`kci_storage.files.jobs`), which shares the elected thread's lock. Only a
small cache is scanned in a thread of the fill's process, since starting a process would take longer than the scan.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import Usage
from kci_storage.cache.limits import STEP, Candidate, Evictor
from kci_storage.config.settings import CacheConfig
from kci_storage.errors import InsufficientStorage, WriteConflict
from kci_storage.events import Events
from kci_storage.files import durable
from kci_storage.files.jobs import Job, JobStopped

log = logging.getLogger(__name__)
PAUSE = 0.002  # seconds between two steps of an eviction for a fill, so that requests are not delayed
ELECTION_INTERVAL = 5  # seconds between two tries to become the elected thread
LOOK_INTERVAL = 2  # seconds between two looks of the elected thread whether a worker has ended
SWEEP_INTERVAL = 24 * 3600  # seconds
SWEEP_REST = 10  # times as long as a sweep took; no other one follows sooner, however often workers end
STOP_TIMEOUT = 5.0  # seconds that a process waits for its housekeeping to end
ROOM_TIMEOUT = 3  # seconds that a fill and its clients wait for space; then the cache is bypassed
SMALL = 1000  # files; scanning so many takes less time than starting a process
MAX_CANDIDATES = 10_000  # of one scan that are kept for the next fills; about 0.4 KiB each
ROOM_LOCK, LEADER_LOCK = "room.lock", "housekeeping.lock"
WORKERS = "workers"  # the folder of the files that the workers have locked while they live


# Long work, which would delay requests in a worker: these run as jobs


def sweep(directory: Path, sweep_driver: Callable[[], int] | None) -> Iterator[int]:
    """Remove what crashes have left in the cache and in the driver's store.

    :returns: how many files each step has removed.
    """
    yield from Cache(directory).sweeping()
    if sweep_driver is not None:
        yield sweep_driver()


def recover(limits: CacheConfig) -> Iterator[Usage]:
    """Evict until the cache is within its limits again.

    :returns: what each step has evicted.
    """
    evictor = Evictor(Cache(limits.directory), limits)
    choose = partial(evictor.least_recently_used, limits.cleanup_chunk_size)
    return evictor.evict_until_within(evictor.to_recover, [], choose)


def least_recently_used(limits: CacheConfig, count: int) -> Iterator[list[Candidate]]:
    """Find ``count`` candidates for eviction, and correct the cache's usage on the way.

    :returns: the candidates, the least recently used last, some in each step.
    """
    chosen = Evictor(Cache(limits.directory), limits).least_recently_used(count)
    for start in range(0, len(chosen), STEP):
        yield chosen[start : start + STEP]


class DriverUpkeep(NamedTuple):
    """How to remove what crashes left in the driver's store. Both functions return how many files were removed."""

    recover: Callable[[], int]  # what is found quickly
    sweep: Callable[[], int]  # everything; it runs in another process, so it must be picklable


class Housekeeper:
    """Evicts the least recently used copies when a limit is crossed, and sweeps.

    :param limits: the configuration's section ``[cache]``.
    :param driver: None: a crash leaves nothing in the driver's store.
    """

    def __init__(self, cache: Cache, limits: CacheConfig, events: Events, driver: DriverUpkeep | None):
        self._cache = cache
        self._limits = limits
        self._events = events
        self._driver = driver
        self._evictor = Evictor(cache, limits)
        self._stopped = threading.Event()
        self._jobs: set[Job] = set()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._oldest: list[Candidate] = []  # of the latest scan for a fill, the least recently used last
        self._workers = cache.directory / WORKERS
        self._presence: durable.NewFile | None = None
        self._next_sweep = 0.0  # on the monotonic clock
        self._rested = 0.0  # the same: when the last sweep is long enough ago for another one

    def start(self) -> None:
        """Remove what dead workers left, then start a thread for the housekeeping, unless another worker does it."""
        self._log_errors(self._show_presence)
        self._log_errors(partial(durable.remove_abandoned, self._cache.spool_directory))
        self._log_errors(self._cache.recover_locks)
        if self._driver is not None:
            self._log_errors(self._driver.recover)
        self._start("housekeeping", self._run)

    def _show_presence(self) -> None:
        with contextlib.suppress(InsufficientStorage):  # this worker's end will not be noticed
            self._presence = durable.NewFile.unnamed(self._workers)

    def _start(self, name: str, work: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.add(thread)
        return thread

    def stop(self) -> None:
        """End the running jobs and threads: cut off in between, they would leave a lock and a wrong usage.

        Returns when they have ended, after :data:`STOP_TIMEOUT` seconds at most.
        """
        self._stopped.set()
        deadline = time.monotonic() + STOP_TIMEOUT
        for job in list(self._jobs):
            job.stop()
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._presence is not None:
            self._presence.close()  # the file stays, since requests and fills may be cut off when the process ends

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._log_errors(self._lead)
            self._stopped.wait(ELECTION_INTERVAL)

    def _lead(self) -> None:
        """Do the housekeeping until the process stops, unless another worker does it."""
        path = self._cache.directory / LEADER_LOCK
        fd = durable.open_lock_file(path)
        self._next_sweep = time.monotonic()
        try:
            while durable.try_lock(fd) and durable.is_file_at(fd, path):
                if self._is_sweep_due():
                    self._log_errors(partial(self._sweep, fd))
                self._log_errors(partial(self.keep_limits, fd))
                if self._wait():
                    return
        finally:
            os.close(fd)

    def _is_sweep_due(self) -> bool:
        now = time.monotonic()
        return now >= self._next_sweep or (now >= self._rested and self._has_worker_ended())

    def _has_worker_ended(self) -> bool:
        return not all(map(durable.is_locked, durable.files_in(self._workers)))

    def _wait(self) -> bool:
        """Wait for the interval between two checks of the limits, or until a sweep is due; whether to stop."""
        deadline = time.monotonic() + self._limits.interval
        while (left := deadline - time.monotonic()) > 0 and not self._is_sweep_due():
            if self._stopped.wait(min(left, LOOK_INTERVAL)):
                break
        return self._stopped.is_set()

    @staticmethod
    def _log_errors(action: Callable[[], object]) -> None:
        try:
            action()
        except JobStopped:
            pass
        except Exception:  # such as a full disk or a missing folder: the next round may succeed
            log.exception("event=housekeeping_failed")

    def _job(self, work: Callable[..., Iterator[Any]], *arguments: Any, lock: int | None = None) -> Iterator[Any]:
        """Run a job; yields its reports.

        :param lock: a locked descriptor. The lock is held until the job has ended, even if this process dies before.
        """
        with Job(work, *arguments, inherited=() if lock is None else (lock,)) as job:
            self._jobs.add(job)
            try:
                if not self._stopped.is_set():
                    yield from job
            finally:
                self._jobs.discard(job)

    def _sweep(self, lock: int) -> None:
        started = time.monotonic()
        durable.remove_abandoned(self._workers)  # first: a worker that ends from now on is a reason for another sweep
        try:
            removed = sum(self._job(sweep, self._limits.directory, self._driver and self._driver.sweep, lock=lock))
        finally:
            seconds = time.monotonic() - started
            self._next_sweep = started + SWEEP_INTERVAL
            self._rested = time.monotonic() + SWEEP_REST * seconds
        files, size, _ = self._cache.usage.read()
        log.info("event=swept removed=%d files=%d bytes=%d seconds=%.3f", removed, files, size, seconds)

    def keep_limits(self, lock: int | None = None) -> None:
        """Evict if a limit is crossed.

        :param lock: as in :meth:`_job`.
        """
        if self._evictor.over():
            self._count(self._job(recover, self._limits, lock=lock))

    def _count(self, steps: Iterator[Usage], pause: float = 0) -> None:
        """Run an eviction: count and log what it removes.

        :param pause: seconds to wait after each step.
        """
        started, files, size = time.monotonic(), 0, 0
        try:
            for freed in steps:
                self._events.evicted(freed.files, freed.size)
                files, size = files + freed.files, size + freed.size
                if self._stopped.wait(pause):
                    break
        finally:
            if files:
                log.info("event=evicted files=%d bytes=%d seconds=%.3f", files, size, time.monotonic() - started)

    def make_room(self, size: int) -> bool:
        """Evict, if need be, so that an object of ``size`` bytes fits; whether it does.

        Nothing is evicted for an object that would not fit into the emptied cache. An eviction that takes longer than
        :data:`ROOM_TIMEOUT`, such as one that scans a large cache, goes on in the background for later fills.
        """
        missing = self._evictor.missing_for(size)
        if not missing:
            return True
        if self._stopped.is_set():
            return False
        used = Usage(*self._cache.usage.read())
        if missing.size > used.size or missing.files > used.files:
            return False
        self._start("room", partial(self._log_errors, partial(self._make_room, size))).join(ROOM_TIMEOUT)
        return not self._evictor.missing_for(size)

    def _make_room(self, size: int) -> None:
        with (
            # A disk without space for the lock's file is treated like a cache without space.
            contextlib.suppress(WriteConflict, InsufficientStorage),
            # One eviction at a time frees space for all fills of all workers.
            self._cache.locks.hold(ROOM_LOCK, ROOM_TIMEOUT),
        ):
            shortfall = partial(self._evictor.missing_for, size)
            self._count(self._evictor.evict_until_within(shortfall, self._oldest, self._choose), PAUSE)

    def _choose(self) -> list[Candidate]:
        # A full cache needs space for each new object; a scan for each of them would cost too much.
        count = min(self._limits.cleanup_chunk_size, MAX_CANDIDATES)
        if self._cache.usage.read()[0] <= SMALL:
            return self._evictor.least_recently_used(count)
        return [candidate for some in self._job(least_recently_used, self._limits, count) for candidate in some]
