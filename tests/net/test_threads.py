# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pool of threads: when it is crowded, so that the slowest clients are shed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kci_storage.net.threads import SLOW_PER_SLOT, Threads
from tests.support.harness import wait_until

SECONDS = 60


@pytest.fixture
def done() -> Iterator[threading.Event]:
    """Lets a test's threads end."""
    event = threading.Event()
    yield event
    event.set()


def test_it_is_not_crowded_while_a_call_waits_for_a_slot(done: threading.Event) -> None:
    threads = Threads(1, changed=lambda: None)
    threads.submit(done.wait)
    threads.submit(done.wait)
    assert not threads.is_crowded


def test_it_is_crowded_while_the_system_has_no_thread_for_a_free_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = Threads(1, changed=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        threads.submit(lambda: None)
        assert threads.is_crowded
    threads.submit(lambda: None)  # there are threads again: both calls find one
    wait_until(lambda: not threads.is_crowded, SECONDS, "the calls")


def test_it_is_crowded_when_too_many_threads_wait_for_slow_clients(done: threading.Event) -> None:
    threads = Threads(1, changed=lambda: None)

    def wait_for_client() -> None:
        with threads.released_for(object()):
            done.wait()

    for _ in range(SLOW_PER_SLOT):
        threads.submit(wait_for_client)
    wait_until(lambda: len(threads.waited_for()) == SLOW_PER_SLOT, SECONDS, "the threads")
    assert not threads.is_crowded
    threads.submit(wait_for_client)
    wait_until(lambda: threads.is_crowded, SECONDS, "one thread more")
