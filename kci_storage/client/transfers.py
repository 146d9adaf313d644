# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several transfers at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def at_once(tasks: Sequence[Callable[[], T]], jobs: int) -> Iterator[T]:
    """The tasks' results, as they come.

    The threads are daemons: who interrupts the program does not wait for a server that says nothing. Whatever a task
    leaves behind at any moment must therefore be something that the next run can live with.

    :param jobs: how many run at once.
    :raises BaseException: what a task raised, whatever it was; tasks should not.
    """
    waiting: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()
    results: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    for _ in range(min(jobs, len(tasks))):
        threading.Thread(target=_work, args=(waiting, results), daemon=True).start()
    for _ in tasks:
        yield results.get().result()


def _work(waiting: queue.SimpleQueue[Callable[[], T]], results: queue.SimpleQueue[Future[T]]) -> None:
    while True:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            return
        done: Future[T] = Future()
        try:
            done.set_result(task())
        except BaseException as exc:  # noqa: BLE001  (raised where the result is wanted)
            done.set_exception(exc)
        results.put(done)
