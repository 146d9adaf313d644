# SPDX-License-Identifier: LGPL-2.1-or-later
"""Revalidation of copies: rarely, one check for all requests, and without waiting for a backend that is down."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import requests

from kci_storage.cache.freshness import MAX_WAIT, RETRY_INTERVAL
from tests.support.cold import MIB, Bench, crowd, from_each_worker, in_background, some_bytes
from tests.support.faultproxy import CONTENT, PROPERTIES, Delay, Fault, Hold
from tests.support.harness import wait_until
from tests.support.wire import SECONDS, get, put, wait_until_tidy

PERIOD = 1.0  # seconds
AT_ONCE = 0.8 * MAX_WAIT  # seconds; what does not wait for the backend takes far less
LONG = 60  # seconds; half of the read time-out, for which one would wait that has no patience of its own


@pytest.fixture
def checking(new_bench: Callable[..., Bench]) -> Bench:
    """A server of one worker that checks its copies after :data:`PERIOD`."""
    azure = {"read_timeout": 2 * LONG}
    return new_bench(azure=azure, cache={"revalidate_after": PERIOD}, server={"workers": 1})


def stored_and_cached(bench: Bench, content: bytes) -> str:
    """The key of an object whose copy is due for revalidation."""
    key = bench.store(content)
    assert get(bench.server, key).content == content
    wait_until_tidy(bench.server)
    time.sleep(PERIOD)
    return key


def cache_status(bench: Bench, key: str) -> str:
    return get(bench.server, key).headers["X-Cache"]


def checks(bench: Bench, result: str) -> float:
    return bench.metric("kci_storage_cache_revalidations_total", result=result)


def test_by_default_a_hit_never_asks(bench: Bench) -> None:
    key = bench.store(b"content")
    get(bench.server, key)
    wait_until_tidy(bench.server)
    bench.store(b"another", key)
    asked = len(bench.proxy.requests)
    assert [get(bench.server, key).content for _ in range(10)] == [b"content"] * 10
    assert len(bench.proxy.requests) == asked


def test_one_question_for_all_in_each_period(checking: Bench) -> None:
    content = some_bytes(1000)
    key = stored_and_cached(checking, content)
    checking.proxy.inject(Delay(0.3), kind=PROPERTIES, key=key)
    started = time.monotonic()
    for _ in range(2):
        visits = crowd(checking.server, key, 20, content)
        assert {visit.headers["x-cache"] for visit in visits} == {"hit"}
        assert all(visit.complete for visit in visits)
        time.sleep(PERIOD)
    asked = checking.proxy.count(PROPERTIES, key)
    assert 2 <= asked <= 1 + (time.monotonic() - started) / PERIOD
    assert checks(checking, "fresh") == asked
    assert checking.proxy.count(CONTENT, key) == 1


class AnswersLate(Fault):
    """A backend whose answers arrive a whole period late."""

    def head(self, lines: list[bytes]) -> list[bytes]:
        time.sleep(PERIOD)
        return lines


def test_an_answer_is_as_old_as_its_question(checking: Bench) -> None:
    """Another program may have replaced the object since the backend looked."""
    key = stored_and_cached(checking, b"content")
    checking.proxy.inject(AnswersLate(), kind=PROPERTIES, key=key, times=1)
    assert [cache_status(checking, key) for _ in range(2)] == ["hit", "hit"]
    assert checking.proxy.count(PROPERTIES, key) == 2


def test_a_copy_that_was_just_fetched_or_uploaded_is_fresh_for_every_worker(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(cache={"revalidate_after": 60}, server={"workers": 2})
    key = bench.store(b"content")
    get(bench.server, key)
    wait_until_tidy(bench.server)
    assert from_each_worker(bench.server, lambda: cache_status(bench, key)) == ["hit"] * 2
    assert bench.proxy.count(PROPERTIES, key) == 0
    assert put(bench.server, key, b"new").status_code == 200
    asked = bench.proxy.count(PROPERTIES, key)  # by the upload, which says whether it replaced something
    assert from_each_worker(bench.server, lambda: cache_status(bench, key)) == ["hit"] * 2
    assert bench.proxy.count(PROPERTIES, key) == asked


def test_what_another_program_has_changed_is_fetched(checking: Bench) -> None:
    key = stored_and_cached(checking, b"old")
    checking.store(b"new", key)
    answer = get(checking.server, key)
    assert (answer.content, answer.headers["X-Cache"]) == (b"new", "miss")
    wait_until_tidy(checking.server)
    assert cache_status(checking, key) == "hit"
    assert checks(checking, "changed") == 1


def test_what_another_program_has_deleted_is_gone(checking: Bench) -> None:
    key = stored_and_cached(checking, b"old")
    checking.container.delete_blob(key)
    assert get(checking.server, key).status_code == 404
    assert not list(checking.server.cache_directory.glob("??/*.data"))
    assert checks(checking, "deleted") == 1


def test_with_the_backend_away_copies_are_stale(checking: Bench) -> None:
    content = some_bytes(1000)
    key = stored_and_cached(checking, content)
    checking.proxy.go_away()
    answer = get(checking.server, key)
    assert (answer.content, answer.headers["X-Cache"]) == (content, "stale")
    asked, started = checking.proxy.count(PROPERTIES, key), time.monotonic()
    assert {cache_status(checking, key) for _ in range(20)} == {"stale"}
    now_asked, elapsed = checking.proxy.count(PROPERTIES, key), time.monotonic() - started
    assert now_asked == asked or elapsed > RETRY_INTERVAL - 1, "a backend that is down is not asked again for a while"
    partial = get(checking.server, key, {"Range": "bytes=-10"})
    assert (partial.status_code, partial.content) == (206, content[-10:])
    assert requests.head(f"{checking.server.url}/{key}", timeout=SECONDS).headers["X-Cache"] == "stale"

    def asked_again() -> bool:
        assert cache_status(checking, key) == "stale"
        return checking.proxy.count(PROPERTIES, key) > now_asked

    wait_until(asked_again, RETRY_INTERVAL + SECONDS, "another question")
    assert cache_status(checking, key) == "stale"
    checking.proxy.come_back()
    wait_until(lambda: cache_status(checking, key) == "hit", RETRY_INTERVAL + SECONDS, "the backend's return")
    assert checks(checking, "failed") >= 1


def test_a_silent_backend_delays_no_request_for_long(checking: Bench) -> None:
    content = some_bytes(1000)
    keys = [stored_and_cached(checking, content) for _ in range(2)]
    rule = checking.proxy.inject(Hold(), kind=PROPERTIES)
    started = time.monotonic()
    visits = crowd(checking.server, keys[0], 10, content)
    assert MAX_WAIT - 1 < time.monotonic() - started < LONG
    assert all(visit.complete and visit.headers["x-cache"] == "stale" for visit in visits)
    for key in keys:
        assert min(seconds_of_a_stale_answer(checking, key) for _ in range(5)) < AT_ONCE, "it is known to be silent"
    rule.end()
    wait_until(
        lambda: cache_status(checking, keys[0]) == "hit", RETRY_INTERVAL + SECONDS, "the backend to be noticed"
    )


def seconds_of_a_stale_answer(bench: Bench, key: str) -> float:
    started = time.monotonic()
    assert cache_status(bench, key) == "stale"
    return time.monotonic() - started


def test_a_slow_check_does_not_keep_other_copies_waiting(checking: Bench) -> None:
    slow, quick = stored_and_cached(checking, b"slow"), stored_and_cached(checking, b"quick")
    rule = checking.proxy.inject(Hold(), kind=PROPERTIES, key=slow, times=1)
    waiting = in_background(cache_status, checking, slow)
    rule.wait_until_reached()
    started = time.monotonic()
    assert cache_status(checking, quick) == "hit"
    assert time.monotonic() - started < AT_ONCE
    rule.release()
    assert waiting.result() == "hit"


def test_a_large_copy_that_changes_is_streamed_like_any_cold_object(checking: Bench) -> None:
    old, new = some_bytes(MIB), some_bytes(4 * MIB)
    key = stored_and_cached(checking, old)
    checking.store(new, key)
    visits = crowd(checking.server, key, 10, new)
    assert all(visit.complete for visit in visits)
    assert checking.proxy.body_bytes(CONTENT, key) == len(old) + len(new)
