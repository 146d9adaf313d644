# SPDX-License-Identifier: LGPL-2.1-or-later
"""Concurrent transfers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def at_once(tasks: Sequence[Callable[[], T]], jobs: int) -> Iterator[T]:
    """Run tasks concurrently; their results in the order of completion.

    The threads are daemons, so that an interrupted program does not wait for a silent server. A task may therefore be
    cut at any moment, and must leave only files that the next run can handle.

    :param jobs: how many run at a time.
    :raises BaseException: a task's exception; tasks should not raise any.
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
