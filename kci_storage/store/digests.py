# SPDX-License-Identifier: LGPL-2.1-or-later
"""Digests of content that passes, computed beside those who receive and store it.

SHA-256 takes 0.7 seconds of a core for each GiB, MD5 1.7: more than all else that an upload needs. So beyond the
first MiB each digest has a thread of its own, to which the content is handed in buffers that are used again and
again; hashlib lets other threads run meanwhile. A small file is over before a thread would have begun.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from queue import SimpleQueue
from typing import Any

ALONE = 1024 * 1024  # bytes that are digested in the caller's thread
BUFFER_SIZE = 256 * 1024  # bytes; they stay in the processor's cache between the copy and the digest
BUFFERS = 4  # for each digest of more than ALONE


class RunningDigests:
    """Some digests of one content, which comes in pieces.

    :param names: as hashlib has them.
    """

    def __init__(self, *names: str):
        self._hashes = {name: hashlib.new(name, usedforsecurity=False) for name in names}
        self._helpers: list[_Helper] = []
        self._size = 0  # bytes

    def update(self, data: bytes | memoryview) -> None:
        """Take the next piece, which is the caller's again afterwards."""
        before, self._size = self._size, self._size + len(data)
        if before <= ALONE < self._size:
            with contextlib.suppress(RuntimeError):  # the system gives no more threads; then it goes on without
                for each in self._hashes.values():
                    self._helpers.append(_Helper(each))
        helped = [helper.hash for helper in self._helpers]
        for helper in self._helpers:
            helper.update(data)
        for each in self._hashes.values():
            if each not in helped:
                each.update(data)

    def digest(self, name: str) -> bytes | None:
        """The digest of all that was taken, after which nothing more comes; None: it is not one of these."""
        self.close()
        return self._hashes[name].digest() if name in self._hashes else None

    def hex(self, name: str) -> str:
        """The same as text."""
        self.close()
        return self._hashes[name].hexdigest()

    def close(self) -> None:
        """End the threads, when they have done what they were given. Idempotent."""
        while self._helpers:
            self._helpers.pop().close()


class _Helper:
    """A thread that digests what it is given.

    :param hashing: of hashlib; nobody else uses it before :meth:`close` has returned.
    """

    def __init__(self, hashing: Any):
        self.hash = hashing
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._full: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=hashing.name, daemon=True)
        self._thread.start()
        for _ in range(BUFFERS):
            self._free.put(memoryview(bytearray(BUFFER_SIZE)))

    def _run(self) -> None:
        while (filled := self._full.get()) is not None:
            buffer, size = filled
            self.hash.update(buffer[:size])
            self._free.put(buffer)

    def update(self, data: bytes | memoryview) -> None:
        """Copy a piece for the thread; wait while all buffers are full."""
        rest = memoryview(data)
        while rest:
            buffer = self._free.get()
            size = min(len(rest), BUFFER_SIZE)
            buffer[:size] = rest[:size]
            self._full.put((buffer, size))
            rest = rest[size:]

    def close(self) -> None:
        """Wait for the thread's end."""
        self._full.put(None)
        self._thread.join()
