"""Keeping the cache within its limits, without anybody noticing.

One thread over all workers does it, elected by a lock; when its worker dies, another worker's takes over. It looks at
the limits now and then, and walks the directory only when one is crossed. A fill that needs room asks for it at once
(:meth:`Housekeeper.make_room`).
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kci_storage import durable
from kci_storage.cache import Cache, Usage, last_use
from kci_storage.config import CacheConfig
from kci_storage.drivers.base import Sweepable
from kci_storage.errors import InsufficientStorage, WriteConflict

if TYPE_CHECKING:
    from kci_storage.metrics import Metrics

log = logging.getLogger(__name__)

YOUNGEST = 60  # seconds; what was written or used since is not evicted
PAUSE_EVERY, PAUSE = 500, 0.002  # files, seconds: evicting gives way to requests
ELECTION_INTERVAL = 5  # seconds between two tries to become the one who does it
SWEEP_INTERVAL = 24 * 3600  # seconds; a sweep also finds what workers left that died while the server ran
ROOM_TIMEOUT = 3  # seconds that a fill waits for room, and so do its clients; then it does without the cache
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


class Housekeeper:
    """Evicts what was not used for longest when a limit is crossed.

    :param limits: the ``[cache]`` section.
    :param driver: the driver, if a crash may have left something in its store.
    """

    def __init__(self, cache: Cache, limits: CacheConfig, metrics: Metrics, driver: Sweepable | None):
        self._cache = cache
        self._driver = driver
        self._limits = limits
        self._metrics = metrics
        self._stopped = threading.Event()
        self._oldest: list[Candidate] = []  # of the latest walk for a fill, the least recently used last

    def start(self) -> None:
        """See to what a worker has left that died, then keep house in a thread whenever no other worker does."""
        self._log_errors(self._cache.recover_locks)
        threading.Thread(target=self._run, name="housekeeping", daemon=True).start()

    def stop(self) -> None:
        """Have the thread end soon."""
        self._stopped.set()

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
                    self._log_errors(self._sweep)
                self._log_errors(self.keep_limits)
                if self._stopped.wait(self._limits.interval):
                    return
        finally:
            os.close(fd)

    @staticmethod
    def _log_errors(action: Callable[[], object]) -> None:
        try:
            action()
        except Exception:  # a full disk, a folder that somebody took away: the next round may do better
            log.exception("event=housekeeping_failed")

    def _sweep(self) -> None:
        started = time.monotonic()
        removed = self._cache.sweep() + (self._driver.sweep() if self._driver else 0)
        files, size = self._cache.usage.read()
        log.info(
            "event=swept removed=%d files=%d bytes=%d seconds=%.3f",
            removed, files, size, time.monotonic() - started,
        )  # fmt: skip

    def keep_limits(self) -> None:
        """Evict while a limit is crossed."""
        if self._over():
            self._evict_until_within(self._to_recover, [], self._limits.cleanup_chunk_size)

    def make_room(self, size: int) -> bool:
        """Evict, if need be, so that an object of ``size`` bytes fits; whether it does.

        Nothing is evicted for an object that would not fit into the emptied cache. What takes too long to wait for,
        such as the walk of a large cache, goes on for those who come later.
        """
        missing = self._missing_for(size)
        if not missing:
            return True
        used = Usage(*self._cache.usage.read())
        if missing.size > used.size or missing.files > used.files:
            return False
        work = partial(self._make_room, size)
        maker = threading.Thread(target=self._log_errors, args=(work,), name="room", daemon=True)
        maker.start()
        maker.join(ROOM_TIMEOUT)
        return not self._missing_for(size)

    def _make_room(self, size: int) -> None:
        # A full cache needs room for each object that comes: not each can be worth a walk.
        chunk = min(self._limits.cleanup_chunk_size, REMEMBERED)
        # Not even room for a lock's file is no more than no room.
        with contextlib.suppress(WriteConflict, InsufficientStorage):
            # Else every fill of every worker evicts for itself what one eviction frees for all of them.
            with self._cache.locks.hold(ROOM_LOCK, ROOM_TIMEOUT):
                self._evict_until_within(lambda: self._missing_for(size), self._oldest, chunk)

    # What the limits ask for

    def _over(self) -> bool:
        return bool(self._beyond(Usage(0, 0), self._disk_missing(self._limits.low_disk_percent)))

    def _to_recover(self) -> Shortfall:
        return self._beyond(Usage(0, 0), self._disk_missing(self._limits.recover_disk_percent))

    def _missing_for(self, size: int) -> Shortfall:
        disk = os.statvfs(self._cache.directory)
        return self._beyond(Usage(1, size), Shortfall(0, size - disk.f_bavail * disk.f_frsize))

    def _beyond(self, more: Usage, on_disk: Shortfall) -> Shortfall:
        """What has to go so that ``more`` can come.

        :param on_disk: what has to go for the disk's sake.
        """
        files, size = self._cache.usage.read()
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

    def _evict_until_within(
        self, shortfall: Callable[[], Shortfall], candidates: list[Candidate], chunk: int
    ) -> None:
        """Evict the least recently used until ``shortfall()`` is none, or nothing more may go.

        :param candidates: those to begin with, the least recently used last; what is not evicted of them or of the
            last walk is left there.
        :param chunk: how many files to choose in one walk.
        """
        files = size = 0
        while missing := shortfall():
            walk = not candidates
            if walk:
                candidates += self._least_recently_used(chunk)
                missing = shortfall()  # the walk has corrected the usage
            freed = self._evict(missing, candidates)
            files, size = files + freed.files, size + freed.size
            if walk and not freed:
                break
        if files:
            log.info("event=evicted files=%d bytes=%d", files, size)

    def _evict(self, missing: Shortfall, candidates: list[Candidate]) -> Shortfall:
        """Evict as much as is missing, from the end of the list; what went."""
        files = size = 0
        while candidates and (files < missing.files or size < missing.size):
            candidate = candidates.pop()
            if self._cache.evict(Path(candidate.content), candidate.used):
                files, size = files + 1, size + candidate.size
                if files % PAUSE_EVERY == 0:
                    time.sleep(PAUSE)
        self._metrics.evicted(files, size)
        return Shortfall(files, size)

    def _least_recently_used(self, count: int) -> list[Candidate]:
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
