# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many slow readers of one file, in a process of their own, which must use little CPU beside the server under load.

Started as ``python -m benchmarks.readers PORT PATH COUNT RATE``.

Each reads RATE bytes per second, in two visits. The rest waits at the sender, since the window of each connection is
no larger than one visit's bytes. The segments are as short as on Ethernet, so that the sender's buffers are as large
as for remote clients; the loopback's own would hold megabytes.

Each line on standard input is answered with one line: how many readers have their response's head, how many were cut,
and how many bytes all of them have read. At the end of the input, the readers close their connections.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections.abc import Sequence

VISITS = 2  # of each reader in a second
SLICES = 20  # of the readers; the time between two visits is divided alike
SEGMENT = 1448  # bytes
TIMEOUT = 120  # seconds for a connection


class Reader:
    """A connection that reads a file slowly, and drops it in the kernel (``MSG_TRUNC``, tcp(7)).

    :param quota: bytes that it reads in one visit.
    """

    _buffer = bytearray(1 << 20)  # never written to; only its length matters

    def __init__(self, port: int, path: str, quota: int):
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, quota)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(("127.0.0.1", port))
        self.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        self.sock.setblocking(False)
        self.answered = self.cut = False
        self._quota = quota

    def visit(self) -> int:
        """Read what has come, at most the quota; returns how many bytes."""
        try:
            return self._take()
        except BlockingIOError:
            return 0
        except OSError:
            self.cut = True
            return 0

    def _take(self) -> int:
        if not self.answered:
            self.answered = self.sock.recv(15) == b"HTTP/1.1 200 OK"
            self.cut = not self.answered
        size = self.sock.recv_into(self._buffer, self._quota, socket.MSG_TRUNC)
        self.cut = self.cut or not size
        return size


class Crowd:
    """All readers, which take turns."""

    def __init__(self, port: int, path: str, count: int, rate: int):
        self._readers = [Reader(port, path, rate // VISITS) for _ in range(count)]
        self._taken = 0  # bytes
        self._turn = 0

    def visit_slice(self) -> None:
        """Visit the next slice of the readers."""
        for reader in self._readers[self._turn :: SLICES]:
            if not reader.cut:
                self._taken += reader.visit()
        self._turn = (self._turn + 1) % SLICES

    def figures(self) -> str:
        """The line of figures: readers with a response, readers that were cut, bytes."""
        answered = sum(reader.answered for reader in self._readers)
        return f"{answered} {sum(reader.cut for reader in self._readers)} {self._taken}"


def main(arguments: Sequence[str]) -> None:
    """Read until the standard input ends."""
    port, path, count, rate = arguments
    crowd = Crowd(int(port), path, int(count), int(rate))
    due = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            due = max(due + 1 / VISITS / SLICES, time.monotonic() - 1)  # missed visits are not made up for
            if selector.select(max(0.0, due - time.monotonic())):
                if not sys.stdin.readline():
                    return
                print(crowd.figures(), flush=True)
            crowd.visit_slice()


if __name__ == "__main__":
    main(sys.argv[1:])
