"""Cold objects while something fails: the backend, a worker, the object itself.

Everybody gets the right bytes, or sees that bytes are missing; and nothing else ever gets into the cache.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

import pytest
import requests

from tests.cold import MIB, Bench, crowd, figure, in_background, some_bytes
from tests.faultproxy import CONTENT, PUT, Cut, Fault, Flip, Hold, Lie, Refuse, Say, Shrink, Stall
from tests.harness import Server, wait_until
from tests.wire import SECONDS, get, put, temporary_files, wait_until_tidy


def cached(bench: Bench, key: str) -> bool:
    """Whether a copy is there, once all is quiet."""
    wait_until_tidy(bench.server)
    answer = requests.get(f"{bench.server.url}/{key}", headers={"Range": "bytes=0-0"}, timeout=SECONDS)
    return answer.headers.get("X-Cache") == "hit"


# The backend


def test_the_backend_dies_once_and_all_are_served(bench: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    bench.proxy.bandwidth = 32 * MIB
    visits = in_background(crowd, bench.server, key, 50, content)
    wait_until(lambda: bench.fetched(key) > len(content) / 2, SECONDS, "half of it")
    bench.proxy.go_away()
    time.sleep(3)  # for longer than the driver tries again by itself
    bench.proxy.come_back()
    complete = sum(visit.complete for visit in visits.result())
    deceived = sum(visit.deceived for visit in visits.result())
    figure(
        "50 clients, the backend dies for three seconds at half way",
        complete=complete,
        silently_short=deceived,
        fetches=bench.fetched(key) / len(content),
    )
    assert (complete, deceived) == (50, 0)
    assert cached(bench, key)


FAULTS = [
    Cut(0),
    Cut(100_000),
    Cut(100_000, reset=True),
    Lie(1000),
    Lie(-1000),
    Shrink(1000),
    Refuse(),
    Say(500, "InternalError"),
    Say(503, "ServerBusy"),
    Say(500, "OperationTimedOut"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_what_fails_in_the_middle_is_taken_up_where_it_stands(bench: Bench, fault: Fault) -> None:
    content = some_bytes(20 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(fault, key=key, skip=1, times=2)
    visits = crowd(bench.server, key, 6, content)
    assert all(visit.complete for visit in visits)
    assert rule.hits == 2
    assert cached(bench, key)
    assert bench.fetched(key) <= len(content) + 2 * 8 * MIB, "what has come is not asked for again"


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_what_fails_at_once_is_served_or_an_error(bench: Bench, fault: Fault) -> None:
    content = some_bytes(2 * MIB)
    key = bench.store(content)
    bench.proxy.inject(fault, key=key, times=1)
    visits = crowd(bench.server, key, 6, content)
    assert not any(visit.deceived for visit in visits)
    assert all(visit.complete or visit.status >= 500 for visit in visits)
    assert get(bench.server, key).content == content


@pytest.mark.parametrize(
    ("fault", "status"),
    [(Refuse(), 502), (Say(500, "InternalError"), 502), (Say(503, "ServerBusy"), 503), (Cut(0), 502)],
    ids=repr,
)
def test_a_backend_that_always_fails_is_an_error(bench: Bench, fault: Fault, status: int) -> None:
    content = some_bytes(MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(fault, kind=None, key=key)
    for headers in ({}, {"Range": "bytes=5-9"}, {"If-None-Match": '"x"'}):
        answer = get(bench.server, key, headers)
        assert answer.status_code in ((status,) if not headers else (status, 206, 200))
        assert ("Retry-After" in answer.headers) == (answer.status_code == 503)
    rule.end()
    assert get(bench.server, key).content == content


@pytest.mark.timeout(120)
def test_a_stalled_read_is_begun_again(bench: Bench) -> None:
    content = some_bytes(4 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(MIB), key=key, times=1)
    visits = crowd(bench.server, key, 6, content)  # for the driver's read time-out of 20 seconds
    assert all(visit.complete for visit in visits)
    assert bench.fetched(key) < len(content) + MIB / 2
    rule.release()
    assert cached(bench, key)


@pytest.mark.parametrize("offset", [10, 9 * MIB, 10 * MIB - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("digest", ["sha256", "md5"])
def test_a_damaged_object_is_never_finished_and_never_cached(bench: Bench, digest: str, offset: int) -> None:
    content = some_bytes(10 * MIB)
    key = bench.store(content, digest=digest)
    bench.proxy.bandwidth = 16 * MIB  # so slow that everybody waits for the last piece
    rule = bench.proxy.inject(Flip(offset), key=key)
    visits = crowd(bench.server, key, 6, content)
    assert not any(visit.complete for visit in visits)
    assert all(visit.received < len(content) for visit in visits)
    assert not cached(bench, key)
    rule.end()
    assert get(bench.server, key).content == content
    assert cached(bench, key)


def test_a_damaged_object_that_passes_the_cache_is_never_finished(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(cache={"max_bytes": MIB})
    content = some_bytes(4 * MIB)
    key = bench.store(content)
    bench.proxy.inject(Flip(2 * MIB), key=key)
    [visit] = crowd(bench.server, key, 1, content)
    assert not visit.complete and visit.received < len(content)


def test_with_the_backend_away_copies_are_served_and_nothing_else(bench: Bench) -> None:
    content = some_bytes(MIB)
    key, cold = bench.store(content), bench.store(content)
    get(bench.server, key)
    assert cached(bench, key)
    bench.proxy.go_away()
    assert get(bench.server, key).content == content
    assert get(bench.server, cold).status_code == 502
    bench.proxy.come_back()
    assert get(bench.server, cold).content == content


# The object


def test_a_version_that_is_gone_cuts_those_who_have_some_of_it(bench: Bench) -> None:
    old, new = some_bytes(32 * MIB), some_bytes(5 * MIB)
    key = bench.store(old)
    rule = bench.proxy.inject(Stall(MIB), key=key, times=1)
    visits = in_background(crowd, bench.server, key, 6, old)
    rule.wait_until_reached()
    bench.store(new, key)
    rule.release()
    assert all(visit.correct and visit.received < len(old) for visit in visits.result())
    assert get(bench.server, key).content == new
    assert cached(bench, key)


def test_a_refused_condition_in_the_middle_cuts_too(bench: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Say(412, "ConditionNotMet"), key=key, skip=2)
    visits = crowd(bench.server, key, 6, content)
    assert not any(visit.complete or visit.deceived for visit in visits)
    rule.end()
    assert get(bench.server, key).content == content


@pytest.mark.parametrize("size", [4 * MIB, 32 * MIB], ids=["it is all on its way", "it is not"])
def test_an_upload_during_a_fill(bench: Bench, size: int) -> None:
    old, new = some_bytes(size), some_bytes(5 * MIB)
    key = bench.store(old)
    rule = bench.proxy.inject(Stall(MIB), key=key, times=1)
    visits = in_background(crowd, bench.server, key, 6, old)
    rule.wait_until_reached()
    assert put(bench.server, key, new).status_code == 200
    for _ in range(12):
        answer = get(bench.server, key)
        assert (answer.content == new, answer.headers["X-Cache"]) == (True, "hit")
    rule.release()
    assert all(visit.correct for visit in visits.result())
    if size == 4 * MIB:
        assert all(visit.complete for visit in visits.result())
    wait_until_tidy(bench.server)
    assert get(bench.server, key).content == new


def test_a_deletion_during_a_fill(bench: Bench) -> None:
    old = some_bytes(4 * MIB)
    key = bench.store(old)
    rule = bench.proxy.inject(Stall(MIB), key=key, times=1)
    visits = in_background(crowd, bench.server, key, 6, old)
    rule.wait_until_reached()
    url = f"{bench.server.url}/{key}"
    assert requests.delete(url, headers=bench.server.headers(), timeout=SECONDS).status_code == 204
    assert [get(bench.server, key).status_code for _ in range(12)] == [404] * 12
    rule.release()
    assert all(visit.complete for visit in visits.result()), "those who had some of it get the rest"
    wait_until_tidy(bench.server)
    assert get(bench.server, key).status_code == 404


def test_a_fill_that_has_no_answer_yet_is_revoked_too(bench: Bench) -> None:
    """The backend answered it before the deletion, and the answer is still on its way."""
    key = bench.store(some_bytes(MIB))
    rule = bench.proxy.inject(Stall(0), key=key, times=1)
    early = in_background(get, bench.server, key)
    rule.wait_until_reached()
    url = f"{bench.server.url}/{key}"
    assert requests.delete(url, headers=bench.server.headers(), timeout=SECONDS).status_code == 204
    answers = [in_background(get, bench.server, key) for _ in range(12)]
    assert [answer.result().status_code for answer in answers] == [404] * 12
    rule.release()
    early.result()


def test_a_cold_object_that_is_being_uploaded_is_waited_for(bench: Bench) -> None:
    old, new = some_bytes(MIB), some_bytes(MIB)
    key = bench.store(old)
    rule = bench.proxy.inject(Hold(), kind=PUT, key=key, times=1)
    upload = in_background(put, bench.server, key, new)
    rule.wait_until_reached()
    waiting = in_background(get, bench.server, key)
    time.sleep(0.2)
    assert not waiting.done()
    rule.release()
    assert upload.result().status_code == 200
    assert waiting.result().content == new
    assert bench.fetched(key) == 0


# The workers


def filler_of(server: Server) -> int:
    """The worker that holds the lock of the only fill."""
    [claim] = server.cache_directory.glob("??/*.fill")
    inode = claim.stat().st_ino
    with open("/proc/locks") as locks:
        return next(int(line.split()[4]) for line in locks if line.split()[5].endswith(f":{inode}"))


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.expected_errors("was sent SIGKILL")
def test_a_filler_that_dies_is_replaced_where_it_stands(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench()
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(5 * MIB), key=key, times=1, skip=1)
    anywhere = in_background(crowd, bench.server, key, 9, content)
    rule.wait_until_reached()
    [part] = bench.server.cache_directory.glob("??/*.part")
    wait_until(lambda: part.stat().st_size >= 12 * MIB, SECONDS, "what has come")
    filler = filler_of(bench.server)
    os.kill(filler, signal.SIGSTOP)  # so that who comes now is served by another worker
    url = f"{bench.server.url}/{key}"
    elsewhere = [requests.get(url, stream=True, timeout=SECONDS) for _ in range(9)]
    arrived, before = part.stat().st_size, len(bench.proxy.requests)
    kill(filler)
    rule.release()
    assert [answer.content == content for answer in elsewhere] == [True] * 9
    cut = [visit for visit in anywhere.result() if not visit.complete]
    assert all(visit.correct and visit.received < len(content) for visit in cut)
    asked_since = [each for each in bench.proxy.requests[before:] if each.kind == CONTENT and each.key == key]
    assert min(each.start for each in asked_since) >= arrived
    figure(
        "a filler of 32 MiB is killed at 13 MiB",
        complete=len(elsewhere) + 9 - len(cut),
        cut_with_its_worker=len(cut),
        asked_for_again_MiB=sum(each.body_bytes for each in asked_since) / MIB,
    )
    assert cached(bench, key)


@pytest.mark.timeout(240)
@pytest.mark.expected_errors("was sent SIGKILL")
def test_workers_that_are_killed_at_any_point(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench()
    bench.proxy.bandwidth = 24 * MIB
    chance = random.Random(20)
    wrong = 0
    for _ in range(20):
        cold, old, new = some_bytes(6 * MIB), some_bytes(1000), some_bytes(6 * MIB)
        key, uploaded = bench.store(cold), bench.store(old)
        visits = in_background(crowd, bench.server, key, 6, cold)
        upload = in_background(put_quietly, bench.server, uploaded, new)
        time.sleep(chance.uniform(0, 0.6))
        kill(chance.choice(bench.server.worker_pids()))
        wrong += sum(visit.deceived or not visit.correct for visit in visits.result())
        assert get_patiently(bench.server, key) == cold
        now = get_patiently(bench.server, uploaded)
        assert now == new if upload.result() else now in (old, new)
    bench.server.restart()
    wait_until_tidy(bench.server)
    figure("workers killed at 20 points", wrong_bytes=wrong, temporary_files=len(temporary_files(bench.server)))
    assert wrong == 0


def put_quietly(server: Server, key: str, content: bytes) -> bool:
    """Upload; whether that was acknowledged."""
    with contextlib.suppress(requests.ConnectionError):
        return put(server, key, content).status_code in (200, 201)
    return False


def get_patiently(server: Server, key: str) -> bytes:
    """Download, from a worker that lives."""

    def content() -> bytes | None:
        with contextlib.suppress(requests.RequestException):
            answer = get(server, key)
            if answer.status_code == 200 and len(answer.content) == int(answer.headers["Content-Length"]):
                return answer.content
        return None

    return wait_until(content, 60, "a download")
