# SPDX-License-Identifier: LGPL-2.1-or-later
"""Readiness: whether the backend answers, asked at most once a second for all who want to know, in all workers."""

from __future__ import annotations

import mmap
import multiprocessing
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kci_storage.errors import BackendError, NotReady
from kci_storage.net import slots

INTERVAL = 1.0  # seconds between two questions, and how old an answer may be when it is wanted
POLL_INTERVAL = 0.02  # seconds
LOCK_TIMEOUT = 0.1  # seconds; the lock is held for microseconds, or for ever by a process that was killed meanwhile

_TIMES = struct.Struct("<ddI")  # when it was last asked, when answered (monotonic clock), bytes of the reason
_MAX_REASON = mmap.PAGESIZE - _TIMES.size


class LastAnswer:
    """The last question and its answer, in memory that forked processes share."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._lock = multiprocessing.get_context("fork").Lock()
        self._write(float("-inf"), float("-inf"), b"")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        acquired = self._lock.acquire(timeout=LOCK_TIMEOUT)
        try:
            yield
        finally:
            if acquired:
                self._lock.release()

    def _write(self, asked: float, answered: float, reason: bytes) -> None:
        self._page[: _TIMES.size + len(reason)] = _TIMES.pack(asked, answered, len(reason)) + reason

    def _read(self) -> tuple[float, float, bytes]:
        asked, answered, size = _TIMES.unpack_from(self._page)
        return asked, answered, self._page[_TIMES.size : _TIMES.size + size]

    def claim(self) -> bool:
        """Whether the caller is to ask now; nobody else is told so before the interval is over."""
        with self._locked():
            asked, answered, reason = self._read()
            if time.monotonic() < asked + INTERVAL:
                return False
            self._write(time.monotonic(), answered, reason)
            return True

    def set(self, reason: str) -> None:
        """Note the answer; empty: the backend answers."""
        with self._locked():
            self._write(self._read()[0], time.monotonic(), reason.encode()[:_MAX_REASON])

    def get(self, since: float) -> str | None:
        """The answer; None: there is none since that time on the monotonic clock."""
        with self._locked():
            _, answered, reason = self._read()
        return reason.decode(errors="ignore") if answered >= since else None


SHARED = LastAnswer()  # made in the master, which imports this module before it forks workers


class Readiness:
    """Whether the backend answers.

    :param probe: asks the backend; raises :class:`~kci_storage.errors.BackendError` if it does not answer.
    :param last: the last answer, to share with other processes.
    """

    def __init__(self, probe: Callable[[], None], last: LastAnswer):
        self._probe = probe
        self._last = last

    def check(self) -> None:
        """Check that the backend answers, by an answer that was at most a second old when this was called.

        While a question hangs, one more is asked each second, since the process that waits for it may be gone.

        :raises NotReady: it does not; the message says why.
        """
        since = time.monotonic() - INTERVAL
        while (reason := self._last.get(since)) is None:
            if self._last.claim():
                self._ask()
                return
            with slots.waiting():
                time.sleep(POLL_INTERVAL)
        if reason:
            raise NotReady(reason)

    def _ask(self) -> None:
        try:
            self._probe()
        except BackendError as exc:
            self._last.set(exc.message)
            raise NotReady(exc.message, detail=exc.detail) from exc
        self._last.set("")
