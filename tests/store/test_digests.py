# SPDX-License-Identifier: LGPL-2.1-or-later
"""Digests computed beside an upload."""

from __future__ import annotations

import hashlib
import os
import threading

import pytest

from kci_storage.store import digests
from kci_storage.store.digests import BUFFER_SIZE, BUFFERS, INLINE_SIZE, RunningDigests

AROUND_INLINE = [INLINE_SIZE - 1, INLINE_SIZE, INLINE_SIZE + 1, INLINE_SIZE + BUFFER_SIZE + 1]
SIZES = [0, 1, BUFFER_SIZE, *AROUND_INLINE, INLINE_SIZE + 3 * BUFFERS * BUFFER_SIZE]


@pytest.mark.parametrize("piece", [1000, BUFFER_SIZE, BUFFER_SIZE + 1, 10 * INLINE_SIZE])
@pytest.mark.parametrize("size", SIZES)
def test_they_equal_hashlibs_digests(size: int, piece: int):
    """The buffer that the pieces come in is used again at once, as a request's is."""
    content = os.urandom(size)
    running = RunningDigests("sha256", "md5")
    buffer = bytearray(piece)
    for start in range(0, size, piece):
        part = content[start : start + piece]
        buffer[: len(part)] = part
        running.update(memoryview(buffer)[: len(part)])
    assert running.digest("sha256") == hashlib.sha256(content).digest()
    assert running.digest("md5") == hashlib.md5(content).digest()
    assert running.hex("sha256") == hashlib.sha256(content).hexdigest()
    assert running.digest("sha1") is None


@pytest.mark.parametrize(("size", "threads"), [(INLINE_SIZE, 0), (INLINE_SIZE + 1, 2)])
def test_only_large_content_costs_threads_and_they_end(size: int, threads: int):
    others = set(threading.enumerate())  # of tests before, of which some may end now
    running = RunningDigests("sha256", "md5")
    running.update(bytes(size))
    assert len(set(threading.enumerate()) - others) == threads
    running.close()
    running.close()
    assert set(threading.enumerate()) <= others


def test_a_system_that_gives_no_more_threads(monkeypatch: pytest.MonkeyPatch):
    """Python says RuntimeError then."""

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(digests.threading, "Thread", NoThread)
    running = RunningDigests("sha256", "md5")
    content = os.urandom(INLINE_SIZE + 1)
    running.update(content)
    running.update(content)
    assert running.digest("sha256") == hashlib.sha256(2 * content).digest()
    assert running.digest("md5") == hashlib.md5(2 * content).digest()
