"""Several transfers at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
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
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    for _ in range(min(jobs, len(tasks))):
        threading.Thread(target=_work, args=(waiting, results), daemon=True).start()
    for _ in tasks:
        result, error = results.get()
        if error is not None:
            raise error
        yield result  # type: ignore[misc]


def _work(
    waiting: queue.SimpleQueue[Callable[[], T]], results: queue.SimpleQueue[tuple[T | None, BaseException | None]]
) -> None:
    while True:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            results.put((task(), None))
        except BaseException as exc:
            results.put((None, exc))
