# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that wait for their client's next request, without a thread."""

from __future__ import annotations

import itertools
import time

from kci_storage.net.connection import Connection


class Waiting:
    """Waiting connections, each with a deadline, in the order in which they began to wait.

    :param seconds: how long each may wait.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._connections: dict[Connection, float] = {}  # since when, on the monotonic clock; the oldest first

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, conn: Connection) -> bool:
        return conn in self._connections

    def add(self, conn: Connection) -> None:
        """Add a connection, which waits from now on."""
        now = time.monotonic()
        conn.deadline = now + self._seconds
        self._connections[conn] = now

    def discard(self, conn: Connection) -> None:
        """Remove a connection, if it is there."""
        self._connections.pop(conn, None)

    def oldest(self) -> Connection | None:
        """The connection that has waited the longest; None: there is none."""
        return next(iter(self._connections), None)

    def oldest_age(self, now: float) -> float:
        """For how many seconds the oldest connection has waited; below zero: there is none."""
        return now - next(iter(self._connections.values()), float("inf"))

    def expired(self, now: float) -> list[Connection]:
        """The connections whose deadline has passed."""
        return list(itertools.takewhile(lambda conn: conn.deadline <= now, self._connections))

    def shorten(self, seconds: float) -> None:
        """Let all connections wait for at most this long from now on."""
        self._seconds = min(self._seconds, seconds)
        for conn in self._connections:
            conn.deadline = min(conn.deadline, time.monotonic() + self._seconds)
