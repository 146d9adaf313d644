# SPDX-License-Identifier: LGPL-2.1-or-later
"""Single flight: a call that several threads need at the same time is made once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from kci_storage.net import slots

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """The running calls of one process, by name."""

    def __init__(self) -> None:
        self._running: dict[Hashable, Future[T]] = {}
        self._mutex = threading.Lock()

    def share(self, name: Hashable, function: Callable[[], T]) -> T:
        """The result of ``function()``, shared with every thread that asks for the same name while it runs.

        :returns: what it returns; what it raises is raised in each of these threads.
        :raises Overloaded: too many requests wait already.
        """
        with self._mutex:
            call = self._running.get(name)
            is_first = call is None
            if call is None:
                call = self._running[name] = Future()
        if is_first:
            self._run(name, call, function)
        else:
            _wait_for(call)
        error = call.exception()
        if error is not None:
            raise copy.copy(error)  # one for each thread, since raising it changes it
        return call.result()

    def _run(self, name: Hashable, call: Future[T], function: Callable[[], T]) -> None:
        try:
            result = function()
        except BaseException as exc:  # noqa: BLE001  (raised by all that wait)
            self._forget(name)
            call.set_exception(exc)
        else:
            self._forget(name)
            call.set_result(result)

    def _forget(self, name: Hashable) -> None:
        with self._mutex:
            del self._running[name]


def _wait_for(call: Future[T]) -> None:
    with slots.waiting():
        wait([call])
