# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that several threads want at the same time, made once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from kci_storage.net import slots

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """The calls under way in one process, by name."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, Future[T]] = {}
        self._mutex = threading.Lock()

    def share(self, name: Hashable, function: Callable[[], T]) -> T:
        """What ``function()`` returns or raises, called by the first of those who want this name at the same time.

        :raises Overloaded: too many requests wait already.
        """
        with self._mutex:
            flight = self._under_way.get(name)
            mine = flight is None
            if flight is None:
                flight = self._under_way[name] = Future()
        if mine:
            self._fly(name, flight, function)
        else:
            _wait_for(flight)
        error = flight.exception()
        if error is not None:
            raise copy.copy(error)  # one for each thread, since raising it changes it
        return flight.result()

    def _fly(self, name: Hashable, flight: Future[T], function: Callable[[], T]) -> None:
        try:
            result = function()
        except BaseException as exc:  # noqa: BLE001  (raised by all that wait)
            self._land(name)
            flight.set_exception(exc)
        else:
            self._land(name)
            flight.set_result(result)

    def _land(self, name: Hashable) -> None:
        with self._mutex:
            del self._under_way[name]


def _wait_for(flight: Future[T]) -> None:
    with slots.waiting():
        wait([flight])
