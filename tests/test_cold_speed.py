"""What makes large cold objects fast must cost nobody else anything: reading ahead of those who read slowly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kci_storage.drivers import azure, base, blob_reads
from kci_storage.drivers.azure import AzureDriver
from tests.azurite import Azurite
from tests.cold import in_background
from tests.driver_contract import KIB, content_of, get, put
from tests.faultproxy import CONTENT, Stall, fault_proxy
from tests.harness import wait_until

SIZE = 3 * 1024 * KIB + 1  # bytes; three ranges and a bit
SECONDS = 30  # within which what waits for nothing happens on any machine


@pytest.fixture
def driver(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureDriver]:
    """A driver of two threads, for which 3 MiB are a large object."""
    for name, value in {"READ_SIZE": 1024, "HELD_SIZE": 256, "HELD_PIECE": 16}.items():
        monkeypatch.setattr(blob_reads, name, value * KIB)
    monkeypatch.setattr(base, "PIECE_SIZE", 64 * KIB)
    monkeypatch.setattr(azure, "THREADS", 2)
    driver = AzureDriver(azurite.settings())
    yield driver
    driver.close()


def test_slow_readers_hold_no_threads(driver: AzureDriver) -> None:
    content = content_of(SIZE)
    put(driver, "a", content)
    slow = [driver.read("a") for _ in range(5)]
    pieces = [iter(reader) for reader in slow]
    begun = [b"".join(itertools.islice(arriving, 2)) for arriving in pieces]
    assert in_background(get, driver, "a").result(SECONDS) == content
    for start, arriving in zip(begun, pieces, strict=True):
        assert in_background(lambda: start + b"".join(arriving)).result(SECONDS) == content  # noqa: B023
    for reader in slow:
        reader.close()


def test_what_is_held_of_later_ranges_is_bounded(azurite: Azurite, driver: AzureDriver) -> None:
    """While the first range stalls, others arrive, and are held up to a limit; then all is as it should be."""
    content = content_of(SIZE)
    put(driver, "a", content)
    with fault_proxy(azurite) as proxy:
        stalled = AzureDriver(replace(driver._settings, endpoint=proxy.endpoint, read_timeout=10 * SECONDS))
        rule = proxy.inject(Stall(200_000), CONTENT, "a")
        with stalled.read("a") as reader:
            reading = in_background(b"".join, reader)
            limit = blob_reads.HELD_SIZE + blob_reads.HELD_PIECE
            full = [True, False, False]
            wait_until(lambda: [each.has_room for each in reader._ranges] == full, SECONDS, "the limit")
            assert all(each._held_size <= limit for each in reader._ranges)
            rule.release()
            assert reading.result(SECONDS) == content
        stalled.close()


def test_a_reader_is_closed_at_once_though_the_backend_stalls(azurite: Azurite, driver: AzureDriver) -> None:
    content = content_of(SIZE)
    put(driver, "a", content)
    with fault_proxy(azurite) as proxy:
        stalled = AzureDriver(replace(driver._settings, endpoint=proxy.endpoint, read_timeout=10 * SECONDS))
        rule = proxy.inject(Stall(200_000), CONTENT, "a")
        reader = stalled.read("a")
        arriving = iter(reader)
        begun = next(arriving) + next(arriving)
        assert content.startswith(begun)
        in_background(reader.close).result(SECONDS)
        rule.end()
        stalled.close()
