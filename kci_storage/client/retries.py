# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trying again: when, how often, and after how long."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from kci_storage.client.errors import ClientError

FIRST_DELAY = 1.0  # seconds; doubled with each failure in a row
LONGEST_DELAY = 30.0
LONGEST_RETRY_AFTER = 300.0  # seconds that a server may ask for

T = TypeVar("T")
Note = Callable[[str], None]


class Attempts:
    """The attempts at one operation.

    :param retries: how many failures in a row may be followed by another attempt.
    :param note: is told of each failure that is.
    """

    def __init__(self, retries: int, note: Note, sleep: Callable[[float], None] = time.sleep):
        self._retries = retries
        self._note = note
        self._sleep = sleep
        self._failures = 0

    def failed(self, error: ClientError) -> None:
        """Wait before the next attempt.

        :raises ClientError: the same one, when there is none.
        """
        self._failures += 1
        if not error.retriable or self._failures > self._retries:
            raise error
        seconds = delay(self._failures, error.retry_after)
        self._note(f"{error}; trying again in {seconds:.1f} s")
        self._sleep(seconds)

    def progressed(self) -> None:
        """Something came through: the failures before it do not count any more."""
        self._failures = 0

    def run(self, operation: Callable[[], T]) -> T:
        """The operation's result, in as many attempts as it takes.

        :raises ClientError: of the last one.
        """
        while True:
            try:
                return operation()
            except ClientError as exc:
                self.failed(exc)


def delay(failures: int, retry_after: float | None = None) -> float:
    """How many seconds to wait after so many failures in a row.

    A random half of it keeps clients that failed together from coming back together.

    >>> 0.5 <= delay(1) <= 1, 2 <= delay(3) <= 4, 15 <= delay(99) <= 30, 5 <= delay(1, 5) <= 6
    (True, True, True, True)
    """
    longest = min(FIRST_DELAY * 2 ** min(failures - 1, 10), LONGEST_DELAY)
    backing_off = random.uniform(longest / 2, longest)
    if retry_after is None:
        return backing_off
    asked = min(retry_after, LONGEST_RETRY_AFTER)
    return max(backing_off, asked + random.uniform(0, FIRST_DELAY))
