# SPDX-License-Identifier: LGPL-2.1-or-later
"""The workers' numbers: running workers have different ones, and the number of a dead worker is used again.

So data that is kept per worker, such as its counters' files, does not grow when workers are replaced.
"""

from __future__ import annotations

import itertools


class Numbers:
    """The numbers of one master's workers.

    >>> numbers = Numbers()
    >>> numbers.take(), numbers.take()
    (0, 1)
    >>> numbers.release(0)
    >>> numbers.take()
    0
    """

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self) -> int:
        """The lowest number that no worker has."""
        number = next(number for number in itertools.count() if number not in self._taken)
        self._taken.add(number)
        return number

    def release(self, number: int) -> None:
        """The worker of that number is gone."""
        self._taken.remove(number)


def name(master: int, number: int) -> str:
    """A worker's name, which no other running worker of the machine has, not even one of a server's old master.

    :param master: the master's process ID.
    :param number: the worker's.

    >>> name(4711, 2)
    '4711-2'
    """
    return f"{master}-{number}"
