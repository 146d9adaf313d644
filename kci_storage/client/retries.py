# SPDX-License-Identifier: LGPL-2.1-or-later
"""Retries: after which errors, how often, and after which delay."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from kci_storage.client.errors import ClientError

FIRST_DELAY = 1.0  # seconds; doubled with each failure in a row
MAX_DELAY = 30.0  # seconds
MAX_RETRY_AFTER = 300.0  # seconds of Retry-After; a longer one is cut

T = TypeVar("T")
Note = Callable[[str], None]


class Attempts:
    """The attempts at one operation.

    :param retries: how many failures in a row may be followed by another attempt.
    :param note: called with a message for each of these.
    :param sleep: called with the seconds to wait.
    """

    def __init__(self, retries: int, note: Note, sleep: Callable[[float], None] = time.sleep):
        self._retries = retries
        self._note = note
        self._sleep = sleep
        self._failures = 0

    def failed(self, error: ClientError) -> None:
        """Wait before the next attempt.

        :raises ClientError: ``error``, if there is no other attempt.
        """
        self._failures += 1
        if not error.retriable or self._failures > self._retries:
            raise error
        seconds = delay(self._failures, error.retry_after)
        self._note(f"{error}; trying again in {seconds:.1f} s")
        self._sleep(seconds)

    def progressed(self) -> None:
        """Bytes were transferred: start counting failures anew."""
        self._failures = 0

    def run(self, operation: Callable[[], T]) -> T:
        """Call the operation, again after failures; its result.

        :raises ClientError: the last attempt's.
        """
        while True:
            try:
                return operation()
            except ClientError as exc:
                self.failed(exc)


def delay(failures: int, retry_after: float | None = None) -> float:
    """The seconds to wait after a number of failures in a row: exponential backoff.

    Up to half of the delay is random, so that clients that failed together do not return together.

    :param failures: in a row.
    :param retry_after: seconds, as the server asks; None: it does not.

    >>> 0.5 <= delay(1) <= 1, 2 <= delay(3) <= 4, 15 <= delay(99) <= 30, 5 <= delay(1, 5) <= 6
    (True, True, True, True)
    """
    maximum = min(FIRST_DELAY * 2 ** min(failures - 1, 10), MAX_DELAY)
    backoff = random.uniform(maximum / 2, maximum)
    if retry_after is None:
        return backoff
    asked = min(retry_after, MAX_RETRY_AFTER)
    return max(backoff, asked + random.uniform(0, FIRST_DELAY))
