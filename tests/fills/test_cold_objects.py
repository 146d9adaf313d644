# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cold objects while nothing fails: all clients get them from one fetch, even if others are slow or disconnect.

The figures in docs/reliability.md are what these tests and those of ``test_cold_faults.py`` print (``pytest -s``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from email.parser import BytesParser
from pathlib import Path

import psutil
import pytest
import requests

from tests.support.azurite import Azurite
from tests.support.cold import (
    MIB,
    Bench,
    beginning,
    begun_crowd,
    cold_bench,
    crowd,
    figure,
    from_each_worker,
    in_background,
    median_first_byte,
    some_bytes,
)
from tests.support.disks import fill_up, small_disk, use_up_inodes
from tests.support.faultproxy import CONTENT, PROPERTIES, Flip, Stall
from tests.support.harness import wait_until
from tests.support.wire import SECONDS, Wire, get, new_folder, put, request, temporary_files, wait_until_tidy

# Streaming, and one fetch


def test_fifty_clients_get_a_cold_object_from_one_fetch(bench: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    bench.proxy.bandwidth = 32 * MIB
    rule = bench.proxy.inject(Stall(4 * MIB), key=key)
    coming = begun_crowd(bench.server, key, 50, content)
    rule.release()
    visits = coming.result()
    assert [visit for visit in visits if not visit.complete] == []
    assert bench.fetched(key) == len(content)
    assert {visit.headers["x-cache"] for visit in visits} == {"miss"}
    figure(
        "50 clients, one cold object of 32 MiB at 32 MiB/s, 3 workers",
        fetches=bench.fetched(key) / len(content),
        seconds_to_the_median_first_byte=median_first_byte(visits),
        seconds_to_the_last_end=max(visit.seconds for visit in visits),
    )
    wait_until_tidy(bench.server)
    assert get(bench.server, key).headers["X-Cache"] == "hit"
    assert bench.fetched(key) == len(content)


def test_followers_in_every_worker_share_the_fetch(bench: Bench) -> None:
    content = some_bytes(20 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(2 * MIB), key=key)
    crowds = from_each_worker(bench.server, lambda: begun_crowd(bench.server, key, 4, content))
    rule.release()
    visits = [visit for coming in crowds for visit in coming.result()]
    assert (len(visits), sum(visit.complete for visit in visits)) == (12, 12)
    assert bench.fetched(key) == len(content)


def test_a_fill_has_several_reads_of_one_version_in_flight(bench: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(MIB), key=key)
    with beginning(bench, key) as wire:
        rule.wait_until_reached()
        wait_until(lambda: bench.proxy.count(CONTENT, key) > 1, SECONDS, "another read")
        rule.release()
        assert wire.read(len(content) - 1) == content[1:]
    etag = requests.head(f"{bench.server.url}/{key}", timeout=SECONDS).headers["ETag"]
    first, *others = [each for each in bench.proxy.requests if each.kind == CONTENT and each.key == key]
    assert (first.start, first.if_match) == (0, None)
    assert {each.if_match for each in others} == {etag}
    assert bench.fetched(key) == len(content)


def test_the_first_bytes_leave_before_the_others_have_come(bench: Bench) -> None:
    content = some_bytes(4 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(MIB), key=key)
    with beginning(bench, key, MIB // 2) as wire:
        rule.wait_until_reached()
        rule.release()
        assert wire.read(len(content) - MIB // 2) == content[MIB // 2 :]


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 8 * MIB + 1], ids=["empty", "a byte", "a range", "a byte more"])
def test_every_size(bench: Bench, size: int) -> None:
    content = some_bytes(size)
    key = bench.store(content)
    assert [get(bench.server, key).content == content for _ in range(5)] == [True] * 5
    wait_until_tidy(bench.server)
    assert get(bench.server, key).headers["X-Cache"] == "hit"


@pytest.mark.parametrize("digest", ["sha256", "md5", "none"])
def test_objects_that_other_programs_have_stored(bench: Bench, digest: str) -> None:
    content = some_bytes(3 * MIB)
    key = bench.store(content, digest=digest)
    assert get(bench.server, key).content == content
    wait_until_tidy(bench.server)
    answer = get(bench.server, key)
    assert (answer.content, answer.headers["X-Cache"]) == (content, "hit")


# Clients that are slow, or leave


def test_a_slow_client_slows_nobody(bench: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    with Wire(bench.server, receive_buffer=64 * 1024) as slow:
        slow.send(request("GET", f"/{key}"))
        assert slow.head().status == 200
        visits = crowd(bench.server, key, 5, content)
        assert all(visit.complete for visit in visits)
        wait_until_tidy(bench.server)
        assert get(bench.server, key).headers["X-Cache"] == "hit"
        assert slow.read(len(content)) == content
    assert bench.fetched(key) == len(content)


def test_clients_that_leave_stop_nothing(bench: Bench) -> None:
    content = some_bytes(16 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(2 * MIB), key=key)
    first = beginning(bench, key)
    staying = in_background(crowd, bench.server, key, 4, content)
    rule.wait_until_reached()
    first.reset()
    beginning(bench, key).reset()
    rule.release()
    assert all(visit.complete for visit in staying.result())
    wait_until_tidy(bench.server)
    assert get(bench.server, key).headers["X-Cache"] == "hit"
    assert bench.fetched(key) == len(content)


def test_a_copy_is_made_even_if_every_client_disconnects(bench: Bench) -> None:
    content = some_bytes(16 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(2 * MIB), key=key)
    beginning(bench, key).reset()
    rule.wait_until_reached()
    rule.release()
    wait_until_tidy(bench.server)
    answer = get(bench.server, key)
    assert (answer.content == content, answer.headers["X-Cache"]) == (True, "hit")
    assert bench.fetched(key) == len(content)


def test_part_and_claim_become_the_copy(bench: Bench) -> None:
    """No other file is created or deleted, since both are expensive on ext4."""
    content = some_bytes(4 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(MIB), key=key)
    beginning(bench, key).reset()
    rule.wait_until_reached()
    bench.wait_for(key, 1)
    before = files(bench, key)
    rule.release()
    wait_until_tidy(bench.server)
    after = files(bench, key)
    assert set(before) == {".fill", ".part"} and set(after) == {".json", ".data"}
    assert (before[".fill"], before[".part"]) == (after[".json"], after[".data"])


def files(bench: Bench, key: str) -> dict[str, int]:
    """The inodes of a key's files in the cache, by suffix."""
    digest = hashlib.sha512(key.encode()).hexdigest()
    return {path.suffix: path.stat().st_ino for path in bench.server.cache_directory.glob(f"??/{digest}.*")}


def test_a_server_that_stops_leaves_nothing_of_a_fill(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench()
    bench.proxy.bandwidth = MIB
    key = bench.store(some_bytes(32 * MIB))
    beginning(bench, key).reset()
    assert temporary_files(bench.server)
    bench.server.stop()
    assert not temporary_files(bench.server)
    bench.server.start()


# Only what is needed


def test_head_asks_for_properties_only(bench: Bench) -> None:
    key = bench.store(some_bytes(MIB))
    answer = requests.head(f"{bench.server.url}/{key}", timeout=SECONDS)
    assert (answer.status_code, answer.headers["Content-Length"]) == (200, str(MIB))
    assert (bench.proxy.count(PROPERTIES, key), bench.proxy.count(CONTENT, key)) == (1, 0)
    figure("HEAD on a cold object", content_bytes=bench.fetched(key))


def test_the_last_bytes_come_at_once_and_alone(bench: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    bench.proxy.bandwidth = 8 * MIB
    started = time.monotonic()
    answer = get(bench.server, key, {"Range": "bytes=-100"})
    seconds = time.monotonic() - started
    assert (answer.status_code, answer.content) == (206, content[-100:])
    assert bench.fetched(key) == 100
    figure("last 100 bytes of a cold object of 32 MiB at 8 MiB/s", seconds=seconds, content_bytes=bench.fetched(key))


def test_a_crawler_of_ends_starts_no_fill(bench: Bench) -> None:
    content = some_bytes(4 * MIB)
    keys = [bench.store(content) for _ in range(20)]
    wait_until_tidy(bench.server)
    fills = bench.metric("kci_storage_fills_total", result="ok")
    for key in keys:
        assert get(bench.server, key, {"Range": "bytes=-1024"}).content == content[-1024:]
    wait_until_tidy(bench.server)
    fetched = sum(bench.fetched(key) for key in keys)
    assert (fetched, bench.metric("kci_storage_fills_total", result="ok")) == (20 * 1024, fills)
    figure("the last KiB of each of 20 cold objects of 4 MiB", content_bytes=fetched, fills=0)


def test_a_validator_that_still_holds_costs_no_content(bench: Bench) -> None:
    content = some_bytes(MIB)
    key = bench.store(content)
    etag = requests.head(f"{bench.server.url}/{key}", timeout=SECONDS).headers["ETag"]
    assert get(bench.server, key, {"If-None-Match": etag}).status_code == 304
    assert get(bench.server, key, {"If-Match": '"another"'}).status_code == 412
    assert get(bench.server, key, {"Range": f"bytes={MIB}-"}).status_code == 416
    assert bench.fetched(key) == 0


@pytest.mark.parametrize(
    "headers", [{"If-None-Match": '"another"'}, {"Range": "bytes=0-"}, {"Range": "bytes=1000-"}], ids=str
)
def test_a_range_of_most_of_it_begins_a_fill(bench: Bench, headers: dict[str, str]) -> None:
    content = some_bytes(3 * MIB)
    key = bench.store(content)
    start = int(headers.get("Range", "bytes=0-")[6:-1])
    assert get(bench.server, key, headers).content == content[start:]
    wait_until_tidy(bench.server)
    assert get(bench.server, key).headers["X-Cache"] == "hit"
    assert bench.fetched(key) == len(content)


def test_a_large_range_from_far_ahead_does_not_wait_for_the_fill(bench: Bench) -> None:
    content = some_bytes(8 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(0), key=key, times=1)
    beginning_of_fill = in_background(get, bench.server, key)
    rule.wait_until_reached()
    assert get(bench.server, key, {"Range": f"bytes={3 * MIB}-"}).content == content[3 * MIB :]
    rule.release()
    assert beginning_of_fill.result().content == content


def test_some_ranges_cost_their_bytes(bench: Bench) -> None:
    content = some_bytes(8 * MIB)
    key = bench.store(content)
    answer = get(bench.server, key, {"Range": "bytes=10-19,5000000-5000009"})
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    parts = [part.get_payload(decode=True) for part in BytesParser().parsebytes(head + answer.content).get_payload()]
    assert parts == [content[10:20], content[5_000_000:5_000_010]]
    assert bench.fetched(key) == 20


def test_ranges_of_what_has_arrived_ask_for_nothing_in_any_worker(bench: Bench) -> None:
    content = some_bytes(16 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(4 * MIB), key=key, times=1)
    with beginning(bench, key) as wire:
        bench.wait_for(key, 4 * MIB)
        for start in range(0, 3 * MIB, MIB // 2):
            part = {"Range": f"bytes={start}-{start + 999}"}
            for answer in from_each_worker(bench.server, lambda part=part: get(bench.server, key, part)):
                assert (answer.status_code, answer.content) == (206, content[start : start + 1000])
        assert direct_reads(bench, key) == 0
        assert get(bench.server, key, {"Range": "bytes=-1000"}).content == content[-1000:]
        assert direct_reads(bench, key) == 1
        rule.release()
        assert wire.read(len(content) - 1) == content[1:]


def direct_reads(bench: Bench, key: str) -> int:
    """How many times the backend was asked for just 1,000 bytes, which no fill does."""
    asked = [each for each in bench.proxy.requests if each.kind == CONTENT and each.key == key]
    return sum(each.stop is not None and each.stop - each.start == 1000 for each in asked)


def test_a_range_shortly_ahead_waits_for_the_fill(bench: Bench) -> None:
    content = some_bytes(4 * MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(MIB), key=key, times=1)
    with beginning(bench, key):
        bench.wait_for(key, MIB)
        waiting = in_background(get, bench.server, key, {"Range": f"bytes={MIB + 1000}-{MIB + 1999}"})
        time.sleep(0.5)  # if it were not to wait, it would be done by then
        assert not waiting.done()
        rule.release()
        assert waiting.result(SECONDS).content == content[MIB + 1000 : MIB + 2000]
        wait_until_tidy(bench.server)
    assert bench.fetched(key) == len(content)


# No room


def uncached(bench: Bench) -> float:
    return bench.metric("kci_storage_uncached_downloads_total")


def test_an_object_larger_than_the_disk_is_delivered_each_time(azurite: Azurite, tmp_path: Path) -> None:
    content = some_bytes(32 * MIB)
    with small_disk(tmp_path / "cache", 16 * MIB), cold_bench(azurite, tmp_path, {}) as bench:
        key = bench.store(content)
        for _ in range(3):
            visits = crowd(bench.server, key, 4, content)
            assert all(visit.complete for visit in visits)
        assert uncached(bench) == 12
        figure("32 MiB object, 16 MiB of disk, 3 times 4 clients", complete=12, uncached=uncached(bench))
        small = bench.store(some_bytes(MIB))
        get(bench.server, small)
        wait_until_tidy(bench.server)
        assert get(bench.server, small).headers["X-Cache"] == "hit", "what fits is cached"


def test_an_object_larger_than_the_cache_may_be_is_delivered_each_time(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(cache={"max_bytes": 4 * MIB})
    content = some_bytes(5 * MIB)
    key = bench.store(content)
    for _ in range(3):
        assert get(bench.server, key).content == content
    assert uncached(bench) == 3
    assert get(bench.server, key, {"If-None-Match": '"another"'}).content == content


def test_a_disk_that_is_full_in_the_middle_of_a_fill_fails_nobody(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench()
    content = some_bytes(16 * MIB)
    key = bench.store(content)
    for pid in bench.server.worker_pids():
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (6 * MIB, 6 * MIB))  # the system says EFBIG, like ENOSPC
    visits = crowd(bench.server, key, 12, content)
    assert all(visit.complete for visit in visits)
    assert uncached(bench) == 12
    assert bench.metric("kci_storage_fills_total", result="no_space") >= 1
    wait_until_tidy(bench.server)


def test_the_room_of_a_fill_is_its_own_from_the_beginning(azurite: Azurite, tmp_path: Path) -> None:
    content = some_bytes(16 * MIB)
    with small_disk(tmp_path / "cache", 24 * MIB), cold_bench(azurite, tmp_path, {}) as bench:
        first, second = bench.store(content), bench.store(content)
        rule = bench.proxy.inject(Stall(4 * MIB), key=first)
        with beginning(bench, first, MIB) as wire:
            rule.wait_until_reached()
            bench.wait_for(first, 3 * MIB)
            other = get(bench.server, second).content
            rule.release()
            assert (wire.read(len(content) - MIB), other) == (content[MIB:], content)
        assert uncached(bench) == 1, "the other one would have taken the room that this one still needed"
        wait_until_tidy(bench.server)
        assert get(bench.server, first).headers["X-Cache"] == "hit"


def test_a_disk_without_space_for_one_more_file_fails_no_download(azurite: Azurite, tmp_path: Path) -> None:
    content = some_bytes(2 * MIB)
    with small_disk(tmp_path / "cache", 8 * MIB, inodes=100), cold_bench(azurite, tmp_path, {}) as bench:
        use_up_inodes(bench.server.cache_directory)
        key = bench.store(content)
        assert all(visit.complete for visit in crowd(bench.server, key, 4, content))
        assert get(bench.server, key, {"Range": "bytes=5-"}).content == content[5:]
        assert get(bench.server, f"{key}/missing").status_code == 404
        assert uncached(bench) >= 4
        bench.proxy.inject(Flip(MIB), key=key)
        [visit] = crowd(bench.server, key, 1, content)
        assert not visit.complete and visit.received < len(content), "it is verified all the same"


def test_uploads_to_a_full_disk_are_stored_and_served(azurite: Azurite, tmp_path: Path) -> None:
    content = some_bytes(6 * MIB)
    with small_disk(tmp_path / "cache", 4 * MIB), cold_bench(azurite, tmp_path, {}) as bench:
        ballast = fill_up(bench.server.cache_directory)
        key = f"{new_folder()}/file.bin"
        assert [get(bench.server, key).status_code for _ in range(6)] == [404] * 6
        assert put(bench.server, key, content).status_code == 201
        assert [get(bench.server, key).content == content for _ in range(4)] == [True] * 4
        assert put(bench.server, key, b"smaller").status_code == 200
        assert [get(bench.server, key).content for _ in range(4)] == [b"smaller"] * 4
        ballast.unlink()
        assert get(bench.server, key).content == b"smaller"
        wait_until_tidy(bench.server)
        assert get(bench.server, key).headers["X-Cache"] == "hit"


def test_a_fill_makes_room(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(cache={"max_bytes": 10 * MIB, "interval": 3600})
    for _ in range(3):
        get(bench.server, bench.store(some_bytes(3 * MIB)))
    wait_until_tidy(bench.server)
    grow_old(bench.server.cache_directory)
    content = some_bytes(5 * MIB)
    key = bench.store(content)
    assert get(bench.server, key).content == content
    wait_until_tidy(bench.server)
    assert get(bench.server, key).headers["X-Cache"] == "hit"
    assert bench.metric("kci_storage_evicted_files_total") == 2
    assert uncached(bench) == 0


def grow_old(cache: Path) -> None:
    """Make copies look old, since recently used ones are not evicted."""
    for content in cache.glob("??/*.data"):
        os.utime(content, (1, 1))


# Overload


def test_beyond_the_bound_cold_objects_wait_and_hits_do_not(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(cache={"max_fills": 1}, server={"workers": 1, "threads": 8, "lock_timeout": 6})
    hit = bench.store(b"hit")
    get(bench.server, hit)
    wait_until_tidy(bench.server)
    content = some_bytes(MIB)
    running, waiting = bench.store(content), bench.store(content)
    rule = bench.proxy.inject(Stall(1000), key=running)
    with beginning(bench, running) as wire:
        refused, hits = in_background(get, bench.server, waiting), 0
        while not refused.done():
            assert get(bench.server, hit).headers["X-Cache"] == "hit"
            hits += 1
        assert hits > 1, "they have waited, too"
        assert (refused.result().status_code, refused.result().headers["Retry-After"]) == (503, "5")
        patient = in_background(get, bench.server, waiting)
        rule.release()
        assert patient.result().content == content
        assert wire.read(MIB - 1) == content[1:]


def test_waiting_requests_leave_threads_to_the_others(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(cache={"max_fills": 1}, server={"workers": 1, "threads": 8, "lock_timeout": 60})
    hit = bench.store(b"hit")
    get(bench.server, hit)
    content = some_bytes(MIB)
    rule = bench.proxy.inject(Stall(1000), key=(running := bench.store(content)))
    with beginning(bench, running):
        keys = [bench.store(content) for _ in range(10)]
        answers = [in_background(get, bench.server, key) for key in keys]
        wait_until(
            lambda: sum(answer.done() for answer in answers) == 6,
            SECONDS,
            "the requests beyond the bound to be refused",
        )
        assert {answer.result().status_code for answer in answers if answer.done()} == {503}
        assert get(bench.server, hit).status_code == 200
        assert sum(answer.done() for answer in answers) == 6, "it has waited for the fills that wait"
        rule.release()
        assert sum(answer.result().status_code == 200 for answer in answers) == 4


def test_followers_of_a_stalled_fill_delay_no_other_request(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(server={"workers": 1, "threads": 2})
    hit = bench.store(b"hit")
    get(bench.server, hit)
    wait_until_tidy(bench.server)
    content = some_bytes(MIB)
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(1000), key=key)
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(beginning(bench, key)) for _ in range(8)]
        assert get(bench.server, hit).headers["X-Cache"] == "hit"
        rule.release()
        assert [wire.read(MIB - 1) == content[1:] for wire in wires] == [True] * 8


def test_the_bound_holds_for_all_workers_together(new_bench: Callable[..., Bench]) -> None:
    bench = new_bench(cache={"max_fills": 3}, server={"lock_timeout": 60})
    content = some_bytes(MIB)
    answers = []

    def ask_for_two() -> None:
        before = len(claims(bench))
        answers.extend(in_background(get, bench.server, bench.store(content)) for _ in range(2))
        wait_until(lambda: len(claims(bench)) == before + 2, SECONDS, "both to be asked for")

    rule = bench.proxy.inject(Stall(1000))
    from_each_worker(bench.server, ask_for_two)
    wait_until(lambda: bench.proxy.count(CONTENT) >= 3, SECONDS, "the fills that may begin")
    assert bench.metric("kci_storage_fills_in_progress") == 3
    assert bench.proxy.count(CONTENT) == 3
    rule.release()
    assert [answer.result().content == content for answer in answers] == [True] * 6
    assert bench.proxy.count(CONTENT) == 6


def claims(bench: Bench) -> list[Path]:
    """The claims: one for each object that is fetched, or waits to be."""
    return list(bench.server.cache_directory.glob("??/*.fill"))


def test_many_followers_cost_no_memory(bench: Bench) -> None:
    content = some_bytes(96 * MIB)
    key = bench.store(content)
    workers = [psutil.Process(pid) for pid in bench.server.worker_pids()]
    before = [worker.memory_info().rss for worker in workers]
    visits = in_background(crowd, bench.server, key, 24, content)
    most = before
    while not visits.done():
        most = [max(pair) for pair in zip(most, (worker.memory_info().rss for worker in workers), strict=True)]
        time.sleep(0.02)
    assert all(visit.complete for visit in visits.result())
    growth = max(after - at_first for after, at_first in zip(most, before, strict=True))
    figure("24 followers of a fill of 96 MiB: a worker grows by", MiB=growth / MIB)
    assert growth < 64 * MIB


def test_what_has_happened_is_counted(bench: Bench) -> None:
    content = some_bytes(MIB)
    wait_until_tidy(bench.server)  # of what the tests before have begun
    before = bench.metric("kci_storage_fills_total", result="ok")
    key = bench.store(content)
    rule = bench.proxy.inject(Stall(1000), key=key)
    with beginning(bench, key):
        assert bench.metric("kci_storage_fills_in_progress") == 1
        rule.release()
        wait_until_tidy(bench.server)
    wait_until(lambda: bench.metric("kci_storage_fills_in_progress") == 0, SECONDS, "the end of the fill")
    assert bench.metric("kci_storage_fills_total", result="ok") == before + 1
    assert put(bench.server, key, b"x").status_code == 200
