# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache's limits, and eviction: how much has to be removed, and which copies."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import Usage, last_use
from kci_storage.config.settings import CacheConfig

MIN_IDLE = 60  # seconds; a copy that was written or used since is not evicted
STEP = 20  # candidates that are evicted, or reported, in one step
INODES = 2  # of one copy: its record and its content


class Candidate(NamedTuple):
    """A copy that may be evicted; they sort by their last use."""

    used: float  # seconds since the epoch
    content: str  # the path of its content
    size: int  # bytes


class Shortfall(NamedTuple):
    """How much has to be evicted; nothing where a number is not positive."""

    files: int
    size: int  # bytes

    def __bool__(self) -> bool:
        return self.files > 0 or self.size > 0


class Evictor:
    """Finds out how much has to be evicted, and evicts it.

    :param limits: the configuration's section ``[cache]``.
    """

    def __init__(self, cache: Cache, limits: CacheConfig):
        self._cache = cache
        self._limits = limits

    # How much has to be evicted

    def over(self) -> bool:
        """Whether a limit is crossed."""
        return bool(self._beyond(Usage(0, 0), self._disk_missing(self._limits.low_disk_percent)))

    def to_recover(self) -> Shortfall:
        """What has to be evicted once a limit was crossed."""
        return self._beyond(Usage(0, 0), self._disk_missing(self._limits.recover_disk_percent))

    def missing_for(self, size: int) -> Shortfall:
        """What has to be evicted so that a file of ``size`` bytes fits."""
        disk = os.statvfs(self._cache.directory)
        return self._beyond(Usage(1, size), Shortfall(0, size - disk.f_bavail * disk.f_frsize))

    def _beyond(self, more: Usage, on_disk: Shortfall) -> Shortfall:
        """What has to be evicted so that ``more`` fits into the cache's limits and onto the disk.

        :param on_disk: what has to be evicted for lack of space on the disk.
        """
        files, size, _ = self._cache.usage.read()
        too_many_files = files + more.files - self._limits.max_files
        too_many_bytes = size + more.size - self._limits.max_bytes if self._limits.max_bytes else 0
        return Shortfall(max(too_many_files, on_disk.files), max(too_many_bytes, on_disk.size))

    def _disk_missing(self, percent: float) -> Shortfall:
        """What has to be evicted so that ``percent`` of the disk's bytes and of its inodes are free."""
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
        """Evict the least recently used copies until ``shortfall()`` is met, or nothing more may be evicted.

        :param candidates: those to begin with, the least recently used last; those that are not evicted, also of the
            last scan, are left in this list.
        :param choose: scans for more candidates when there are none.
        :returns: what each step has evicted.
        """
        while missing := shortfall():
            scan = not candidates
            if scan:
                candidates += choose()
                missing = shortfall()  # the scan has corrected the usage
            freed = yield from self._evict(missing, candidates)
            if scan and not freed.files:
                break

    def _evict(self, missing: Shortfall, candidates: list[Candidate]) -> Generator[Usage, None, Usage]:
        """Evict as much as is missing, from the end of the list; yields each step's usage, and returns their sum."""
        total = Usage(0, 0)
        while candidates and missing:
            freed = self._evict_some(missing, candidates)
            total = Usage(total.files + freed.files, total.size + freed.size)
            missing = Shortfall(missing.files - freed.files, missing.size - freed.size)
            yield freed
        return total

    def _evict_some(self, missing: Shortfall, candidates: list[Candidate]) -> Usage:
        """Evict of the last :data:`STEP` candidates as many as needed; how much that freed."""
        files = size = 0
        for _ in range(min(STEP, len(candidates))):
            if files >= missing.files and size >= missing.size:
                break
            candidate = candidates.pop()
            if self._cache.evict(Path(candidate.content), candidate.used):
                files, size = files + 1, size + candidate.size
        return Usage(files, size)

    def least_recently_used(self, count: int) -> list[Candidate]:
        """Scan for ``count`` candidates, the least recently used last, and correct the cache's usage on the way."""
        before = Usage(*self._cache.usage.read())
        seen = Usage(0, 0)
        used_before = time.time() - MIN_IDLE

        def candidates() -> Iterator[Candidate]:
            nonlocal seen
            for file, status in self._cache.contents():
                seen = Usage(seen.files + 1, seen.size + status.st_size)
                if last_use(status) < used_before:
                    yield Candidate(last_use(status), file.path, status.st_size)

        chosen = heapq.nsmallest(count, candidates())
        self._cache.correct_usage(before, seen)
        return chosen[::-1]
