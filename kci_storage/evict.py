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
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from kci_storage import durable
from kci_storage.cache import CONTENT, Cache
from kci_storage.config import CacheConfig
from kci_storage.drivers.base import Sweepable

if TYPE_CHECKING:
    from kci_storage.metrics import Metrics

log = logging.getLogger(__name__)

YOUNGEST = 60  # seconds; what was written or used since is not evicted
PAUSE_EVERY, PAUSE = 500, 0.002  # files, seconds: a walk gives way to requests
ELECTION_INTERVAL = 5  # seconds between two tries to become the one who does it
ROOM_LOCK, LEADER_LOCK = "room.lock", "housekeeping.lock"


class Candidate(NamedTuple):
    """A copy that may be evicted; they sort by their last use."""

    used: float  # seconds since the epoch
    digest: str
    size: int  # bytes


class Shortfall(NamedTuple):
    """How much has to go."""

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

    def start(self) -> None:
        """Keep house in a thread of its own, whenever no other worker does."""
        threading.Thread(target=self._run, name="housekeeping", daemon=True).start()

    def stop(self) -> None:
        """Have the thread end soon."""
        self._stopped.set()

    def _run(self) -> None:
        fd = durable.open_lock_file(self._cache.directory / LEADER_LOCK)
        try:
            while not durable.try_lock(fd):
                if self._stopped.wait(ELECTION_INTERVAL):
                    return
            self._log_errors(self._sweep)
            while not self._stopped.is_set():
                self._log_errors(self.keep_limits)
                self._stopped.wait(self._limits.interval)
        finally:
            os.close(fd)

    @staticmethod
    def _log_errors(action: Callable[[], None]) -> None:
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
            self._evict_until_within(self._to_recover)

    def make_room(self, size: int) -> bool:
        """Evict, if need be, so that an object of ``size`` bytes fits; whether it does.

        Nothing is evicted for an object that would not fit into the emptied cache.
        """
        missing = self._missing_for(size)
        if not missing:
            return True
        used_files, used_size = self._cache.usage.read()
        if missing.size > used_size or missing.files > used_files:
            return False
        with self._one_at_a_time():
            self._evict_until_within(lambda: self._missing_for(size))
        return not self._missing_for(size)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        # Else every fill of every worker evicts for itself what one eviction frees for all of them.
        with self._cache.locks.hold(ROOM_LOCK, timeout=60):
            yield

    # What the limits ask for

    def _over(self) -> bool:
        files, size = self._cache.usage.read()
        limits = self._limits
        return (
            files > limits.max_files or 0 < limits.max_bytes < size or self._disk_missing(limits.low_disk_percent) > 0
        )

    def _to_recover(self) -> Shortfall:
        return self._beyond(0, self._disk_missing(self._limits.recover_disk_percent))

    def _missing_for(self, size: int) -> Shortfall:
        return self._beyond(size, size - shutil.disk_usage(self._cache.directory).free)

    def _beyond(self, more: int, missing_on_disk: int) -> Shortfall:
        """What has to go so that ``more`` bytes in one file can come."""
        files, size = self._cache.usage.read()
        too_many_bytes = size + more - self._limits.max_bytes if self._limits.max_bytes else 0
        return Shortfall(files + bool(more) - self._limits.max_files, max(too_many_bytes, missing_on_disk))

    def _disk_missing(self, percent: float) -> int:
        """Bytes by which the disk's free space is under ``percent``."""
        disk = shutil.disk_usage(self._cache.directory)
        return int(disk.total * percent / 100) - disk.free

    # Evicting

    def _evict_until_within(self, shortfall: Callable[[], Shortfall]) -> None:
        """Evict the least recently used until ``shortfall()`` is none, or nothing more may go."""
        files = size = 0
        while missing := shortfall():
            freed = self._evict(missing)
            files, size = files + freed.files, size + freed.size
            if not freed:
                break
        if files:
            log.info("event=evicted files=%d bytes=%d", files, size)

    def _evict(self, missing: Shortfall) -> Shortfall:
        """Evict as much as is missing, at most ``cleanup_chunk_size`` files; what went."""
        files = size = 0
        for candidate in self._least_recently_used():
            if files >= missing.files and size >= missing.size:
                break
            if self._cache.evict(candidate.digest):
                files, size = files + 1, size + candidate.size
                self._pause(files)
        self._metrics.evicted(files, size)
        return Shortfall(files, size)

    def _least_recently_used(self) -> list[Candidate]:
        return heapq.nsmallest(self._limits.cleanup_chunk_size, self._candidates())

    def _candidates(self) -> Iterator[Candidate]:
        oldest_allowed = time.time() - YOUNGEST
        for number, (digest, file) in enumerate(self._cache.entries()):
            self._pause(number)
            if not file.name.endswith(CONTENT):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                used = max(status.st_atime, status.st_mtime)
                if used < oldest_allowed:
                    yield Candidate(used, digest, status.st_size)

    @staticmethod
    def _pause(number: int) -> None:
        if number % PAUSE_EVERY == PAUSE_EVERY - 1:
            time.sleep(PAUSE)
