# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much one client may have at once, counted over all workers of a server, without a lock between them.

The counts are in memory that the workers share (:class:`Ledger`). A client has two cells there, chosen by a hash
that nobody outside knows, and the lesser of the two counts: where another client has the same cell, it hardly has the
same other one (a count-min sketch). So the memory is bounded however many clients there are, and nothing has to
be cleared.

- Downloads: each worker counts its own, in cells that only it writes; the sum is what counts. When a worker dies, its
  cells are cleared. Most are hits on small files, which are over before anybody could look: these are not counted,
  and of who has no other download it is found with one look at memory that he has none.
- Requests: a cell holds the time at which the client's bucket is full again (the "theoretical arrival time" of the
  Generic Cell Rate Algorithm, ITU-T I.371). All workers write it, and two that do at the same microsecond count one
  request instead of two. That is good enough for a limit of this kind.
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
MANY_DOWNLOADS_RETRY = 5  # seconds; nobody knows when a download ends
_ROUNDING = 1e-6  # seconds

Cells = tuple[int, int]


class Ledger:
    """The counts of all clients, in memory that forked processes share.

    :param rows: how many workers there may be at a time; memory is taken only for those that are.
    """

    def __init__(self, rows: int):
        self._salt = os.urandom(16)
        size = CELLS * COUNT_BYTES
        view = memoryview(mmap.mmap(-1, mmap.PAGESIZE + CELLS * RATE_BYTES + rows * size))
        self.may_be_busy = memoryview(mmap.mmap(-1, CELLS))  # 0: there is no download in the cell
        self._used = view[: mmap.PAGESIZE].cast("I")  # its first number says how many rows have ever been used
        counts = view[mmap.PAGESIZE + CELLS * RATE_BYTES :]
        self.full_at = view[mmap.PAGESIZE : mmap.PAGESIZE + CELLS * RATE_BYTES].cast("d")
        self._rows = [counts[row * size : (row + 1) * size].cast("I") for row in range(rows)]
        self._own = self._rows[0]
        self._seen_by_all = True  # whether the own row is one of them
        self._lock = threading.Lock()  # between this process's threads; it is held for no longer than it takes to add

    # The master's

    def assign(self, number: int) -> None:
        """The worker of that number is about to be forked: the row of that number will be its own.

        If there are not so many, it counts for itself: two that wrote one row would spoil each other's counts.
        """
        self._used[0] = max(self._used[0], min(number + 1, len(self._rows)))

    def release(self, number: int) -> None:
        """That worker is gone, and with it all downloads that it had."""
        if number < len(self._rows):
            self._rows[number][:] = _no_counts()

    # The worker's

    def take(self, number: int) -> None:
        """In a worker that was forked: count in its row from now on."""
        self._seen_by_all = number < len(self._rows)
        self._own = self._rows[number] if self._seen_by_all else _no_counts()
        self._lock = threading.Lock()

    def cells(self, client: str) -> Cells:
        """Where a client's counts are."""
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
        """Count it as ended. What does not count any more, since its row was cleared, is not taken off again."""
        own, (one, other) = self._own, cells
        with self._lock:
            own[one] -= own[one] > 0
            own[other] -= own[other] > 0
        self.may_be_busy[one] = 0
        if self._count(one):  # only now, so that one which begins meanwhile is not overlooked
            self.may_be_busy[one] = 1

    def has_more_than(self, cells: Cells, limit: int) -> bool:
        """Whether the client has more downloads than so many."""
        one, other = cells
        return self._count(one) > limit and self._count(other) > limit

    def _count(self, cell: int) -> int:
        count, row, rows = 0 if self._seen_by_all else self._own[cell], 0, self._used[0] or 1
        while row < rows:
            count += self._rows[row][cell]
            row += 1
        return count


def _no_counts() -> memoryview:
    """A row in which there is nothing."""
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
        """A download comes; whether it will last, and so has to be counted, nobody knows yet.

        :raises TooManyDownloads: the client has as many as it may have.
        """
        if self._may_be_busy[cells[0]] and self._ledger.has_more_than(cells, self._limit - 1):
            self._refuse()

    def begin(self, cells: Cells) -> Callable[[], None]:
        """A download begins that will last; what is to be called at its end.

        Two that come at the same moment for one last place may both be refused; never are there too many.

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
    """How often a client may ask.

    :param per_second: requests in the long run.
    :param burst: requests at once, after a pause.

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
        self._most = burst * self._interval  # seconds until an empty bucket is full

    def count(self, cells: Cells, now: float) -> None:
        """A request has come.

        :param now: on the monotonic clock, which all processes share, in seconds.
        :raises TooManyRequests: it is one too many. It does not count.
        """
        full_at, (one, other) = self._full_at, cells
        first, second = full_at[one], full_at[other]
        full = min(first, second)
        if full < now:
            full = now
        elif full - now > self._tolerance:
            self._refuse(cells, now, min(full - now, self._most))
        full += self._interval
        if first < full:
            full_at[one] = full
        if second < full:
            full_at[other] = full

    def _refuse(self, cells: Cells, now: float, ahead: float) -> NoReturn:
        for cell in cells:  # there may be more only from before, when the limit was another one
            self._full_at[cell] = min(self._full_at[cell], now + self._most)
        seconds = max(1, math.ceil(ahead - self._tolerance))
        raise TooManyRequests(f"too many requests from one network; try again in {seconds} s", retry_after=seconds)
