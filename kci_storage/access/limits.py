# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits per client, counted over all workers of a server, without a lock between them.

The counts are in memory that the workers share (:class:`Ledger`). Each client has two cells there, chosen by a keyed
hash, and the lower of the two counts is used: two clients that share one cell hardly ever share the other one (a
count-min sketch). So the memory is bounded whatever the number of clients, and no entry has to be removed.

- Downloads: each worker counts its own, in cells that only it writes, and the sum is compared with the limit. When a
  worker dies, its cells are cleared. Most downloads are hits on small files, which end at once and are not counted.
  For a client without a counted download, the check is one look at memory.
- Requests: a cell holds the time at which the client's bucket is full again (the "theoretical arrival time" of the
  Generic Cell Rate Algorithm, ITU-T I.371). All workers write it. Two workers that write in the same microsecond
  count one request instead of two, which is accurate enough for a rate limit.
"""

from __future__ import annotations

import functools
import hashlib
import math
import mmap
import os
import threading
from collections.abc import Callable
from typing import NoReturn

from kci_storage.errors import TooManyDownloads, TooManyRequests

CELLS = 1 << 16
RATE_BYTES, COUNT_BYTES = 8, 4  # of a cell: a double, an unsigned int
MANY_DOWNLOADS_RETRY = 5  # seconds in Retry-After; when a download will end is unknown
_ROUNDING = 1e-6  # seconds

Cells = tuple[int, int]


class Ledger:
    """The counts of all clients, in memory that forked processes share.

    :param rows: how many workers there may be at a time. Memory is used only for those that exist.
    """

    def __init__(self, rows: int):
        self._salt = os.urandom(16)
        size = CELLS * COUNT_BYTES
        view = memoryview(mmap.mmap(-1, mmap.PAGESIZE + CELLS * RATE_BYTES + rows * size))
        self.may_be_busy = memoryview(mmap.mmap(-1, CELLS))  # 0: the cell counts no download
        self._used = view[: mmap.PAGESIZE].cast("I")  # its first number says how many rows have ever been used
        counts = view[mmap.PAGESIZE + CELLS * RATE_BYTES :]
        self.full_at = view[mmap.PAGESIZE : mmap.PAGESIZE + CELLS * RATE_BYTES].cast("d")
        self._rows = [counts[row * size : (row + 1) * size].cast("I") for row in range(rows)]
        self._own = self._rows[0]
        self._is_shared = True  # whether the own row is one of them
        self._lock = threading.Lock()  # between this process's threads; held only for an addition

    # In the master

    def assign(self, number: int) -> None:
        """Reserve the row of that number for the worker that is about to be forked.

        A worker beyond the last row counts for itself alone: two workers that write to one row would lose counts.
        """
        self._used[0] = max(self._used[0], min(number + 1, len(self._rows)))

    def release(self, number: int) -> None:
        """The worker of that number is gone, and its downloads with it: clear its row."""
        if number < len(self._rows):
            self._rows[number][:] = _no_counts()

    # In a worker

    def take(self, number: int) -> None:
        """Called in a new worker: count in the row of that number from now on."""
        self._is_shared = number < len(self._rows)
        self._own = self._rows[number] if self._is_shared else _no_counts()
        self._lock = threading.Lock()

    def cells(self, client: str) -> Cells:
        """The two cells that count a client."""
        digest = hashlib.blake2b(client.encode(), key=self._salt, digest_size=8).digest()
        return int.from_bytes(digest[:4], "big") % CELLS, int.from_bytes(digest[4:], "big") % CELLS

    def begin(self, cells: Cells) -> None:
        """Count a download as begun."""
        own, (one, other) = self._own, cells
        with self._lock:
            own[one] += 1
            own[other] += 1
        self.may_be_busy[one] = 1

    def end(self, cells: Cells) -> None:
        """Count a download as ended. A count never falls below zero, as the row may have been cleared meanwhile."""
        own, (one, other) = self._own, cells
        with self._lock:
            own[one] -= own[one] > 0
            own[other] -= own[other] > 0
        self.may_be_busy[one] = 0
        if self._count(one):  # in this order, so that a download that begins meanwhile is not overlooked
            self.may_be_busy[one] = 1

    def has_more_than(self, cells: Cells, limit: int) -> bool:
        """Whether the client has more than ``limit`` downloads."""
        one, other = cells
        return self._count(one) > limit and self._count(other) > limit

    def _count(self, cell: int) -> int:
        count, row, rows = 0 if self._is_shared else self._own[cell], 0, self._used[0] or 1
        while row < rows:
            count += self._rows[row][cell]
            row += 1
        return count


def _no_counts() -> memoryview:
    """An empty row."""
    return memoryview(bytearray(CELLS * COUNT_BYTES)).cast("I")


class DownloadLimit:
    """The limit on the downloads that a client may have at a time.

    >>> downloads = DownloadLimit(Ledger(rows=1), limit=1)
    >>> end = downloads.begin((1, 2))
    >>> downloads.begin((1, 2))
    Traceback (most recent call last):
    kci_storage.errors.TooManyDownloads: no more than 1 download at a time from one network; try again later
    >>> end()
    >>> downloads.check((1, 2))
    >>> end = downloads.begin((1, 2))
    """

    def __init__(self, ledger: Ledger, limit: int):
        self._ledger = ledger
        self._may_be_busy = ledger.may_be_busy
        self._limit = limit

    def check(self, cells: Cells) -> None:
        """Check a new download, of which it is not known yet whether it will be counted.

        :raises TooManyDownloads: the client has as many as it may have.
        """
        if self._may_be_busy[cells[0]] and self._ledger.has_more_than(cells, self._limit - 1):
            self._refuse()

    def begin(self, cells: Cells) -> Callable[[], None]:
        """Count a download that will take a while.

        If two begin at the same moment and the limit has room for one, both may be refused; it is never exceeded.

        :returns: a function to be called at the download's end.
        :raises TooManyDownloads: the client has as many as it may have.
        """
        self._ledger.begin(cells)
        if self._ledger.has_more_than(cells, self._limit):
            self._ledger.end(cells)
            self._refuse()
        return functools.partial(self._ledger.end, cells)

    def _refuse(self) -> NoReturn:
        downloads = "download" if self._limit == 1 else "downloads"
        raise TooManyDownloads(
            f"no more than {self._limit} {downloads} at a time from one network; try again later",
            retry_after=MANY_DOWNLOADS_RETRY,
        )


class RateLimit:
    """The rate of requests that a client may send (a token bucket).

    :param per_second: requests per second in the long run.
    :param burst: requests that may come at once after a pause.

    >>> rate = RateLimit(Ledger(rows=1), per_second=2, burst=1)
    >>> rate.count((1, 2), now=100.0)
    >>> rate.count((1, 2), now=100.25)
    Traceback (most recent call last):
    kci_storage.errors.TooManyRequests: too many requests from one network; try again in 1 s
    >>> rate.count((1, 2), now=100.5)
    """

    def __init__(self, ledger: Ledger, per_second: float, burst: int):
        self._full_at = ledger.full_at
        self._interval = 1 / per_second
        self._tolerance = (burst - 1) * self._interval + _ROUNDING
        self._seconds_to_full = burst * self._interval  # for an empty bucket

    def count(self, cells: Cells, now: float) -> None:
        """Count a request.

        :param now: seconds on the monotonic clock, which all processes share.
        :raises TooManyRequests: it is one too many. A refused request is not counted.
        """
        full_at, (one, other) = self._full_at, cells
        first, second = full_at[one], full_at[other]
        full = min(first, second)
        if full < now:
            full = now
        elif full - now > self._tolerance:
            self._refuse(cells, now, min(full - now, self._seconds_to_full))
        full += self._interval
        if first < full:
            full_at[one] = full
        if second < full:
            full_at[other] = full

    def _refuse(self, cells: Cells, now: float, ahead: float) -> NoReturn:
        for cell in cells:  # a later time can only be left over from another limit, before a reload
            self._full_at[cell] = min(self._full_at[cell], now + self._seconds_to_full)
        seconds = max(1, math.ceil(ahead - self._tolerance))
        raise TooManyRequests(f"too many requests from one network; try again in {seconds} s", retry_after=seconds)
