# SPDX-License-Identifier: LGPL-2.1-or-later
"""The progress of transfers: a bar on a terminal, else a line every :data:`INTERVAL` seconds."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from typing import TextIO

from kci_storage.client.storage import printable
from kci_storage.http.sizes import readable_size

INTERVAL = 30.0  # seconds between two lines


class Progress:
    """Counts bytes and prints messages, without showing progress. Thread-safe.

    :param quiet: notes are not shown either.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._lock = threading.Lock()
        self._total = 0  # bytes
        self._done = 0
        self._closed = False

    def expect(self, size: int) -> None:
        """Expect ``size`` more bytes than before."""
        with self._lock:
            self._total += size
            if not self._closed:
                self._show()

    def add(self, size: int) -> None:
        """Count transferred bytes; a negative size takes them back."""
        with self._lock:
            self._done += size
            if not self._closed:
                self._show()

    def note(self, text: str) -> None:
        """Print a message that is not about a failure."""
        if not self._quiet and not self._closed:
            self.failure(text)

    def failure(self, text: str) -> None:
        """Print a failure, on one line."""
        self._print(f"kci-storage: {printable(text)}", sys.stderr)

    def line(self, text: str) -> None:
        """Print a line of output."""
        self._print(text, sys.stdout)

    def close(self) -> None:
        """Stop showing progress, also that of transfers that still run after an interruption."""
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        """Called with the lock, at the end."""

    def _show(self) -> None:
        """Called with the lock, when a number has changed."""

    def _print(self, text: str, to: TextIO) -> None:
        with self._lock:
            print(text, file=to, flush=True)


class Lines(Progress):
    """A line at intervals, so that the log of a CI job shows progress."""

    def __init__(self, interval: float = INTERVAL):
        super().__init__()
        self._interval = interval
        self._next = time.monotonic() + interval

    def _show(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval
            done, total = readable_size(self._done), readable_size(self._total)
            print(f"kci-storage: {done} of {total}", file=sys.stderr, flush=True)


class Bar(Progress):
    """One bar for all transfers, on standard error."""

    def __init__(self) -> None:
        super().__init__()
        from tqdm import tqdm

        self._bar = tqdm(total=0, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr, dynamic_ncols=True)

    def _show(self) -> None:
        self._bar.total = self._total
        self._bar.update(self._done - self._bar.n)

    def _print(self, text: str, to: TextIO) -> None:
        with self._lock:
            self._bar.write(text, file=to)

    def _end(self) -> None:
        self._bar.refresh()
        self._bar.close()


def progress(quiet: bool) -> Progress:
    """The kind of progress that suits standard error.

    :param quiet: report failures only.
    """
    if quiet:
        return Progress(quiet=True)
    return Bar() if sys.stderr.isatty() and _has_tqdm() else Lines()


def _has_tqdm() -> bool:
    """Whether the extra "client" is installed."""
    return importlib.util.find_spec("tqdm") is not None
