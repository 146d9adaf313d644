# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cold objects while something fails: the backend, a worker, the object itself.

Each client gets the right bytes, or can tell that bytes are missing; and only right bytes get into the cache.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import requests

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import new_record
from kci_storage.config.settings import AzureConfig
from kci_storage.drivers.azure.driver import AzureDriver
from kci_storage.drivers.base import ObjectInfo
from kci_storage.drivers.local.driver import LocalDriver
from kci_storage.errors import BackendError, CorruptObject
from kci_storage.fills import resuming
from kci_storage.fills.claim import Claim
from kci_storage.fills.fill import Fill, FillLost
from kci_storage.fills.filler import Filler
from kci_storage.fills.fills import Fills
from kci_storage.monitoring.metrics import Metrics
from tests.support.azurite import Azurite
from tests.support.cold import (
    MIB,
    Bench,
    Visit,
    begun_crowd,
    cold_bench,
    crowd,
    figure,
    from_each_worker,
    frozen,
    in_background,
    some_bytes,
)
from tests.support.faultproxy import (
    CONTENT,
    PUT,
    Cut,
    Fault,
    Flip,
    Hold,
    Lie,
    LieOfAll,
    Refuse,
    Say,
    Shrink,
    Stall,
)
from tests.support.harness import START_SECONDS, Server, wait_until
from tests.support.wire import SECONDS, Wire, get, new_folder, put, request, temporary_files, wait_until_tidy

READ_TIMEOUT = 4  # seconds; of a server whose backend stalls; else it answers sooner, on a busy machine too
DEFAULT_READ_TIMEOUT = AzureConfig().read_timeout


def cached(bench: Bench, key: str) -> bool:
    """Whether there is a copy, once no fill runs."""
    wait_until_tidy(bench.server)
    answer = requests.get(f"{bench.server.url}/{key}", headers={"Range": "bytes=0-0"}, timeout=SECONDS)
    return answer.headers.get("X-Cache") == "hit"


def got_from_each_worker(bench: Bench, key: str) -> list[requests.Response]:
    return from_each_worker(bench.server, lambda: get(bench.server, key))


# The backend


def test_the_backend_dies_once_and_all_are_served(bench: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    bench.proxy.bandwidth = 32 * MIB
    half = bench.proxy.inject(Stall(16 * MIB), key=key)
    visits = in_background(crowd, bench.server, key, 50, content)
    half.wait_until_reached()
    bench.proxy.go_away()
    half.end()
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
def test_a_read_that_fails_in_the_middle_is_resumed_there(bench: Bench, fault: Fault) -> None:
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


@pytest.fixture
def impatient(new_bench: Callable[..., Bench]) -> Bench:
    """A server that does not wait for long for the next byte."""
    return new_bench(azure={"read_timeout": READ_TIMEOUT})


def test_a_stalled_read_is_taken_up_where_it_stands(impatient: Bench) -> None:
    content = some_bytes(4 * MIB)
    key = impatient.store(content)
    rule = impatient.proxy.inject(Stall(MIB), key=key, times=2)
    visits = crowd(impatient.server, key, 6, content)
    assert all(visit.complete for visit in visits)
    assert all(2 * READ_TIMEOUT < visit.seconds < 2 * DEFAULT_READ_TIMEOUT for visit in visits)
    assert rule.hits == 2
    assert impatient.fetched(key) < len(content) + MIB / 2
    rule.end()
    assert cached(impatient, key)


def test_a_stall_far_in_is_taken_up_too(impatient: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = impatient.store(content)
    rule = impatient.proxy.inject(Stall(20 * MIB), key=key, times=1)
    assert all(visit.complete for visit in crowd(impatient.server, key, 6, content))
    rule.end()
    assert cached(impatient, key)


def test_a_backend_that_is_silent_from_the_beginning_is_an_error(impatient: Bench) -> None:
    content = some_bytes(MIB)
    key = impatient.store(content)
    rule = impatient.proxy.inject(Hold(), kind=None, key=key)
    for headers in ({}, {"Range": "bytes=5-9"}):
        answer = get(impatient.server, key, headers)
        assert (answer.status_code, "X-Cache" in answer.headers) == (504, False)
    rule.end()
    assert get(impatient.server, key).content == content


@pytest.mark.parametrize("fault", [Cut(100_000), Lie(1000), Refuse(), Say(503, "ServerBusy")], ids=repr)
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=9000000-"}], ids=["whole", "range"])
def test_an_uncached_read_is_resumed_too(uncached_bench: Bench, fault: Fault, headers: dict[str, str]) -> None:
    content = some_bytes(40 * MIB)
    key = uncached_bench.store(content)
    rule = uncached_bench.proxy.inject(fault, key=key, skip=2, times=1)
    answer = get(uncached_bench.server, key, headers)
    assert answer.content == content[9_000_000 if headers else 0 :]
    assert rule.hits == 1


@pytest.fixture(scope="module")
def uncached_bench(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server whose cache is too small for anything here."""
    with cold_bench(azurite, tmp_path_factory.mktemp("uncached"), {"cache": {"max_bytes": MIB}}) as bench:
        yield bench


@pytest.mark.parametrize(("fault", "size"), [(LieOfAll(1000), MIB), (LieOfAll(-1000), 10 * MIB)], ids=repr)
def test_a_wrong_length_of_the_object_is_never_cached(bench: Bench, fault: Fault, size: int) -> None:
    content = some_bytes(size)
    key = bench.store(content)
    rule = bench.proxy.inject(fault, key=key)
    visits = crowd(bench.server, key, 6, content)
    assert not any(visit.complete or visit.deceived for visit in visits)
    assert not cached(bench, key)
    rule.end()
    assert get(bench.server, key).content == content


def test_a_wrong_length_is_noticed_at_once(bench: Bench) -> None:
    """Rather than after the read was resumed until the timeout."""
    content = some_bytes(18 * MIB)  # so that the last of several ranges shows it
    key = bench.store(content)
    bench.proxy.inject(LieOfAll(1000), key=key)
    [visit] = crowd(bench.server, key, 1, content)
    assert not visit.complete and not visit.deceived
    assert bench.proxy.count(CONTENT, key) <= 3


def test_the_last_piece_waits_for_the_digest(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All followers read what a fill has appended: the end of a damaged object must not be appended."""
    content = some_bytes(3 * MIB)
    key = bench.store(content)
    lengths: list[int] = []
    advance = Fill.advance
    monkeypatch.setattr(Fill, "advance", lambda fill, length: (lengths.append(length), advance(fill, length)))
    cache = Cache(tmp_path)
    with contextlib.closing(AzureDriver(AzureConfig(**bench.server.document["azure"]))) as driver:
        bench.proxy.inject(Flip(MIB), key=key)
        fills = Fills(driver, cache, Metrics(cache, []), lambda size: True, at_once=1, queue_size=1)
        fill = fills.join(key)
        with pytest.raises(CorruptObject):
            list(fill.read(0, len(content)))
        fill.leave()
        fills.stop()
    assert MIB < max(lengths) < len(content)
    assert cache.check() == []


def test_a_new_filler_checks_that_its_followers_read_this_part(tmp_path: Path) -> None:
    """Their filler died; another one began from the start, and died as well."""
    cache = Cache(tmp_path)
    fills = Fills(LocalDriver(tmp_path / "store"), cache, Metrics(cache, []), bool, at_once=1, queue_size=1)
    fill = Fill("key", cache.location("key"))
    old, new = (new_record(ObjectInfo("key", 7, "etag", 0)) for _ in range(2))
    with cache.new_part("key", old.generation) as part:
        fill.open(part.path)
        fill.begin(old.info)
    left = cache.new_part("key", new.generation)
    left.write(b"con")
    left.close()
    with Claim.at(fill.location) as claim:
        assert claim.try_lock()
        claim.write(new)
        with pytest.raises(FillLost):
            Filler(fills._parts, fill, claim).run()
    fill.end(None)
    assert cache.check() == []


def test_an_interrupted_read_ends_after_the_timeout(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before: the clients of a server that is not patched would wait for a minute."""
    monkeypatch.setattr(resuming, "RESUME_TIMEOUT", 8.0)
    key = bench.store(some_bytes(MIB))
    with contextlib.closing(AzureDriver(AzureConfig(**bench.server.document["azure"]))) as driver:
        rule = bench.proxy.inject(Stall(1000), key=key)
        info = driver.stat(key)
        started = time.monotonic()  # a moment before the last byte comes
        reading = in_background(list, resuming.resumed(driver, info, 0, info.size))
        rule.wait_until_reached()
        bench.proxy.go_away()
        with pytest.raises(BackendError):
            reading.result(SECONDS)
        assert time.monotonic() - started > 6, "the driver alone gives up after half of that"


@pytest.mark.parametrize("offset", [10, 9 * MIB, 10 * MIB - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("digest", ["sha256", "md5"])
def test_a_damaged_object_is_never_finished_and_never_cached(bench: Bench, digest: str, offset: int) -> None:
    content = some_bytes(10 * MIB)
    key = bench.store(content, digest=digest)
    bench.proxy.bandwidth = 16 * MIB  # so slow that all followers wait for the last piece
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


@pytest.mark.parametrize("change", ["overwrite", "delete"])
def test_the_end_of_a_version_aborts_responses_that_have_begun(bench: Bench, change: str) -> None:
    old, new = some_bytes(64 * MIB), some_bytes(5 * MIB)
    key = bench.store(old)
    rule = bench.proxy.inject(Stall(MIB), key=key, times=1)
    visits = begun_crowd(bench.server, key, 6, old)
    bench.store(new, key) if change == "overwrite" else bench.container.delete_blob(key)
    rule.release()
    assert all(visit.correct and visit.received < len(old) for visit in visits.result())
    answer = get(bench.server, key)
    if change == "delete":
        assert answer.status_code == 404
        assert not temporary_files(bench.server)
    else:
        assert answer.content == new
        assert cached(bench, key)


def test_a_refused_condition_in_the_middle_cuts_too(bench: Bench) -> None:
    content = some_bytes(48 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Say(412, "ConditionNotMet"), key=key, skip=1)
    visits = crowd(bench.server, key, 6, content)
    assert not any(visit.complete or visit.deceived for visit in visits)
    rule.end()
    assert get(bench.server, key).content == content


@pytest.mark.parametrize("size", [4 * MIB, 32 * MIB], ids=["it is all on its way", "it is not"])
def test_an_upload_during_a_fill(bench: Bench, size: int) -> None:
    old, new = some_bytes(size), some_bytes(5 * MIB)
    key = bench.store(old)
    rule = bench.proxy.inject(Stall(MIB), key=key, times=1)
    visits = begun_crowd(bench.server, key, 6, old)
    assert put(bench.server, key, new).status_code == 200
    for answer in got_from_each_worker(bench, key):
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
    visits = begun_crowd(bench.server, key, 6, old)
    url = f"{bench.server.url}/{key}"
    assert requests.delete(url, headers=bench.server.headers(), timeout=SECONDS).status_code == 204
    assert [answer.status_code for answer in got_from_each_worker(bench, key)] == [404] * 3
    rule.release()
    assert all(visit.complete for visit in visits.result()), "clients that had some of it get the rest"
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
    assert [answer.status_code for answer in got_from_each_worker(bench, key)] == [404] * 3
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


@pytest.mark.expected_errors("was sent SIGKILL")
def test_a_filler_that_dies_is_replaced_where_it_stands(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench()
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(13 * MIB), key=key, times=1)
    with_it = begun_crowd(bench.server, key, 9, content)
    bench.wait_for(key, 13 * MIB)
    filler = bench.filler(key)
    with frozen(filler):
        elsewhere = begun_crowd(bench.server, key, 9, content)
        arrived, before = bench.arrived(key), len(bench.proxy.requests)
        os.kill(filler, signal.SIGKILL)
    rule.release()
    assert all(visit.complete for visit in elsewhere.result())
    cut = [visit for visit in with_it.result() if not visit.complete]
    assert all(visit.correct and visit.received < len(content) for visit in cut)
    asked_since = [each for each in bench.proxy.requests[before:] if each.kind == CONTENT and each.key == key]
    assert min(each.start for each in asked_since) >= arrived
    figure(
        "a filler of 32 MiB is killed at 13 MiB",
        clients_elsewhere_complete=len(elsewhere.result()),
        cut_with_its_worker=len(cut),
        asked_for_again_MiB=sum(each.body_bytes for each in asked_since) / MIB,
    )
    assert cached(bench, key)
    wait_until(lambda: len(bench.server.worker_pids()) == 3, START_SECONDS, "a successor")
    # gunicorn loses a SIGTERM that comes just when a worker starts: the server would not stop for long.
    from_each_worker(bench.server, lambda: get(bench.server, "v1/health"))


@pytest.mark.timeout(300)
@pytest.mark.expected_errors("was sent SIGKILL")
def test_workers_that_are_killed_at_any_point(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench()
    chance = random.Random(20)
    killed = [kill_a_filler(bench, chance.randrange(6 * MIB), clients=1 + 5 * (number % 2)) for number in range(10)]
    visits = [visit for _, _, coming in killed for visit in coming.result()]
    stored = [kill_an_uploader(bench.server, chance.random()) for _ in range(10)]
    bench.server.kill()
    bench.server.start()
    wait_until_tidy(bench.server)
    wrong = sum(visit.deceived or not visit.correct for visit in visits)
    left = temporary_files(bench.server)
    figure("workers killed at 20 random points", wrong_answers=wrong, temporary_files=len(left))
    assert (wrong, left) == (0, [])
    for key, content in [*((key, content) for key, content, _ in killed), *stored]:
        assert get(bench.server, key).content == content


def kill_a_filler(bench: Bench, position: int, clients: int) -> tuple[str, bytes, Future[list[Visit]]]:
    """Kill the worker that fetches an object after a number of bytes; the object, and what the clients get.

    With a single client, which dies with its worker, no other process resumes the fill, and its files are left.
    """
    content = some_bytes(6 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(position), key=key, times=1)
    visits = in_background(crowd, bench.server, key, clients, content)
    rule.wait_until_reached()
    bench.wait_for(key, position)
    os.kill(bench.filler(key), signal.SIGKILL)
    rule.release()
    return key, content, visits


def kill_an_uploader(server: Server, share: float) -> tuple[str, bytes]:
    """Kill the worker that stores an object after a share of its bytes; what must be stored then."""
    key, old, new = f"{new_folder()}/file.bin", some_bytes(1000), some_bytes(10 * MIB)
    wait_until(lambda: put_quietly(server, key, old), 60, "an upload, to a worker that lives")
    cache = Cache(server.cache_directory)
    with Wire(server) as wire:
        data = request("PUT", f"/{key}", server.headers(), new)
        wire.send(data[: max(int(share * len(data)), 4096)])
        lock = cache.locks.directory / cache.location(key).digest
        [uploader] = wait_until(lambda: server.holders(lock), SECONDS, "the upload")
        os.kill(uploader, signal.SIGKILL)
    return key, old


def put_quietly(server: Server, key: str, content: bytes) -> bool:
    """Upload; whether the server acknowledged it."""
    with contextlib.suppress(requests.ConnectionError):
        return put(server, key, content).status_code in (200, 201)
    return False
