"""Keeping the cache within its limits, without anybody noticing.

One thread over all workers sees to it, elected by a lock; when its worker dies, another worker's takes over. It looks
at the limits now and then, which costs three system calls, and has the directory walked only when one is crossed. A
fill that needs room asks for it at once (:meth:`Housekeeper.make_room`).

A walk is a process of its own (:mod:`kci_storage.files.jobs`), which shares the elected thread's lock. Only a small
cache is walked in the thread of the fill that asks, since starting a process would take longer than the walk.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kci_storage.cache.directory import Cache, Usage, last_use
from kci_storage.config.settings import CacheConfig
from kci_storage.errors import InsufficientStorage, WriteConflict
from kci_storage.files import durable
from kci_storage.files.jobs import Job, JobStopped

if TYPE_CHECKING:
    from kci_storage.monitoring.metrics import Metrics

log = logging.getLogger(__name__)

YOUNGEST = 60  # seconds; what was written or used since is not evicted
STEP = 20  # candidates that are evicted, or handed over, in one go
PAUSE = 0.002  # seconds: a fill's own evicting gives way to requests after each step
ELECTION_INTERVAL = 5  # seconds between two tries to become the one who does it
SWEEP_INTERVAL = 24 * 3600  # seconds; a sweep also finds what workers left that died while the server ran
STOP_SECONDS = 5.0  # for which a process waits for its housekeeping to end
ROOM_TIMEOUT = 3  # seconds that a fill waits for room, and so do its clients; then it does without the cache
SMALL = 1000  # files that are looked at in less time than a process needs to start
REMEMBERED = 10_000  # candidates of one walk that are kept for the next fills; about 0.4 KiB each
INODES = 2  # of one copy: its record and its content
ROOM_LOCK, LEADER_LOCK = "room.lock", "housekeeping.lock"


class Candidate(NamedTuple):
    """A copy that may be evicted; they sort by their last use."""

    used: float  # seconds since the epoch
    content: str  # the path of its content
    size: int  # bytes


class Shortfall(NamedTuple):
    """How much has to go; nothing where a number is not positive."""

    files: int
    size: int  # bytes

    def __bool__(self) -> bool:
        return self.files > 0 or self.size > 0


# What takes its time; in a worker it would be felt, so these are jobs


def sweep(directory: Path, sweep_driver: Callable[[], int] | None) -> Iterator[int]:
    """Remove what crashes have left in the cache and in the driver's store; how many files each step has removed."""
    yield from Cache(directory).sweeping()
    if sweep_driver is not None:
        yield sweep_driver()


def recover(limits: CacheConfig) -> Iterator[Usage]:
    """Evict until the limits are met; what each step has evicted."""
    evictor = Evictor(Cache(limits.directory), limits)
    choose = partial(evictor.least_recently_used, limits.cleanup_chunk_size)
    return evictor.evict_until_within(evictor.to_recover, [], choose)


def least_recently_used(limits: CacheConfig, count: int) -> Iterator[list[Candidate]]:
    """So many candidates, the least recently used last, some in each step. The usage is corrected on the way."""
    chosen = Evictor(Cache(limits.directory), limits).least_recently_used(count)
    for start in range(0, len(chosen), STEP):
        yield chosen[start : start + STEP]


class Evictor:
    """What has to go, and what may.

    :param limits: the ``[cache]`` section.
    """

    def __init__(self, cache: Cache, limits: CacheConfig):
        self._cache = cache
        self._limits = limits

    # What the limits ask for

    def over(self) -> bool:
        """Whether a limit is crossed."""
        return bool(self._beyond(Usage(0, 0), self._disk_missing(self._limits.low_disk_percent)))

    def to_recover(self) -> Shortfall:
        """What has to go once one was crossed."""
        return self._beyond(Usage(0, 0), self._disk_missing(self._limits.recover_disk_percent))

    def missing_for(self, size: int) -> Shortfall:
        """What has to go so that a file of ``size`` bytes can come."""
        disk = os.statvfs(self._cache.directory)
        return self._beyond(Usage(1, size), Shortfall(0, size - disk.f_bavail * disk.f_frsize))

    def _beyond(self, more: Usage, on_disk: Shortfall) -> Shortfall:
        """What has to go so that ``more`` can come.

        :param on_disk: what has to go for the disk's sake.
        """
        files, size, _ = self._cache.usage.read()
        too_many_files = files + more.files - self._limits.max_files
        too_many_bytes = size + more.size - self._limits.max_bytes if self._limits.max_bytes else 0
        return Shortfall(max(too_many_files, on_disk.files), max(too_many_bytes, on_disk.size))

    def _disk_missing(self, percent: float) -> Shortfall:
        """What has to go so that ``percent`` of the disk are free, of its bytes and of its inodes."""
        disk = os.statvfs(self._cache.directory)
        inodes = int(disk.f_files * percent / 100) - disk.f_favail
        blocks = int(disk.f_blocks * percent / 100) - disk.f_bavail
        return Shortfall(-(-inodes // INODES), blocks * disk.f_frsize)

    # Evicting

    def evict_until_within(
        self,
        shortfall: Callable[[], Shortfall],
        candidates: list[Candidate],
        choose: Callable[[], list[Candidate]],
    ) -> Iterator[Usage]:
        """Evict the least recently used until ``shortfall()`` is none, or nothing more may go.

        :param candidates: those to begin with, the least recently used last; what is not evicted of them or of the
            last walk is left there.
        :param choose: walks for more of them when there are none.
        :returns: what each step has evicted.
        """
        while missing := shortfall():
            walk = not candidates
            if walk:
                candidates += choose()
                missing = shortfall()  # the walk has corrected the usage
            freed = yield from self._evict(missing, candidates)
            if walk and not freed.files:
                break

    def _evict(self, missing: Shortfall, candidates: list[Candidate]) -> Generator[Usage, None, Usage]:
        """Evict as much as is missing, from the end of the list; what went."""
        total = Usage(0, 0)
        while candidates and missing:
            freed = self._evict_some(missing, candidates)
            total = Usage(total.files + freed.files, total.size + freed.size)
            missing = Shortfall(missing.files - freed.files, missing.size - freed.size)
            yield freed
        return total

    def _evict_some(self, missing: Shortfall, candidates: list[Candidate]) -> Usage:
        """Evict of the last few candidates as many as must go; what went."""
        files = size = 0
        for _ in range(min(STEP, len(candidates))):
            if files >= missing.files and size >= missing.size:
                break
            candidate = candidates.pop()
            if self._cache.evict(Path(candidate.content), candidate.used):
                files, size = files + 1, size + candidate.size
        return Usage(files, size)

    def least_recently_used(self, count: int) -> list[Candidate]:
        """So many of them, the least recently used last. The cache's usage is corrected on the way."""
        before = Usage(*self._cache.usage.read())
        seen = Usage(0, 0)
        oldest_allowed = time.time() - YOUNGEST

        def candidates() -> Iterator[Candidate]:
            nonlocal seen
            for file, status in self._cache.contents():
                seen = Usage(seen.files + 1, seen.size + status.st_size)
                if last_use(status) < oldest_allowed:
                    yield Candidate(last_use(status), file.path, status.st_size)

        chosen = heapq.nsmallest(count, candidates())
        self._cache.correct_usage(before, seen)
        return chosen[::-1]


class Housekeeper:
    """Has what was not used for longest evicted when a limit is crossed.

    :param limits: the ``[cache]`` section.
    :param sweep_driver: sweeps the driver's store in another process, so it can be pickled; how many files it has
        removed. None: a crash leaves nothing there.
    """

    def __init__(self, cache: Cache, limits: CacheConfig, metrics: Metrics, sweep_driver: Callable[[], int] | None):
        self._cache = cache
        self._limits = limits
        self._metrics = metrics
        self._sweep_driver = sweep_driver
        self._evictor = Evictor(cache, limits)
        self._stopped = threading.Event()
        self._jobs: set[Job] = set()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._oldest: list[Candidate] = []  # of the latest walk for a fill, the least recently used last

    def start(self) -> None:
        """See to what a worker has left that died, then keep house in a thread whenever no other worker does."""
        self._log_errors(self._cache.recover_locks)
        self._start("housekeeping", self._run)

    def _start(self, name: str, work: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.add(thread)
        return thread

    def stop(self) -> None:
        """End what is under way, before the process ends in the midst of it: a lock would be left, and a wrong count.

        Back when it has ended, :data:`STOP_SECONDS` later at most.
        """
        self._stopped.set()
        deadline = time.monotonic() + STOP_SECONDS
        for job in list(self._jobs):
            job.stop()
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._log_errors(self._lead)
            self._stopped.wait(ELECTION_INTERVAL)

    def _lead(self) -> None:
        """Keep house until the end, unless somebody else does."""
        path = self._cache.directory / LEADER_LOCK
        fd = durable.open_lock_file(path)
        try:
            swept = float("-inf")
            while durable.try_lock(fd) and durable.is_file_at(fd, path):
                if time.monotonic() - swept > SWEEP_INTERVAL:
                    swept = time.monotonic()
                    self._log_errors(partial(self._sweep, fd))
                self._log_errors(partial(self.keep_limits, fd))
                if self._stopped.wait(self._limits.interval):
                    return
        finally:
            os.close(fd)

    @staticmethod
    def _log_errors(action: Callable[[], object]) -> None:
        try:
            action()
        except JobStopped:
            pass
        except Exception:  # a full disk, a folder that somebody took away: the next round may do better
            log.exception("event=housekeeping_failed")

    def _job(self, work: Callable[..., Iterator[Any]], *arguments: Any, lock: int | None = None) -> Iterator[Any]:
        """What a job reports, step by step.

        :param lock: a locked descriptor; the lock is held until the job has ended, should this process die before.
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
        removed = sum(self._job(sweep, self._limits.directory, self._sweep_driver, lock=lock))
        files, size, _ = self._cache.usage.read()
        log.info(
            "event=swept removed=%d files=%d bytes=%d seconds=%.3f",
            removed, files, size, time.monotonic() - started,
        )  # fmt: skip

    def keep_limits(self, lock: int | None = None) -> None:
        """Have files evicted while a limit is crossed.

        :param lock: as of :meth:`_job`.
        """
        if self._evictor.over():
            self._count(self._job(recover, self._limits, lock=lock))

    def _count(self, steps: Iterator[Usage], pause: float = 0) -> None:
        """Count what is evicted.

        :param pause: seconds after each step.
        """
        started, files, size = time.monotonic(), 0, 0
        try:
            for freed in steps:
                self._metrics.evicted(freed.files, freed.size)
                files, size = files + freed.files, size + freed.size
                if self._stopped.wait(pause):
                    break
        finally:
            if files:
                log.info("event=evicted files=%d bytes=%d seconds=%.3f", files, size, time.monotonic() - started)

    def make_room(self, size: int) -> bool:
        """Evict, if need be, so that an object of ``size`` bytes fits; whether it does.

        Nothing is evicted for an object that would not fit into the emptied cache. What takes too long to wait for,
        such as the walk of a large cache, goes on for those who come later.
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
        # Not even room for a lock's file is no more than no room.
        with contextlib.suppress(WriteConflict, InsufficientStorage):
            # Else every fill of every worker evicts for itself what one eviction frees for all of them.
            with self._cache.locks.hold(ROOM_LOCK, ROOM_TIMEOUT):
                shortfall = partial(self._evictor.missing_for, size)
                self._count(self._evictor.evict_until_within(shortfall, self._oldest, self._choose), PAUSE)

    def _choose(self) -> list[Candidate]:
        # A full cache needs room for each object that comes: not each can be worth a walk.
        count = min(self._limits.cleanup_chunk_size, REMEMBERED)
        if self._cache.usage.read()[0] <= SMALL:
            return self._evictor.least_recently_used(count)
        return [candidate for some in self._job(least_recently_used, self._limits, count) for candidate in some]
