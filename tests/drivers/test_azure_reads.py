# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading ahead makes large cold objects fast, and must not delay other readers if one is slow."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kci_storage.drivers import base
from kci_storage.drivers.azure import driver as azure
from kci_storage.drivers.azure import reads
from kci_storage.drivers.azure.driver import AzureDriver
from tests.drivers.contract import KIB, content_of, get, put
from tests.support.azurite import Azurite
from tests.support.cold import in_background
from tests.support.faultproxy import CONTENT, FaultProxy, Rule, Stall, fault_proxy
from tests.support.harness import wait_until

SIZE = 3 * 1024 * KIB + 1  # bytes; three ranges and a bit
SECONDS = 60  # the time-out of every wait


@pytest.fixture
def driver(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureDriver]:
    """A driver of two threads, for which 3 MiB are a large object, and every connection counts as slow."""
    for name, value in {"READ_SIZE": 1024, "HELD_SIZE": 256, "HELD_PIECE": 16}.items():
        monkeypatch.setattr(reads, name, value * KIB)
    monkeypatch.setattr(reads, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(reads, "FAST_RATE", math.inf)
    monkeypatch.setattr(base, "PIECE_SIZE", 64 * KIB)
    monkeypatch.setattr(azure, "READ_THREADS", 2)
    driver = AzureDriver(azurite.settings())
    yield driver
    driver.close()


@pytest.fixture
def fast_driver(driver: AzureDriver, monkeypatch: pytest.MonkeyPatch) -> AzureDriver:
    """The same, but every connection counts as fast."""
    monkeypatch.setattr(reads, "PATIENCE_SECONDS", math.inf)
    monkeypatch.setattr(reads, "MOST_PATIENCE_SECONDS", math.inf)
    return driver


def ranges_of(azurite: Azurite, driver: AzureDriver, content: bytes) -> list[tuple[int, int | None]]:
    """The ranges that a download of this content requests from the backend."""
    put(driver, "a", content)
    with fault_proxy(azurite) as proxy:
        proxied = AzureDriver(replace(driver._settings, endpoint=proxy.endpoint))
        assert get(proxied, "a") == content
        proxied.close()
        return [(each.start, each.stop) for each in proxy.requests if each.kind == CONTENT]


def test_a_slow_connection_gets_others_beside_it(azurite: Azurite, driver: AzureDriver) -> None:
    steps = [*range(0, SIZE, reads.READ_SIZE), SIZE]
    assert sorted(ranges_of(azurite, driver, content_of(SIZE))) == list(itertools.pairwise(steps))


def test_a_fast_connection_needs_few_requests(azurite: Azurite, fast_driver: AzureDriver) -> None:
    """The first range has the usual size, since the rate is still unknown; further requests would gain nothing."""
    asked = [(0, reads.READ_SIZE), (reads.READ_SIZE, SIZE)]
    assert ranges_of(azurite, fast_driver, content_of(SIZE)) == asked


@contextlib.contextmanager
def behind_proxy(azurite: Azurite, driver: AzureDriver) -> Iterator[tuple[AzureDriver, FaultProxy, Rule]]:
    """The driver behind a proxy, with the rule by which downloads of ``a`` stall there in their first range."""
    with fault_proxy(azurite) as proxy:
        settings = replace(driver._settings, endpoint=proxy.endpoint, read_timeout=10 * SECONDS)
        with contextlib.closing(AzureDriver(settings)) as proxied:
            yield proxied, proxy, proxy.inject(Stall(200_000), CONTENT, "a")


def test_a_fast_connection_that_stalls_gets_others_beside_it(
    azurite: Azurite, driver: AzureDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(reads, "ASK_AHEAD", 0)
    content = content_of(SIZE)
    put(driver, "a", content)
    with behind_proxy(azurite, driver) as (stalled, proxy, rule), stalled.read("a") as reader:
        reading = in_background(b"".join, reader)
        wait_until(lambda: proxy.count(CONTENT, "a") > 1, SECONDS, "another request")
        rule.release()
        assert reading.result(SECONDS) == content


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
    """While the first range stalls, later ones arrive, and are held in memory up to a limit."""
    content = content_of(SIZE)
    put(driver, "a", content)
    with behind_proxy(azurite, driver) as (stalled, _, rule), stalled.read("a") as reader:
        reading = in_background(b"".join, reader)
        limit = reads.HELD_SIZE + reads.HELD_PIECE
        full = [True, False, False]
        wait_until(lambda: [each.has_room for each in reader._ranges] == full, SECONDS, "the limit")
        assert all(each._held_size <= limit for each in reader._ranges)
        rule.release()
        assert reading.result(SECONDS) == content


def test_a_reader_is_closed_at_once_though_the_backend_stalls(azurite: Azurite, driver: AzureDriver) -> None:
    content = content_of(SIZE)
    put(driver, "a", content)
    with behind_proxy(azurite, driver) as (stalled, _, rule):
        reader = stalled.read("a")
        arriving = iter(reader)
        begun = next(arriving) + next(arriving)
        assert content.startswith(begun)
        in_background(reader.close).result(SECONDS)
        rule.end()
