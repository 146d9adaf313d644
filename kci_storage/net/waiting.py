# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that cost no thread while they wait for their client's next request."""

from __future__ import annotations

import itertools
import time

from kci_storage.net.connection import Connection


class Waiting:
    """Connections that wait, each for so long.

    :param seconds: how long.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._connections: dict[Connection, float] = {}  # since when on the monotonic clock, the oldest first

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, conn: Connection) -> bool:
        return conn in self._connections

    def add(self, conn: Connection) -> None:
        """It waits from now on."""
        now = time.monotonic()
        conn.deadline = now + self._seconds
        self._connections[conn] = now

    def discard(self, conn: Connection) -> None:
        """It does not wait any more."""
        self._connections.pop(conn, None)

    def oldest(self) -> Connection | None:
        """The one that has waited the longest; None: nobody waits."""
        return next(iter(self._connections), None)

    def oldest_age(self, now: float) -> float:
        """For how many seconds that one has waited; below zero: nobody waits."""
        return now - next(iter(self._connections.values()), float("inf"))

    def expired(self, now: float) -> list[Connection]:
        """Those whose time is over."""
        return list(itertools.takewhile(lambda conn: conn.deadline <= now, self._connections))

    def shorten(self, seconds: float) -> None:
        """From now on nobody waits for longer than this."""
        self._seconds = min(self._seconds, seconds)
        for conn in self._connections:
            conn.deadline = min(conn.deadline, time.monotonic() + self._seconds)
