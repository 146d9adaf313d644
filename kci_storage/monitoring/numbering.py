# SPDX-License-Identifier: LGPL-2.1-or-later
"""The workers' numbers: those that live have different ones, and a dead one's is given to another.

So what is kept for each worker, such as its counters' files, does not grow with how often they are replaced.
"""

from __future__ import annotations

import itertools


class Numbers:
    """Those that the master gives.

    >>> numbers = Numbers()
    >>> numbers.take(), numbers.take()
    (0, 1)
    >>> numbers.give_back(0)
    >>> numbers.take()
    0
    """

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self) -> int:
        """The least that no worker has."""
        number = next(number for number in itertools.count() if number not in self._taken)
        self._taken.add(number)
        return number

    def give_back(self, number: int) -> None:
        """The worker that had it is no more."""
        self._taken.remove(number)


def name(master: int, number: int) -> str:
    """What no other process of the machine is called that lives, also of a server that has replaced its master.

    >>> name(4711, 2)
    '4711-2'
    """
    return f"{master}-{number}"
