# SPDX-License-Identifier: LGPL-2.1-or-later
"""The wrapper around every driver: a thread that waits for the backend releases its slot."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest

from kci_storage.drivers.base import Digests, Driver
from kci_storage.monitoring.measured_driver import MeasuredDriver
from kci_storage.net.threads import Threads
from tests.support.harness import wait_until
from tests.support.wire import SECONDS

CALLS: dict[str, Callable[[Driver], object]] = {
    "stat": lambda driver: driver.stat("key"),
    "read": lambda driver: driver.read("key"),
    "readinto": lambda driver: driver.read("key").readinto(memoryview(bytearray(1))),
    "list": lambda driver: driver.list(),
    "probe": lambda driver: driver.probe(),
    "write": lambda driver: driver.writer("key", "text/plain").write(b"x"),
    "flush": lambda driver: driver.writer("key", "text/plain").flush(),
    "commit": lambda driver: driver.writer("key", "text/plain").commit(Digests(0, ""), None),
    "delete": lambda driver: driver.delete("key", "etag"),
    "fence": lambda driver: driver.fence("key", "etag"),
}


@pytest.mark.parametrize("method", CALLS)
def test_another_request_has_the_slot_during_a_wait_for_the_backend(method: str) -> None:
    """There is one slot, and the call that ends the wait needs it."""
    reached, told, over = threading.Event(), threading.Event(), threading.Event()

    def hang(*args: Any) -> MagicMock:
        reached.set()
        assert told.wait(SECONDS)
        return MagicMock()

    def ask() -> None:
        CALLS[method](MeasuredDriver(driver))
        over.set()

    driver = MagicMock()  # it is its own reader and writer
    driver.read.return_value = driver.writer.return_value = driver
    getattr(driver, method).side_effect = hang
    threads = Threads(1, changed=lambda: None)
    threads.submit(ask)
    assert reached.wait(SECONDS)
    threads.submit(told.set)
    wait_until(lambda: threads.released_slots == 1 or told.is_set(), SECONDS, "the slot to be released")
    assert over.wait(SECONDS)
    assert threads.released_slots == 0
