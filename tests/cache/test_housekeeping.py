# SPDX-License-Identifier: LGPL-2.1-or-later
"""Housekeeping: what is evicted, in which order, what must not be, and which process does it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from kci_storage.cache import housekeeping, limits
from kci_storage.cache.directory import Cache
from kci_storage.cache.housekeeping import DriverUpkeep, Housekeeper
from kci_storage.cache.limits import Evictor
from kci_storage.config.settings import CacheConfig
from kci_storage.drivers.base import ObjectInfo
from kci_storage.files import durable
from kci_storage.monitoring.metrics import Metrics
from tests.support.disks import small_disk, use_up_inodes
from tests.support.harness import Server, wait_until
from tests.support.peers import holders, peers

TIMEOUT = 60  # seconds; what is waited for here comes much sooner
HOUR = 3600  # seconds
KIB = 1024


@pytest.fixture(autouse=True)
def time_for_slow_machines() -> Iterator[None]:
    """Raise the time limits of a worker, so that a test on a slow machine does not run into them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(housekeeping, "ROOM_TIMEOUT", TIMEOUT)
        patched.setattr(housekeeping, "STOP_TIMEOUT", TIMEOUT)
        yield


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache whose invariants must hold at the end."""
    made = Cache(tmp_path / "cache")
    yield made
    wait_until(lambda: "room" not in thread_names(), TIMEOUT, "the end of making room")
    assert made.check() == []


def housekeeper(cache: Cache, **limits: float) -> Housekeeper:
    """A housekeeper with these limits, and none for the disk."""
    return Housekeeper(cache, settings(cache, **limits), Metrics(cache, []), None)


def settings(cache: Cache, **limits: float) -> CacheConfig:
    without_disk = {"low_disk_percent": 0, "recover_disk_percent": 0}
    return CacheConfig(directory=cache.directory, **{**without_disk, **limits})  # type: ignore[arg-type]


def recover(cache: Cache, after_walk: Callable[[], object], **limits: float) -> None:
    """Evict in this process until the limits are met, and call a function between each scan and the eviction."""
    evictor = Evictor(cache, settings(cache, **limits))

    def choose() -> list[limits.Candidate]:
        chosen = evictor.least_recently_used(100)
        after_walk()
        return chosen

    assert list(evictor.evict_until_within(evictor.to_recover, [], choose))


def store(cache: Cache, key: str, size: int = KIB, *, used_ago: float = HOUR, written_ago: float = 2 * HOUR) -> Path:
    """Publish an object; its content file.

    :param used_ago: seconds since its last use.
    :param written_ago: seconds since it was written.
    """
    with cache.writing(key, TIMEOUT):
        part = cache.new_part(key)
        part.write(os.urandom(size))
        cache.publish(part, ObjectInfo(key, size, "etag", 0))
    content = content_of(cache, key)
    now = time.time()
    os.utime(content, (now - used_ago, now - written_ago))
    return content


def content_of(cache: Cache, key: str) -> Path:
    entry = cache.lookup(key)
    assert entry is not None
    os.close(entry.fd)
    return Path(entry.path)


def keys(cache: Cache, *candidates: str) -> str:
    """The keys that have a copy. Looking does not count as a use of it."""
    return "".join(key for key in candidates if cache.location(key).record.exists())


class TestLimits:
    def test_nothing_is_evicted_within_the_limits(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        for key in "abc":
            store(cache, key)
        monkeypatch.setattr(housekeeping, "Job", None)  # the directory is not even walked
        housekeeper(cache, max_files=3, max_bytes=3 * KIB).keep_limits()
        assert keys(cache, *"abc") == "abc"

    def test_too_many_files(self, cache: Cache) -> None:
        for number, key in enumerate("abcde"):
            store(cache, key, used_ago=HOUR - number)
        housekeeper(cache, max_files=3).keep_limits()
        assert keys(cache, *"abcde") == "cde"

    def test_too_many_bytes(self, cache: Cache) -> None:
        for number, key in enumerate("abcde"):
            store(cache, key, used_ago=HOUR - number)
        housekeeper(cache, max_bytes=3 * KIB + 1).keep_limits()
        assert keys(cache, *"abcde") == "cde"

    def test_a_limit_in_bytes_counts_bytes_not_files(self, cache: Cache) -> None:
        store(cache, "a", 100 * KIB, used_ago=HOUR)
        for key in "bcdef":
            store(cache, key, used_ago=HOUR - 1)
        housekeeper(cache, max_bytes=10 * KIB).keep_limits()
        assert keys(cache, *"abcdef") == "bcdef"

    def test_no_limit_in_bytes(self, cache: Cache) -> None:
        store(cache, "a", 100 * KIB)
        housekeeper(cache, max_bytes=0).keep_limits()
        assert keys(cache, "a") == "a"

    def test_the_least_recently_used_is_evicted_not_the_oldest(self, cache: Cache) -> None:
        store(cache, "old but used", used_ago=2 * HOUR, written_ago=9 * HOUR)
        store(cache, "new and unused", used_ago=3 * HOUR, written_ago=3 * HOUR)
        housekeeper(cache, max_files=1).keep_limits()
        assert keys(cache, "old but used", "new and unused") == "old but used"

    def test_a_hit_is_a_use(self, cache: Cache) -> None:
        for key in "ab":
            store(cache, key)
        content_of(cache, "a")
        housekeeper(cache, max_files=1).keep_limits()
        assert keys(cache, "a", "b") == "a"

    def test_writing_is_a_use(self, cache: Cache) -> None:
        store(cache, "a", used_ago=5 * HOUR, written_ago=HOUR)
        store(cache, "b", used_ago=2 * HOUR, written_ago=2 * HOUR)
        housekeeper(cache, max_files=1).keep_limits()
        assert keys(cache, "a", "b") == "a"

    @pytest.mark.parametrize("chunk", [1, 2, 3, 100])
    def test_no_more_is_evicted_than_needed_whatever_the_chunk(self, cache: Cache, chunk: int) -> None:
        for number, key in enumerate("abcdefgh"):
            store(cache, key, used_ago=HOUR - number)
        housekeeper(cache, max_files=3, cleanup_chunk_size=chunk).keep_limits()
        assert keys(cache, *"abcdefgh") == "fgh"

    def test_at_most_a_chunk_is_chosen_in_one_scan(self, cache: Cache) -> None:
        for number, key in enumerate("abcdefgh"):
            store(cache, key, used_ago=HOUR - number)
        chosen = Evictor(cache, settings(cache)).least_recently_used(3)
        assert [candidate.content for candidate in chosen] == [str(content_of(cache, key)) for key in "cba"]

    def test_a_wrong_usage_is_corrected_before_anything_is_evicted(self, cache: Cache) -> None:
        """A crash, or an operator's hand, may have made it so."""
        for key in "abc":
            store(cache, key)
        cache.usage.add(100, 100 * KIB, 0)
        housekeeper(cache, max_files=50).keep_limits()
        assert keys(cache, *"abc") == "abc"
        assert cache.usage.read()[:2] == (3, 3 * KIB)


class TestWhatMayNotGo:
    def test_the_young(self, cache: Cache) -> None:
        store(cache, "just written", used_ago=HOUR, written_ago=1)
        store(cache, "just used", used_ago=1)
        store(cache, "a minute old", used_ago=limits.MIN_IDLE + 10, written_ago=limits.MIN_IDLE + 10)
        housekeeper(cache, max_files=1).keep_limits()
        assert keys(cache, "just written", "just used", "a minute old") == "just writtenjust used"

    def test_entries_that_are_locked(self, cache: Cache) -> None:
        for key in "abc":
            store(cache, key)
        with cache.writing("a", TIMEOUT), cache.new_part("a") as part:
            housekeeper(cache, max_files=1, cleanup_chunk_size=1).keep_limits()
            assert part.path.exists()
        assert "a" in keys(cache, *"abc")

    def test_parts_claims_and_spools(self, cache: Cache) -> None:
        with cache.new_part("a") as part, cache.new_spool() as spool:
            claim = durable.open_lock_file(cache.location("a").fill)
            for path in (part.path, spool.path, cache.location("a").fill):
                os.utime(path, (0, 0))
            store(cache, "b")
            housekeeper(cache, max_files=1).make_room(KIB)
            assert keys(cache, "b") == ""
            assert part.path.exists()
            assert spool.path.exists()
            assert durable.is_file_at(claim, cache.location("a").fill)
            os.close(claim)
            durable.remove(cache.location("a").fill)

    def test_what_was_used_since_it_was_chosen(self, cache: Cache) -> None:
        """A scan takes a while."""
        for number, key in enumerate("abc"):
            store(cache, key, used_ago=HOUR - number)
        recover(cache, lambda: content_of(cache, "a"), max_files=2)
        assert keys(cache, *"abc") == "ac"

    def test_what_was_replaced_since_it_was_chosen(self, cache: Cache) -> None:
        for number, key in enumerate("abc"):
            store(cache, key, used_ago=HOUR - number)
        recover(cache, lambda: store(cache, "a"), max_files=2)
        assert keys(cache, *"abc") == "ac"

    def test_nothing_that_may_go_is_left(self, cache: Cache) -> None:
        for key in "abc":
            store(cache, key, used_ago=1)
        housekeeper(cache, max_files=1).keep_limits()
        assert keys(cache, *"abc") == "abc"

    def test_a_reader_reads_on(self, cache: Cache) -> None:
        store(cache, "a")
        entry = cache.lookup("a")
        assert entry is not None
        os.utime(entry.path, (0, 0))
        expected = Path(entry.path).read_bytes()
        assert cache.evict(Path(entry.path), 0.0) is False  # reading it was a use, too
        os.utime(entry.path, (0, 0))
        assert cache.evict(Path(entry.path), 0.0) is True
        assert keys(cache, "a") == ""
        assert os.pread(entry.fd, 2 * KIB, 0) == expected
        os.close(entry.fd)

    def test_a_stray_content_is_evicted_and_not_the_copy_of_its_key(self, cache: Cache) -> None:
        content = store(cache, "a", used_ago=1)
        stray = cache.location("a").content("1" * 16)
        stray.write_bytes(b"left by a loss of power")
        os.utime(stray, (0, 0))
        cache.usage.add(1, 23, 0)
        housekeeper(cache, max_files=1).keep_limits()
        assert content.exists()
        assert not stray.exists()


class TestTheDisk:
    def test_the_disk_is_freed_from_the_low_mark_to_the_recover_mark(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 4096 * KIB) as disk:
            cache = Cache(disk / "cache")
            keeper = housekeeper(cache, low_disk_percent=20, recover_disk_percent=40)
            number = 0
            while free_percent(disk) >= 20:
                keeper.keep_limits()
                assert len(list(cache.contents())) == number  # not yet
                store(cache, str(number), 64 * KIB, used_ago=HOUR - number)
                number += 1
            keeper.keep_limits()
            assert 40 <= free_percent(disk) < 40 + 100 * 2 * 64 / 4096
            gone = number - len(list(cache.contents()))
            assert keys(cache, *map(str, range(number))) == "".join(map(str, range(gone, number)))
            assert cache.check() == []

    def test_inodes_are_freed_too(self, tmp_path: Path) -> None:
        """Small files use them up long before the bytes."""
        with small_disk(tmp_path / "disk", 8192 * KIB, inodes=400) as disk:
            cache = Cache(disk / "cache")
            for number in range(40):
                store(cache, str(number), 1, used_ago=HOUR - number)
            for path in use_up_inodes(disk)[: 400 // 10]:
                path.unlink()
            housekeeper(cache, low_disk_percent=12, recover_disk_percent=15).keep_limits()
            status = os.statvfs(disk)
            assert 60 <= status.f_favail < 60 + 8  # copies, and the folders that they were in stay
            assert cache.check() == []

    def test_without_a_single_inode_nothing_fails_for_good(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with small_disk(tmp_path / "disk", 8192 * KIB, inodes=400) as disk:
            cache = Cache(disk / "cache")
            store(cache, "a")
            ballast = use_up_inodes(disk)
            keeper = housekeeper(cache, max_files=1)
            assert not keeper.make_room(KIB)
            assert caplog.text == ""
            for _ in range(3):  # for the locks: here a link is as much as a file
                ballast.pop().unlink()
            assert keeper.make_room(KIB)

    def test_eviction_makes_room_for_an_object_that_does_not_fit(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 1024 * KIB) as disk:
            cache = Cache(disk / "cache")
            for number in range(10):
                store(cache, str(number), 64 * KIB, used_ago=HOUR - number)
            assert housekeeper(cache).make_room(600 * KIB)
            with cache.new_part("large") as part:
                part.write(bytes(600 * KIB))
            left = keys(cache, *map(str, range(10)))
            assert left
            assert "0123456789".endswith(left)


def free_percent(disk: Path) -> float:
    status = os.statvfs(disk)
    return 100 * status.f_bavail / status.f_blocks


class TestMakingRoom:
    def test_there_is_room_already(self, cache: Cache) -> None:
        store(cache, "a")
        assert housekeeper(cache, max_files=2, max_bytes=2 * KIB).make_room(KIB)
        assert keys(cache, "a") == "a"

    def test_no_more_is_evicted_than_needed(self, cache: Cache) -> None:
        for number, key in enumerate("abcde"):
            store(cache, key, used_ago=HOUR - number)
        assert housekeeper(cache, max_bytes=6 * KIB).make_room(3 * KIB)
        assert keys(cache, *"abcde") == "cde"

    def test_one_file_more_is_one_too_many(self, cache: Cache) -> None:
        for number, key in enumerate("abc"):
            store(cache, key, used_ago=HOUR - number)
        assert housekeeper(cache, max_files=3).make_room(KIB)
        assert keys(cache, *"abc") == "bc"

    def test_an_empty_file_needs_a_place_as_well(self, cache: Cache) -> None:
        store(cache, "a")
        keeper = housekeeper(cache, max_files=1)
        assert keeper.make_room(0)
        assert keys(cache, "a") == ""

    def test_an_object_larger_than_the_cache_evicts_nothing(self, cache: Cache) -> None:
        for key in "abc":
            store(cache, key)
        assert not housekeeper(cache, max_bytes=10 * KIB).make_room(10 * KIB + 1)
        free = os.statvfs(cache.directory).f_bavail * os.statvfs(cache.directory).f_frsize
        assert not housekeeper(cache).make_room(2 * free)
        assert keys(cache, *"abc") == "abc"
        assert housekeeper(cache, max_bytes=10 * KIB).make_room(10 * KIB)

    def test_young_copies_are_not_evicted_for_a_fill(self, cache: Cache) -> None:
        store(cache, "young", used_ago=1)
        store(cache, "old")
        assert not housekeeper(cache, max_bytes=2 * KIB).make_room(2 * KIB)
        assert keys(cache, "young", "old") == "young"

    def test_one_scan_serves_many_fills(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        """A cache at its limit has to evict for every new object."""
        for number in range(30):
            store(cache, str(number), used_ago=HOUR - number)
        keeper = housekeeper(cache, max_files=30)
        walks, real = [], keeper._choose
        monkeypatch.setattr(keeper, "_choose", lambda: walks.append(1) or real())
        for number in range(30, 50):
            assert keeper.make_room(KIB)
            store(cache, str(number), used_ago=HOUR - number)
        assert len(walks) == 1
        assert keys(cache, *map(str, range(50))) == "".join(map(str, range(20, 50)))

    def test_the_walk_of_a_large_cache_is_a_job(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(50):
            store(cache, str(number), used_ago=HOUR - number)
        keeper = housekeeper(cache, max_bytes=50 * KIB)
        monkeypatch.setattr(housekeeping, "SMALL", 49)
        monkeypatch.setattr(cache, "contents", None)  # this process does not walk
        assert keeper.make_room(45 * KIB)
        assert keys(cache, *map(str, range(50))) == "4546474849"
        assert keeper.make_room(47 * KIB)  # the job found all of them
        assert keys(cache, *map(str, range(50))) == "474849"

    def test_a_small_cache_is_scanned_in_the_worker(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(50):
            store(cache, str(number), used_ago=HOUR - number)
        monkeypatch.setattr(housekeeping, "SMALL", 50)
        monkeypatch.setattr(housekeeping, "Job", None)
        assert housekeeper(cache, max_files=50).make_room(0)
        assert keys(cache, *map(str, range(50))).startswith("12")

    def test_candidates_that_are_gone_or_used_by_now_are_passed_over(self, cache: Cache) -> None:
        for number, key in enumerate("abcdef"):
            store(cache, key, used_ago=HOUR - number)
        keeper = housekeeper(cache, max_files=6)
        assert keeper.make_room(KIB)  # a went; the others were chosen
        with cache.writing("b", TIMEOUT):
            cache.remove("b")
        for key in "cd":
            content_of(cache, key)
        store(cache, "g")
        store(cache, "h", used_ago=1)
        assert keeper.make_room(KIB)
        assert keys(cache, *"abcdefgh") == "cdfgh"

    def test_candidates_that_are_all_useless_by_now_are_chosen_anew(self, cache: Cache) -> None:
        for number, key in enumerate("abc"):
            store(cache, key, used_ago=HOUR - number)
        keeper = housekeeper(cache, max_files=3)
        assert keeper.make_room(KIB)
        for key in "bc":
            content_of(cache, key)
        store(cache, "d")
        assert keeper.make_room(KIB)
        assert keys(cache, *"abcd") == "bc"

    def test_a_slow_scan_serves_later_fills(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        for number, key in enumerate("abc"):
            store(cache, key, used_ago=HOUR - number)
        monkeypatch.setattr(housekeeping, "ROOM_TIMEOUT", 0.05)
        keeper = housekeeper(cache, max_files=3)
        given_up, real = threading.Event(), keeper._choose

        def slow_walk() -> list[limits.Candidate]:
            given_up.wait(TIMEOUT)
            return real()

        monkeypatch.setattr(keeper, "_choose", slow_walk)
        assert not keeper.make_room(KIB)
        assert keys(cache, *"abc") == "abc"
        given_up.set()
        wait_until(lambda: keys(cache, *"abc") == "bc", TIMEOUT, "the walk's end")
        assert keeper.make_room(KIB)

    def test_one_at_a_time_over_all_processes(
        self, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(housekeeping, "ROOM_TIMEOUT", 0.05)
        store(cache, "a")
        with peers(1) as [peer]:
            peer.call(hold_room, cache.directory)
            assert not housekeeper(cache, max_files=1).make_room(KIB)
            wait_until(lambda: "room" not in thread_names(), TIMEOUT, "the end of the attempt")
            assert caplog.text == ""
            assert keys(cache, "a") == "a"
            peer.kill()
        monkeypatch.setattr(housekeeping, "ROOM_TIMEOUT", TIMEOUT)
        assert housekeeper(cache, max_files=1).make_room(KIB)
        cache.recover_locks()


_held: list[object] = []


def hold_room(directory: Path) -> None:
    """For a peer process: hold the lock of an eviction for a fill."""
    _held.append(Cache(directory).locks.try_acquire(housekeeping.ROOM_LOCK))


class TestTheThread:
    """The election of the thread that does the housekeeping, and what a start repairs."""

    @pytest.fixture
    def started(self, cache: Cache) -> Iterator[Callable[..., Housekeeper]]:
        """Starts a housekeeper, which is stopped in the end."""
        keepers = []

        def start(**limits: float) -> Housekeeper:
            keeper = housekeeper(cache, interval=0.1, **limits)
            keepers.append(keeper)
            keeper.start()
            return keeper

        yield start
        for keeper in keepers:
            keeper.stop()
        wait_until(lambda: "housekeeping" not in thread_names(), TIMEOUT, "the end of the threads")

    def test_a_start_repairs_what_dead_writers_left_before_it_returns(
        self, cache: Cache, started: Callable[..., Housekeeper]
    ) -> None:
        store(cache, "a")
        with peers(1) as [peer]:
            peer.call(die_writing, cache.directory)
            peer.call(hold_room, cache.directory)
            peer.kill()
        assert len(cache.locks.names()) == 2
        with leading(cache):  # so that only the start itself can have done it
            started()
            assert cache.locks.names() == []
            entry = cache.lookup("a")
            assert entry is not None
            assert entry.record.doubtful
            os.close(entry.fd)

    def test_a_start_removes_spools_and_recovers_the_driver_before_it_returns(self, cache: Cache) -> None:
        recovered: list[int] = []

        def recover_driver() -> int:
            recovered.append(1)
            raise OSError("the driver's folder cannot be read")

        dead = cache.new_spool()
        dead.close()
        keeper = Housekeeper(
            cache, settings(cache), Metrics(cache, []), DriverUpkeep(recover=recover_driver, sweep=lambda: 0)
        )
        with leading(cache), cache.new_spool() as living:
            keeper.start()
            assert (dead.path.exists(), living.path.exists(), recovered) == (False, True, [1])
            keeper.stop()

    def test_the_leader_sweeps_again_when_a_worker_has_ended(
        self, cache: Cache, started: Callable[..., Housekeeper], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        started()
        wait_until(lambda: "event=swept" in caplog.text, TIMEOUT, "the first sweep")
        with peers(1) as [peer]:
            peer.call(work, cache.directory)
            assert len(list((cache.directory / housekeeping.WORKERS).iterdir())) == 2
            peer.kill()
        wait_until(lambda: caplog.text.count("event=swept") == 2, TIMEOUT, "another sweep")
        assert len(list((cache.directory / housekeeping.WORKERS).iterdir())) == 1

    def test_workers_that_end_again_and_again_do_not_keep_the_leader_sweeping(
        self, cache: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [time.monotonic()]
        monkeypatch.setattr(housekeeping.time, "monotonic", lambda: now[0])
        keeper = housekeeper(cache)
        sweep_in(keeper, now, seconds=3)
        durable.NewFile.unnamed(cache.directory / housekeeping.WORKERS).close()
        assert not keeper._is_sweep_due()
        now[0] += 3 * housekeeping.SWEEP_REST
        assert keeper._is_sweep_due()
        sweep_in(keeper, now, seconds=3)
        now[0] += 3 * housekeeping.SWEEP_REST
        assert not keeper._is_sweep_due()
        now[0] += housekeeping.SWEEP_INTERVAL
        assert keeper._is_sweep_due()

    def test_the_leader_sweeps_and_then_keeps_the_limits(
        self, cache: Cache, started: Callable[..., Housekeeper]
    ) -> None:
        cache.new_part("dead").close()
        for key in "abc":
            store(cache, key)
        started(max_files=2)
        wait_until(lambda: cache.usage.read()[0] == 2 and not cache.check(), TIMEOUT, "a sweep and an eviction")
        store(cache, "d")
        wait_until(lambda: cache.usage.read()[0] == 2, TIMEOUT, "another eviction")

    def test_a_round_that_fails_is_not_the_last(
        self, cache: Cache, started: Callable[..., Housekeeper], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rounds = []

        def keep_limits(self: Housekeeper, lock: int) -> None:
            rounds.append(1)
            raise OSError("the folder is gone")

        monkeypatch.setattr(Housekeeper, "keep_limits", keep_limits)
        monkeypatch.setattr(housekeeping, "ELECTION_INTERVAL", HOUR)  # it keeps the lead
        started()
        wait_until(lambda: len(rounds) >= 3, TIMEOUT, "a third round")

    def test_a_leader_whose_lock_file_is_gone_steps_down(
        self, cache: Cache, started: Callable[..., Housekeeper], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An operator empties the cache directory: then two could lead."""
        monkeypatch.setattr(housekeeping, "ELECTION_INTERVAL", 0.05)
        started(max_files=1)
        wait_until(lambda: leaders(cache.directory), TIMEOUT, "a leader")
        old_lock = os.open(cache.directory / housekeeping.LEADER_LOCK, os.O_RDONLY)
        (cache.directory / housekeeping.LEADER_LOCK).unlink()
        wait_until(lambda: durable.try_lock(old_lock), TIMEOUT, "the end of the old lead")
        os.close(old_lock)
        for key in "ab":
            store(cache, key)
        wait_until(lambda: cache.usage.read()[0] == 1, TIMEOUT, "the new lead")

    def test_the_driver_is_swept_too_in_another_process(self, cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
        driver = DriverUpkeep(recover=lambda: 0, sweep=partial(sweep_driver, os.getpid()))
        keeper = Housekeeper(cache, settings(cache), Metrics(cache, []), driver)
        caplog.set_level("INFO")
        cache.new_part("dead").close()
        try:
            keeper.start()
            wait_until(lambda: "event=swept" in caplog.text, TIMEOUT, "a sweep")
        finally:
            keeper.stop()
        assert "removed=8 " in caplog.text

    def test_a_stop_ends_a_job(self, cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Its lock is free when the worker is gone, and nothing is reported that was not done."""
        begun = tmp_path / "begun"
        driver = DriverUpkeep(recover=lambda: 0, sweep=partial(hang, begun))
        keeper = Housekeeper(cache, settings(cache), Metrics(cache, []), driver)
        keeper.start()
        wait_until(begun.exists, TIMEOUT, "the sweep of the driver")
        assert len(set(leaders(cache.directory))) == 2
        keeper.stop()
        assert not leaders(cache.directory)
        assert caplog.text == ""

    def test_a_stop_ends_an_eviction_for_a_fill(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise the process would end in between, and leave a lock and a wrong usage."""
        monkeypatch.setattr(housekeeping, "ROOM_TIMEOUT", 0.0)
        monkeypatch.setattr(housekeeping, "PAUSE", TIMEOUT)
        for number in range(2 * limits.STEP):
            store(cache, str(number))
        keeper = housekeeper(cache, max_files=1)
        assert not keeper.make_room(KIB)
        keeper.stop()
        assert "room" not in thread_names()
        assert cache.locks.names() == []
        assert cache.usage.read()[0] >= limits.STEP

    def test_an_election_that_fails_is_not_the_last(
        self, cache: Cache, started: Callable[..., Housekeeper], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(housekeeping, "ELECTION_INTERVAL", 0.05)
        (cache.directory / housekeeping.LEADER_LOCK).mkdir()
        started()
        wait_until(lambda: "housekeeping_failed" in caplog.text, TIMEOUT, "an election that fails")
        (cache.directory / housekeeping.LEADER_LOCK).rmdir()
        wait_until(lambda: leaders(cache.directory), TIMEOUT, "a leader")


@contextlib.contextmanager
def leading(cache: Cache) -> Iterator[None]:
    """Hold the leader's lock during the block, so that no housekeeper does anything."""
    fd = durable.open_lock_file(cache.directory / housekeeping.LEADER_LOCK)
    assert durable.try_lock(fd)
    yield
    os.close(fd)


def sweep_driver(parent: int) -> int:
    """For a job: report that seven files were removed."""
    assert os.getppid() == parent
    return 7


def hang(begun: Path) -> int:
    """For a job: sweep a driver's store that is large."""
    begun.touch()
    time.sleep(10 * TIMEOUT)
    return 0


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def die_writing(directory: Path) -> None:
    """For a peer process: be in the middle of an upload."""
    writing = Cache(directory).writing("a", TIMEOUT)
    writing.__enter__()
    _held.append(writing)


def work(directory: Path) -> None:
    """For a peer process: be a worker that does not lead, and that leaves a part behind when it is killed."""
    cache = Cache(directory)
    keeper = housekeeper(cache)
    keeper.start()
    _held.extend((keeper, cache.new_part("a")))


def sweep_in(keeper: Housekeeper, now: list[float], seconds: float) -> None:
    """Let a housekeeper sweep, for which it takes some time.

    :param now: the time, which is changed.
    """

    def job(*arguments: object, **options: object) -> Iterator[int]:
        now[0] += seconds
        yield 0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keeper, "_job", job)
        keeper._sweep(-1)


def leaders(directory: Path) -> list[int]:
    """The processes that hold the leader's lock: a worker, and its job while one runs."""
    return holders(directory / housekeeping.LEADER_LOCK)


def leading_workers(server: Server) -> list[int]:
    return server.holders(server.cache_directory / housekeeping.LEADER_LOCK)


def evicted(server: Server) -> list[str]:
    """Files and bytes, as the server counts them."""
    metrics = requests.get(f"{server.url}/metrics").text
    return re.findall(r"^kci_storage_evicted_\w+_total (\S+)$", metrics, re.MULTILINE)


class TestRealServers:
    @pytest.mark.expected_errors("was sent SIGKILL")
    def test_another_worker_takes_over_from_one_that_was_killed(self, start_server: Callable[..., Server]) -> None:
        server = start_server("azure", server={"workers": 3}, cache={"interval": 0.1, "max_files": 2})
        [first] = wait_until(lambda: leading_workers(server), TIMEOUT, "a leader")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(first), TIMEOUT, "the end of the leader")
        [second] = wait_until(lambda: leading_workers(server), TIMEOUT, "another leader")
        assert second != first
        for key in "abcd":
            requests.put(f"{server.url}/{key}", key, headers=server.headers()).raise_for_status()
        cache = Cache(server.cache_directory)
        for file, _ in cache.contents():
            os.utime(file.path, (time.time() - HOUR,) * 2)
        wait_until(lambda: cache.usage.read()[0] == 2, TIMEOUT, "an eviction")
        # The process that evicts tells the worker, whose figures these are.
        wait_until(lambda: evicted(server) == ["2.0", "2.0"], TIMEOUT, "its report")
        assert [requests.get(f"{server.url}/{key}").text for key in "abcd"] == [*"abcd"]

    def test_a_full_cache_makes_room_for_a_cold_object(self, start_server: Callable[..., Server]) -> None:
        server = start_server("azure", cache={"interval": HOUR, "max_bytes": 100 * KIB})
        for number in range(3):
            url = f"{server.url}/{number}"
            requests.put(url, bytes(30 * KIB), headers=server.headers()).raise_for_status()
        cache = Cache(server.cache_directory)
        for number in range(3):
            os.utime(content_of(cache, str(number)), (time.time() - HOUR + number,) * 2)
        requests.put(f"{server.url}/large", bytes(80 * KIB), headers=server.headers()).raise_for_status()
        with cache.writing("large", TIMEOUT):
            cache.remove("large")
        assert requests.get(f"{server.url}/large").headers["X-Cache"] == "miss"
        assert wait_until(lambda: keys(cache, "large", "0", "1", "2"), TIMEOUT, "the fill's end") == "large"
        assert requests.get(f"{server.url}/large").headers["X-Cache"] == "hit"
        assert requests.get(f"{server.url}/0").content == bytes(30 * KIB)

    def test_an_object_larger_than_the_cache_bypasses_it(self, start_server: Callable[..., Server]) -> None:
        server = start_server("azure", cache={"interval": HOUR, "max_bytes": 100 * KIB})
        requests.put(f"{server.url}/small", b"small", headers=server.headers()).raise_for_status()
        os.utime(content_of(Cache(server.cache_directory), "small"), (0, 0))
        content = os.urandom(200 * KIB)
        requests.put(f"{server.url}/large", content, headers=server.headers()).raise_for_status()
        cache = Cache(server.cache_directory)
        with cache.writing("large", TIMEOUT):
            cache.remove("large")
        for _ in range(2):
            answer = requests.get(f"{server.url}/large")
            assert (answer.content, answer.headers["X-Cache"]) == (content, "miss")
        assert keys(cache, "small", "large") == "small"
