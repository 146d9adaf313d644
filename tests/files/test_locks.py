# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks: one holder at a time over threads and processes, and the locks of dead holders."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from kci_storage.config.settings import CacheConfig, Config, ConfigError
from kci_storage.drivers.local.driver import LocalDriver
from kci_storage.errors import BackendError, InsufficientStorage, WriteConflict
from kci_storage.files import durable
from kci_storage.files.locks import MARKERS, MAX_FREE_MARKERS, PROBE_NAME, KeyLocks, Lease
from kci_storage.services import open_cache
from tests.support.disks import small_disk, use_up_inodes
from tests.support.peers import Peer, dies, peers

TIMEOUT = 60  # seconds; every wait here ends much sooner
BRIEFLY = 0.05  # seconds to wait for an event that must not occur


@pytest.fixture
def locks(tmp_path: Path) -> Iterator[KeyLocks]:
    """Locks, all of which must be released at the end."""
    made = KeyLocks(tmp_path / "locks")
    yield made
    assert made.names() == []


@pytest.fixture
def peer() -> Iterator[Peer]:
    with peers(1) as [one]:
        yield one


# What peers do

_leases: list[Lease] = []


@lru_cache
def locks_in(directory: Path) -> KeyLocks:
    return KeyLocks(directory)


def take(directory: Path, name: str) -> bool:
    """Take a lock and keep it; returns whether a dead holder left it."""
    lease = locks_in(directory).try_acquire(name)
    assert lease is not None
    _leases.append(lease)
    return lease.orphaned


def let_go() -> None:
    _leases.pop().release()


def is_free(directory: Path, name: str) -> bool:
    with locks_in(directory).hold_if_free(name) as lease:
        return lease is not None


def wait_for(directory: Path, name: str) -> bool:
    """Wait for a lock and release it; returns whether a dead holder left it."""
    with locks_in(directory).hold(name, TIMEOUT) as lease:
        return lease.orphaned


def count_alone(directory: Path, total: Path, times: int) -> None:
    """Add to a number in a file, repeatedly, in a way that loses additions unless the lock excludes others."""
    done = 0
    while done < times:
        with locks_in(directory).hold_if_free("name") as lease:
            if lease is None:
                os.sched_yield()
                continue
            before = int(total.read_text() or 0)
            os.sched_yield()
            total.write_text(str(before + 1))
            done += 1


class TestExclusion:
    def test_one_process_at_a_time(self, locks: KeyLocks, tmp_path: Path) -> None:
        total = tmp_path / "total"
        total.touch()
        with peers(3) as others:
            for other in others:
                other.start(count_alone, locks.directory, total, 100)
            for other in others:
                other.answer()
        assert total.read_text() == "300"

    def test_one_thread_at_a_time(self, locks: KeyLocks, tmp_path: Path) -> None:
        total = tmp_path / "total"
        total.touch()
        threads = [threading.Thread(target=count_alone, args=(locks.directory, total, 60)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert total.read_text() == "180"

    def test_two_names_do_not_exclude_each_other(self, locks: KeyLocks, peer: Peer) -> None:
        with locks.hold("one", TIMEOUT):
            assert peer.call(is_free, locks.directory, "two")
            assert not peer.call(is_free, locks.directory, "one")

    def test_it_is_free_after_the_block_and_leaves_no_file(self, locks: KeyLocks, peer: Peer) -> None:
        with pytest.raises(ZeroDivisionError), locks.hold("name", TIMEOUT):
            assert locks.names() == ["name"]
            raise ZeroDivisionError
        assert locks.names() == []
        assert peer.call(is_free, locks.directory, "name")

    def test_opening_the_file_before_its_removal_does_not_take_the_lock(
        self, locks: KeyLocks, peer: Peer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the comparison of path and file, two threads would hold the lock in this race."""

        def slow_lock(fd: int) -> bool:
            monkeypatch.undo()
            first.release()
            assert not peer.call(take, locks.directory, "name")
            return durable.try_lock(fd)

        prepare_markers(locks, 2)
        first = locks.try_acquire("name")
        assert first is not None
        monkeypatch.setattr(durable, "try_lock", slow_lock)
        assert locks.try_acquire("name") is None
        peer.call(let_go)

    def test_a_release_removes_only_its_own_file(self, locks: KeyLocks, peer: Peer) -> None:
        """An operator empties the cache directory of a running server."""
        with locks.hold("name", TIMEOUT):
            (locks.directory / "name").unlink()
            locks.directory.rmdir()
            peer.call(take, locks.directory, "name")
        assert not is_free(locks.directory, "name")
        peer.call(let_go)


class TestWaiting:
    def test_it_is_handed_over(self, locks: KeyLocks, peer: Peer) -> None:
        with locks.hold("name", TIMEOUT):
            peer.start(wait_for, locks.directory, "name")
        assert peer.answer() is False

    def test_waiting_ends(self, locks: KeyLocks, peer: Peer) -> None:
        peer.call(take, locks.directory, "name")
        with pytest.raises(WriteConflict, match=r"running for 0\.05 seconds"), locks.hold("name", BRIEFLY):
            pytest.fail("two hold the lock")
        with locks.hold_if_free("name") as lease:
            assert lease is None
        peer.call(let_go)

    def test_a_lock_that_is_free_is_had_without_any_time(self, locks: KeyLocks) -> None:
        with locks.hold("name", timeout=0) as lease:
            assert not lease.orphaned

    def test_presence_is_seen_without_taking_it(self, locks: KeyLocks, peer: Peer) -> None:
        assert not locks.is_present("name")
        peer.call(take, locks.directory, "name")
        assert locks.is_present("name")
        peer.call(let_go)
        assert not locks.is_present("name")


class TestDeadHolders:
    def test_their_locks_are_free_at_once_and_marked(self, locks: KeyLocks, peer: Peer) -> None:
        assert peer.call(take, locks.directory, "name") is False
        peer.kill()
        assert locks.names() == ["name"]
        with locks.hold("name", timeout=0) as lease:
            assert lease.orphaned
        with locks.hold("name", timeout=0) as lease:
            assert not lease.orphaned

    def test_a_waiting_process_is_told(self, locks: KeyLocks) -> None:
        with peers(2) as [holder, waiter]:
            holder.call(take, locks.directory, "name")
            waiter.start(wait_for, locks.directory, "name")
            holder.kill()
            assert waiter.answer() is True

    def test_only_the_first_to_take_over_a_dead_holders_lock_gets_it(
        self, locks: KeyLocks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two threads open the file of a dead holder; before the second one locks it, the first has removed it."""

        def slow_lock(fd: int) -> bool:
            monkeypatch.undo()
            assert first.call(wait_for, locks.directory, "name") is True
            assert first.call(take, locks.directory, "name") is False
            return durable.try_lock(fd)

        with peers(2) as [dead, first]:
            dead.call(take, locks.directory, "name")
            dead.kill()
            prepare_markers(locks, 1)
            monkeypatch.setattr(durable, "try_lock", slow_lock)
            assert locks.try_acquire("name") is None
            first.call(let_go)

    def test_a_holder_that_released_the_lock_is_not_taken_for_dead(
        self, locks: KeyLocks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its file still existed when the next one looked for it."""

        def slow_lock(fd: int) -> bool:
            monkeypatch.undo()
            first.release()
            return durable.try_lock(fd)

        prepare_markers(locks, 2)
        first = locks.try_acquire("name")
        assert first is not None
        monkeypatch.setattr(durable, "try_lock", slow_lock)
        with locks.hold_if_free("name") as lease:
            assert lease is not None
            assert not lease.orphaned

    def test_those_that_they_left_are_found_and_removed(self, locks: KeyLocks, peer: Peer) -> None:
        for name in ("dead 1", "dead 2"):
            peer.call(take, locks.directory, name)
        with locks.hold("living", timeout=0):
            assert list(locks.orphans()) == []
            peer.kill()
            found = []
            for name in locks.orphans():
                assert locks.try_acquire(name) is None
                found.append(name)
            assert sorted(found) == ["dead 1", "dead 2"]
            assert locks.names() == ["living"]

    def test_one_whose_finder_fails_stays(self, locks: KeyLocks, peer: Peer) -> None:
        peer.call(take, locks.directory, "dead")
        peer.kill()
        with pytest.raises(OSError, match="unreadable"):
            for _ in locks.orphans():
                raise OSError("unreadable")
        gc.collect()
        assert locks.names() == ["dead"]
        with locks.hold("dead", timeout=0) as lease:
            assert lease.orphaned

    def test_those_are_found_on_a_full_disk_too(self, tmp_path: Path, peer: Peer) -> None:
        with small_disk(tmp_path / "disk", 1024 * 1024, inodes=20) as disk:
            peer.call(take, disk / "locks", "dead")
            peer.kill()
            use_up_inodes(disk)
            locks = KeyLocks(disk / "locks")
            assert list(locks.orphans()) == ["dead"]
            assert locks.names() == []

    def test_a_holder_that_came_and_died_in_between_is_not_overlooked(
        self, locks: KeyLocks, peer: Peer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The name did not exist when the next one began, but does when it makes its own."""
        monkeypatch.setattr(durable, "link", after(lambda: live_and_die(peer, locks), durable.link))
        with locks.hold_if_free("name") as lease:
            assert lease is not None
            assert lease.orphaned


def prepare_markers(locks: KeyLocks, count: int) -> None:
    """Make a number of markers in advance, so that taking a lock makes none."""
    with contextlib.ExitStack() as held:
        for number in range(count):
            held.enter_context(locks.hold(str(number), TIMEOUT))


def live_and_die(peer: Peer, locks: KeyLocks) -> None:
    if peer._process.is_alive():
        peer.call(take, locks.directory, "name")
        peer.kill()


def after(first, function):
    """A function that calls another one first."""

    def call(*args):
        first()
        return function(*args)

    return call


class TestMarkers:
    """The files to which the names are linked."""

    def test_one_serves_for_lock_after_lock(self, locks: KeyLocks) -> None:
        inodes = set()
        for name in ("one", "two", "one"):
            with locks.hold(name, TIMEOUT):
                inodes.add((locks.directory / name).stat().st_ino)
        assert len(inodes) == 1

    def test_no_more_are_kept_than_are_likely_to_be_used(self, locks: KeyLocks) -> None:
        prepare_markers(locks, MAX_FREE_MARKERS + 5)
        assert len(markers(locks)) == MAX_FREE_MARKERS

    def test_markers_of_dead_processes_are_swept(self, locks: KeyLocks, peer: Peer) -> None:
        with locks.hold("mine", TIMEOUT):
            peer.call(is_free, locks.directory, "another")
            assert locks.sweep() == 0
            peer.kill()
            assert locks.sweep() == 1
            assert not locks_in(locks.directory).try_acquire("mine")

    def test_an_orphaned_lock_keeps_its_marker(self, locks: KeyLocks, peer: Peer) -> None:
        peer.call(take, locks.directory, "name")
        peer.kill()
        assert locks.sweep() == 0
        with locks.hold("name", timeout=0) as lease:
            assert lease.orphaned
        assert locks.sweep() == 1

    def test_a_fork_has_its_own(self, locks: KeyLocks, peer: Peer) -> None:
        """Otherwise a lock of a dead fork would seem to be held for as long as its parent lives."""
        peer.call(fork_and_die, locks.directory)
        with locks.hold("of the fork", timeout=0) as lease:
            assert lease.orphaned
        assert peer.call(is_free, locks.directory, "name")

    def test_they_go_with_their_process(self, tmp_path: Path) -> None:
        made = KeyLocks(tmp_path / "locks")
        with made.hold("name", TIMEOUT):
            assert len(markers(made)) == 1
        del made
        gc.collect()
        assert os.listdir(tmp_path / MARKERS) == []

    def test_they_are_made_again(self, locks: KeyLocks) -> None:
        """An operator empties the cache directory of a running server."""
        for _ in range(2):
            with locks.hold("name", TIMEOUT) as lease:
                assert not lease.orphaned
            shutil.rmtree(locks.directory.with_name(MARKERS))
            locks.directory.rmdir()


def markers(locks: KeyLocks) -> list[str]:
    return os.listdir(locks.directory.with_name(MARKERS))


def fork_and_die(directory: Path) -> None:
    def die() -> None:
        take(directory, "of the fork")
        os.kill(os.getpid(), signal.SIGKILL)

    assert is_free(directory, "name")  # so that there is a marker
    assert dies(die)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1024 * 1024, inodes=20) as disk:
        locks = KeyLocks(disk / "locks")
        ballast = use_up_inodes(disk)
        with pytest.raises(InsufficientStorage), locks.hold("name", TIMEOUT):
            pytest.fail("there was room")
        for path in ballast:
            path.unlink()
        assert is_free(locks.directory, "name")


def test_the_locks_that_are_held_now_are_written_to_the_disk(
    locks: KeyLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with locks.hold("name", TIMEOUT):
        locks.sync()
    assert synced == [str(locks.directory)]


def test_a_folder_that_is_gone_holds_no_locks(tmp_path: Path) -> None:
    locks = KeyLocks(tmp_path / "locks")
    locks.directory.rmdir()
    assert locks.names() == []
    assert is_free(locks.directory, "name")


# File systems that cannot be used


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as FAT does, which not every machine can mount."""

    def link(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("no_hard_links")
def test_a_cache_on_a_file_system_without_hard_links_is_refused_at_the_start(tmp_path: Path):
    config = Config(tmp_path / "config.toml", driver="local", cache=CacheConfig(directory=tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"config.toml: cache.directory: expected .* with hard links"):
        open_cache(config)


@pytest.mark.usefixtures("no_hard_links")
def test_a_local_storage_without_hard_links_is_not_ready(tmp_path: Path):
    with pytest.raises(BackendError):
        LocalDriver(tmp_path).probe()


def test_a_proof_leaves_nothing_and_is_not_in_the_way_of_another(tmp_path: Path):
    locks = KeyLocks(tmp_path / "locks")
    with locks.hold(PROBE_NAME, 0):
        locks.check_usable()
    assert locks.names() == []
    locks.check_usable()
    assert locks.names() == []
