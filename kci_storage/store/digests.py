# SPDX-License-Identifier: LGPL-2.1-or-later
"""Digests of an upload's content, computed while it is received and stored.

SHA-256 takes 0.7 seconds of a core for each GiB, MD5 1.7: more than everything else that an upload needs. So beyond
the first MiB each digest has a thread of its own, which gets the content in a few reused buffers; hashlib releases
the interpreter lock meanwhile. A small file is done sooner than a thread would have started.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from queue import SimpleQueue
from typing import Any

INLINE_SIZE = 1024 * 1024  # bytes that are digested in the caller's thread; beyond it, each digest has its own
BUFFER_SIZE = 256 * 1024  # bytes; they stay in the processor's cache between the copy and the digest
BUFFERS = 4  # of each digest thread


class RunningDigests:
    """Several digests of one content, which comes in pieces.

    :param names: hashlib's names of the algorithms.
    """

    def __init__(self, *names: str):
        self._hashes = {name: hashlib.new(name, usedforsecurity=False) for name in names}
        self._helpers: list[_Helper] = []
        self._size = 0  # bytes

    def update(self, data: bytes | memoryview) -> None:
        """Digest the next piece. It is copied where that is needed: the caller may reuse its buffer."""
        before, self._size = self._size, self._size + len(data)
        if before <= INLINE_SIZE < self._size:
            with contextlib.suppress(RuntimeError):  # no more threads can be started: digest in this one
                for each in self._hashes.values():
                    self._helpers.append(_Helper(each))
        helped = [helper.hash for helper in self._helpers]
        for helper in self._helpers:
            helper.update(data)
        for each in self._hashes.values():
            if each not in helped:
                each.update(data)

    def digest(self, name: str) -> bytes | None:
        """The digest of everything so far; nothing may be added afterwards. None: this algorithm is not computed."""
        self.close()
        return self._hashes[name].digest() if name in self._hashes else None

    def hex(self, name: str) -> str:
        """As :meth:`digest`, in hexadecimal digits.

        :raises KeyError: this algorithm is not computed.
        """
        self.close()
        return self._hashes[name].hexdigest()

    def close(self) -> None:
        """Wait until the threads have digested what they were given, and end them. Idempotent."""
        while self._helpers:
            self._helpers.pop().close()


class _Helper:
    """A thread that computes one digest.

    :param hashing: a hashlib object; only this thread uses it until :meth:`close` has returned.
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
