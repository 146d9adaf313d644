# SPDX-License-Identifier: LGPL-2.1-or-later
"""Missing keys that are requested again and again: few requests reach the backend, and an upload is seen at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from kci_storage.cache.directory import Cache
from kci_storage.store.negative_cache import LIFETIME, MAX_ENTRIES, NegativeCache
from tests.support.cold import Bench, figure, from_each_worker, in_background, only
from tests.support.faultproxy import CONTENT, PROPERTIES, Hold
from tests.support.harness import wait_until
from tests.support.peers import peers
from tests.support.wire import SECONDS, get, new_folder, put, wait_until_tidy


class Clock:
    """A clock that only the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def negative_cache(tmp_path: Path, clock: Clock) -> NegativeCache:
    return NegativeCache(tmp_path / "counters", clock=clock)


def test_nothing_is_remembered_at_first(negative_cache: NegativeCache) -> None:
    assert not negative_cache.remembers("a")


def test_a_miss_is_remembered_for_a_while(negative_cache: NegativeCache, clock: Clock) -> None:
    negative_cache.remember("a", negative_cache.question("a"))
    clock.now += LIFETIME - 0.01
    assert negative_cache.remembers("a") and not negative_cache.remembers("b")
    clock.now += 0.02
    assert not negative_cache.remembers("a")


def test_a_change_ends_the_memory(negative_cache: NegativeCache) -> None:
    negative_cache.remember("a", negative_cache.question("a"))
    negative_cache.changed("a")
    assert not negative_cache.remembers("a")


def test_a_change_while_the_backend_was_asked_ends_it_too(negative_cache: NegativeCache) -> None:
    before = negative_cache.question("a")
    negative_cache.changed("a")
    negative_cache.remember("a", before)
    assert not negative_cache.remembers("a")


def change(path: Path, key: str) -> None:
    """An upload through another process."""
    NegativeCache(path).changed(key)


def test_a_change_by_another_process_ends_it_too(tmp_path: Path, negative_cache: NegativeCache) -> None:
    negative_cache.remember("a", negative_cache.question("a"))
    with peers(1) as [peer]:
        peer.call(change, tmp_path / "counters", "a")
    assert not negative_cache.remembers("a")


def test_a_change_of_another_key_hardly_ever_does(negative_cache: NegativeCache) -> None:
    negative_cache.remember("a", negative_cache.question("a"))
    for number in range(8):
        negative_cache.changed(f"another {number}")
    assert negative_cache.remembers("a")


def test_the_memory_is_bounded(negative_cache: NegativeCache) -> None:
    for number in range(MAX_ENTRIES + 10):
        negative_cache.remember(str(number), negative_cache.question(str(number)))
    assert len(negative_cache._entries) <= MAX_ENTRIES
    assert negative_cache.remembers(str(MAX_ENTRIES + 9))


# Over HTTP


@dataclass
class Hammered:
    """A key that is not there, and for which a dozen clients ask without a pause."""

    key: str
    answers: list[None] = field(default_factory=list)  # one for each, since lists are appended to by many threads


@pytest.fixture
def hammered(bench: Bench) -> Iterator[Hammered]:
    hammered = Hammered(f"{new_folder()}/missing")
    ended = threading.Event()

    def hammer(method: str, headers: dict[str, str]) -> None:
        with requests.Session() as session:
            while not ended.is_set():
                session.request(method, f"{bench.server.url}/{hammered.key}", headers=headers, timeout=SECONDS)
                hammered.answers.append(None)

    kinds = [("GET", {}), ("HEAD", {}), ("GET", {"Range": "bytes=0-9"}), ("GET", {"If-None-Match": '"x"'})]
    clients = [threading.Thread(target=hammer, args=kind) for kind in kinds * 3]
    for client in clients:
        client.start()
    yield hammered
    ended.set()
    for client in clients:
        client.join()


def questions(bench: Bench, key: str) -> int:
    """How often the backend was asked for a key."""
    return bench.proxy.count(CONTENT, key) + bench.proxy.count(PROPERTIES, key)


def test_missing_keys_cost_the_backend_a_few_requests(bench: Bench, hammered: Hammered) -> None:
    before, started = questions(bench, hammered.key), time.monotonic()
    time.sleep(2 * LIFETIME)
    wait_until(lambda: len(hammered.answers) > 1000, SECONDS, "answers")
    asked, answered = questions(bench, hammered.key) - before, len(hammered.answers)
    # Of all workers, that is.
    lifetimes = len(bench.server.worker_pids()) * ((time.monotonic() - started) / LIFETIME + 1)
    figure("a key that is not there", answers=answered, questions=asked, questions_per_lifetime=asked / lifetimes)
    # Each worker asks once in a lifetime, or twice: a GET does not share the answer that a HEAD waits for.
    # A request that looked a moment before the answer came may ask once more.
    assert 1 <= asked <= min(4 * lifetimes, answered / 2)


def test_simultaneous_requests_share_one_question(bench: Bench) -> None:
    key = f"{new_folder()}/missing"
    rule = bench.proxy.inject(Hold(), kind=PROPERTIES, key=key)
    heads = [in_background(requests.head, f"{bench.server.url}/{key}") for _ in range(30)]
    rule.wait_until_reached()
    time.sleep(0.5)  # for the others to ask
    assert questions(bench, key) <= len(bench.server.worker_pids())
    rule.release()
    assert {head.result().status_code for head in heads} == {404}


def test_an_upload_is_seen_by_all_workers_at_once(bench: Bench, hammered: Hammered) -> None:
    key = hammered.key
    for content in (b"one", b"two"):
        time.sleep(0.3)
        assert put(bench.server, key, content).status_code == 201
        assert [get(bench.server, key).content for _ in range(20)] == [content] * 20
        url = f"{bench.server.url}/{key}"
        assert requests.delete(url, headers=bench.server.headers(), timeout=SECONDS).status_code == 204
        assert [get(bench.server, key).status_code for _ in range(20)] == [404] * 20


def test_an_upload_invalidates_every_workers_entry(bench: Bench) -> None:
    for pid in bench.server.worker_pids():
        key = f"{new_folder()}/later"
        with only(bench.server, pid):
            assert get(bench.server, key).status_code == 404
        assert put(bench.server, key, b"content").status_code == 201
        evict(bench, key)  # what is cached is found without a look into the negative cache
        with only(bench.server, pid):
            assert get(bench.server, key).content == b"content"


def evict(bench: Bench, key: str) -> None:
    """Remove the copy, but not the backend's object."""
    cache = Cache(bench.server.cache_directory)
    with cache.writing(key, SECONDS):
        assert cache.remove(key)


def test_an_upload_by_another_program_is_seen_soon(bench: Bench) -> None:
    key = f"{new_folder()}/later"
    assert from_each_worker(bench.server, lambda: get(bench.server, key).status_code) == [404] * 3
    bench.store(b"content", key)
    time.sleep(LIFETIME)

    def content() -> bytes:
        answer = get(bench.server, key)
        wait_until_tidy(bench.server)  # before this worker stands still
        return answer.content

    assert from_each_worker(bench.server, content) == [b"content"] * 3
