# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache directory: publishing, lookup, replacement and removal of entries, and recovery after crashes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import requests

from kci_storage.cache import directory as cache_module
from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import Entry, Record
from kci_storage.cache.names import RECORD, Location
from kci_storage.drivers.base import ObjectInfo
from kci_storage.errors import InsufficientStorage, WriteConflict
from kci_storage.files import durable
from tests.support.disks import fill_up, small_disk, use_up_inodes
from tests.support.harness import Server, wait_until
from tests.support.peers import Peer, peers
from tests.support.steps import spy

KEY = "folder/file.txt"
TIMEOUT = 60  # seconds; what is waited for here comes much sooner
VERSIONS = 50  # that one process writes while another one looks: each is flushed several times


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache whose invariants must hold at the end."""
    made = Cache(tmp_path / "cache")
    yield made
    assert made.check() == []


@pytest.fixture
def peer() -> Iterator[Peer]:
    with peers(1) as [one]:
        yield one


# What uploads, downloads and deletions do with a cache; here, and in other processes


def store(cache: Cache, content: bytes, key: str = KEY) -> None:
    """Publish a new version."""
    with cache.writing(key, TIMEOUT):
        part = cache.new_part(key)
        part.write(content)
        cache.announce_commit(key)
        cache.publish(part, info_of(content, key))


def info_of(content: bytes, key: str = KEY) -> ObjectInfo:
    return ObjectInfo(key, len(content), f"etag-{content[:8].hex()}", 1_700_000_000, "text/plain")


def load(cache: Cache, key: str = KEY) -> bytes | None:
    """The copy's content; None: there is no copy."""
    entry = cache.lookup(key)
    return None if entry is None else content_of(entry)


def content_of(entry: Entry) -> bytes:
    try:
        return os.pread(entry.fd, entry.record.info.size + 1, 0)
    finally:
        os.close(entry.fd)


def record_of(cache: Cache, key: str = KEY) -> Record:
    """The record that a reader would see now."""
    return Record.from_json(cache.location(key).record.read_bytes())


def doubt(cache: Cache, seconds: float = 60) -> Record:
    """Put the key in doubt; the copy's record from then on.

    :param seconds: for which a lost change may be carried out.
    """
    with cache.writing(KEY, TIMEOUT):
        cache.doubt(KEY, cache.known_version(KEY), time.time() + seconds)
    return record_of(cache)


def is_in_doubt(cache: Cache) -> bool:
    """Whether a lost change may still be carried out, given the version of the copy, or none."""
    with cache.writing(KEY, TIMEOUT):
        return cache.doubt_of(KEY).concerns(cache.known_version(KEY), time.time())


def settle(cache: Cache, found: ObjectInfo, etag: str | None = None) -> None:
    """End the doubt.

    :param found: what the backend has.
    :param etag: the version's new one; None: it has the same as before.
    """
    with cache.writing(found.key, TIMEOUT):
        cache.settle(found, replace(found, etag=etag or found.etag), time.time())


@lru_cache
def cache_in(directory: Path) -> Cache:
    return Cache(directory)


def store_there(directory: Path, content: bytes) -> None:
    store(cache_in(directory), content)


def load_there(directory: Path) -> bytes | None:
    return load(cache_in(directory))


_held: list[object] = []


def begin_upload(directory: Path) -> None:
    """Hold a key's lock, and have a part, a spool and a claim of a fill open."""
    cache = cache_in(directory)
    writing = cache.writing(KEY, TIMEOUT)
    writing.__enter__()
    claim = durable.open_lock_file(cache.location("cold").fill)
    assert durable.try_lock(claim)
    _held.extend([writing, cache.new_part(KEY), cache.new_spool(), cache.new_part("cold"), claim])


def begin_deletion(directory: Path) -> None:
    """Hold a key's lock."""
    writing = cache_in(directory).writing(KEY, TIMEOUT)
    writing.__enter__()
    _held.append(writing)


class TestEntries:
    def test_what_is_published_is_found(self, cache: Cache) -> None:
        assert load(cache) is None
        store(cache, b"content")
        entry = cache.lookup(KEY)
        assert entry is not None
        assert entry.record.info == info_of(b"content")
        assert abs(entry.record.validated - time.time()) < 60
        assert not entry.record.doubtful
        assert Path(entry.path).read_bytes() == content_of(entry) == b"content"
        assert cache.usage.read()[:2] == (1, 7)

    def test_an_empty_file_can_be_published(self, cache: Cache) -> None:
        store(cache, b"")
        assert load(cache) == b""
        assert cache.usage.read()[:2] == (1, 0)

    def test_the_longest_key_has_its_place(self, cache: Cache) -> None:
        key = "/".join(["ä" * 100] * 10)
        store(cache, b"content", key)
        assert load(cache, key) == b"content"

    def test_a_new_version_takes_the_place_of_the_old_one(self, cache: Cache) -> None:
        store(cache, b"old")
        old = cache.lookup(KEY)
        assert old is not None
        store(cache, b"new one")
        assert load(cache) == b"new one"
        assert content_of(old) == b"old"  # an open descriptor still reads the old content
        assert not Path(old.path).exists()
        assert cache.usage.read()[:2] == (1, 7)

    def test_it_is_removed(self, cache: Cache) -> None:
        store(cache, b"content")
        with cache.writing(KEY, TIMEOUT):
            assert cache.remove(KEY)
            assert not cache.remove(KEY)
        assert load(cache) is None
        assert cache.usage.read()[:2] == (0, 0)

    def test_one_version_is_removed_but_not_the_next(self, cache: Cache) -> None:
        store(cache, b"old")
        old = record_of(cache)
        store(cache, b"new")
        cache.remove_version(old)
        assert load(cache) == b"new"
        cache.remove_version(record_of(cache))
        assert load(cache) is None

    def test_a_removed_copy_does_not_come_back_after_a_loss_of_power(
        self, cache: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store(cache, b"content")
        synced = []
        monkeypatch.setattr(durable, "sync_directory", synced.append)
        with cache.writing(KEY, TIMEOUT):
            cache.remove(KEY)
        assert synced == [cache.location(KEY).record.parent]

    @pytest.mark.parametrize("replaces", [False, True])
    def test_the_disk_has_content_and_record_before_their_names_and_these_before_it_is_stored(
        self, cache: Cache, monkeypatch: pytest.MonkeyPatch, replaces: bool
    ) -> None:
        """Content and record share a commit of the file system's journal, and so do their names."""
        if replaces:
            store(cache, b"old")
        folder = str(cache.location(KEY).record.parent)
        calls = spy(monkeypatch, "fdatasync", "fsync", "rename")
        store(cache, b"content")
        done = [(name, "record" if RECORD in path else "content") for name, path in calls if path.startswith(folder)]
        flushed, named = ([(name, kind) for kind in ("content", "record")] for name in ("fdatasync", "rename"))
        assert done[:-1] == flushed + named
        assert calls[-1] == ("fsync", folder)

    def test_a_commit_that_replaces_a_copy_is_announced_on_the_disk(
        self, cache: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced = []
        monkeypatch.setattr(durable, "sync_directory", synced.append)
        with cache.writing(KEY, TIMEOUT):
            cache.announce_commit(KEY)  # there is no copy that could be older
        assert synced == []
        store(cache, b"content")
        with cache.writing(KEY, TIMEOUT):
            cache.announce_commit(KEY)
        assert cache.locks.directory in synced

    def test_memory_of_records_is_bounded(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_module, "MAX_REMEMBERED_RECORDS", 3)
        for number in range(10):
            store(cache, b"content", str(number))
            load(cache, str(number))
            assert len(cache._remembered) <= 3
        assert all(load(cache, str(number)) == b"content" for number in range(10))

    def test_use_is_noted_but_not_each_time(self, cache: Cache) -> None:
        store(cache, b"content")
        content = cache.location(KEY).content(record_of(cache).generation)
        written = content.stat().st_mtime_ns
        for age, noted in ((cache_module.TOUCH_INTERVAL + 10, True), (cache_module.TOUCH_INTERVAL - 10, False)):
            used = time.time() - age
            os.utime(content, ns=(int(used * 1e9), written))
            entry = cache.lookup(KEY)
            assert entry is not None
            os.close(entry.fd)  # unread: the kernel would note that
            assert (content.stat().st_atime > used + 5) is noted
            assert content.stat().st_mtime_ns == written


class TestTwoProcesses:
    """A process remembers records, and yet sees at once what another one does."""

    def test_a_new_version_is_seen_by_the_next_look(self, cache: Cache, peer: Peer) -> None:
        for number in range(20):
            store(cache, f"version {number}".encode())
            assert peer.call(load_there, cache.directory) == f"version {number}".encode()
            peer.call(store_there, cache.directory, f"theirs {number}".encode())
            assert load(cache) == f"theirs {number}".encode()

    def test_a_removal_is_seen_by_the_next_look(self, cache: Cache, peer: Peer) -> None:
        store(cache, b"content")
        assert peer.call(load_there, cache.directory) == b"content"
        with cache.writing(KEY, TIMEOUT):
            cache.remove(KEY)
        assert peer.call(load_there, cache.directory) is None

    def test_a_doubt_is_seen_by_the_next_look(self, cache: Cache, peer: Peer) -> None:
        peer.call(store_there, cache.directory, b"content")
        entry = cache.lookup(KEY)
        assert entry is not None
        os.close(entry.fd)
        peer.call(doubt_there, cache.directory)
        entry = cache.lookup(KEY)
        assert entry is not None
        assert entry.record.doubtful
        assert content_of(entry) == b"content"

    def test_a_new_version_between_the_looks_at_record_and_content(
        self, cache: Cache, peer: Peer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store(cache, b"old")

        def slow_open(record: Record, path: str) -> Entry | None:
            monkeypatch.undo()
            peer.call(store_there, cache.directory, b"new")
            return cache._open(record, path)

        monkeypatch.setattr(cache, "_open", slow_open)
        assert load(cache) == b"new"

    def test_one_writer_at_a_time(self, cache: Cache, peer: Peer) -> None:
        peer.call(begin_upload, cache.directory)
        assert cache.is_being_written(KEY)
        assert not cache.is_being_written("another key")
        with cache.writing_if_free(KEY) as free:
            assert not free
        with pytest.raises(WriteConflict), cache.writing(KEY, timeout=0):
            pytest.fail("two hold the lock")
        peer.kill()
        assert not cache.is_being_written(KEY)
        cache.sweep()

    def test_readers_see_a_whole_version_while_it_is_replaced(self, cache: Cache, peer: Peer) -> None:
        store(cache, version(0))
        peer.start(store_versions, cache.directory, VERSIONS)
        number = 0
        while number < VERSIONS:
            content = load(cache)
            if content is not None:  # between two versions there is none: a request waits for the writer
                assert number <= int(content[:3]) <= VERSIONS
                number = int(content[:3])
                assert content == version(number)
        peer.answer()


def version(number: int) -> bytes:
    """A content that names its version, and has a length of its own."""
    return f"{number:03}".encode() * (1000 + number)


def store_versions(directory: Path, count: int) -> None:
    """For a peer process: replace the copy a number of times."""
    for number in range(1, count + 1):
        store_there(directory, version(number))


def doubt_there(directory: Path) -> None:
    doubt(cache_in(directory))


class TestDoubt:
    def test_a_copy_that_is_doubted_is_still_there_and_says_so(self, cache: Cache) -> None:
        store(cache, b"content")
        before = record_of(cache)
        after = doubt(cache)
        assert after == replace(before, doubtful=True, generation=after.generation)
        assert load(cache) == b"content"
        assert cache.usage.read()[:2] == (1, 7)

    def test_a_doubt_is_settled(self, cache: Cache) -> None:
        store(cache, b"content")
        doubtful = doubt(cache)
        assert is_in_doubt(cache)
        settle(cache, doubtful.info)
        settled = record_of(cache)
        assert not is_in_doubt(cache)
        assert not settled.doubtful
        assert settled.validated > doubtful.validated
        assert settled.generation != doubtful.generation
        assert load(cache) == b"content"

    def test_a_fenced_copy_gets_the_new_etag(self, cache: Cache) -> None:
        store(cache, b"content")
        settle(cache, doubt(cache).info, etag="fenced")
        assert record_of(cache).info.etag == "fenced"
        assert load(cache) == b"content"

    def test_a_copy_without_a_doubt_is_not_touched(self, cache: Cache) -> None:
        store(cache, b"content")
        record = record_of(cache)
        settle(cache, record.info)
        assert record_of(cache) == record

    def test_a_copy_of_another_version_is_removed(self, cache: Cache) -> None:
        store(cache, b"old")
        settle(cache, replace(doubt(cache).info, etag="another"))
        assert load(cache) is None
        assert not is_in_doubt(cache)

    def test_an_acknowledged_version_ends_the_doubt(self, cache: Cache) -> None:
        store(cache, b"old")
        doubt(cache)
        store(cache, b"new")
        assert not is_in_doubt(cache)
        assert not record_of(cache).doubtful

    @pytest.mark.parametrize("end", ["publish", "acknowledge", "settle", "forget"])
    def test_a_lost_creation_may_land_after_a_deletion(self, cache: Cache, end: str) -> None:
        doubt_nothing(cache)
        if end == "publish":
            store(cache, b"next")
        with cache.writing(KEY, TIMEOUT):
            if end == "acknowledge":
                cache.acknowledge(KEY)
            elif end == "settle":
                cache.settle(info_of(b"next"), info_of(b"next"), time.time())
            elif end == "forget":
                cache.forget(KEY)
            assert not cache.doubt_of(KEY).concerns("etag", time.time())
            cache.remove(KEY)
        cache.sweep()
        assert is_in_doubt(cache)

    def test_a_lost_change_of_a_version_that_is_gone_cannot_land(self, cache: Cache) -> None:
        store(cache, b"old")
        doubt(cache)
        store(cache, b"new")
        assert not cache.location(KEY).doubt.exists()

    def test_a_dead_writers_change_may_concern_any_version(self, cache: Cache, peer: Peer) -> None:
        store(cache, b"content")
        peer.call(begin_upload, cache.directory)
        peer.kill()
        cache.recover_locks()
        assert cache.doubt_of(KEY).concerns("another", time.time())
        assert cache.doubt_of(KEY).concerns(None, time.time())
        cache.sweep()

    def test_each_doubt_is_a_new_one(self, cache: Cache) -> None:
        """What a worker has been told between two doubts says nothing after the second."""
        store(cache, b"content")
        first = doubt(cache)
        assert doubt(cache).generation != first.generation

    def test_the_longest_doubt_counts(self, cache: Cache) -> None:
        doubt_nothing(cache, 60)
        doubt_nothing(cache, 10)
        assert cache.doubt_of(KEY).concerns(None, time.time() + 50)
        doubt_nothing(cache, 100)
        assert cache.doubt_of(KEY).concerns(None, time.time() + 90)

    def test_a_doubt_that_is_over_is_swept(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        """The copy stays doubtful: the next reader asks once more."""
        store(cache, b"content")
        doubtful = doubt(cache)
        later = time.time() + 61
        monkeypatch.setattr(time, "time", lambda: later)
        assert not is_in_doubt(cache)
        cache.sweep()
        assert not cache.location(KEY).doubt.exists()
        assert record_of(cache) == doubtful

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b'{"lands_until": 1}',
            b'{"lands_until": {"*": "x"}}',
            b'{"lands_until": {"*": 1e300}}',
            b"{}",
        ],
    )
    def test_a_doubt_that_makes_no_sense_is_none(self, cache: Cache, content: bytes) -> None:
        """It may have been written while the clock was wrong, or by another version."""
        store(cache, b"content")
        cache.location(KEY).doubt.write_bytes(content)
        assert not is_in_doubt(cache)
        cache.sweep()
        assert not cache.location(KEY).doubt.exists()

    def test_nothing_to_doubt(self, cache: Cache) -> None:
        doubt_nothing(cache)
        assert load(cache) is None
        assert is_in_doubt(cache)

    def test_a_running_fill_is_not_published_after_a_doubt(self, cache: Cache) -> None:
        """It may have read the version before a commit whose outcome is unknown."""
        claim = durable.open_lock_file(cache.location(KEY).fill)
        assert durable.try_lock(claim)
        doubt_nothing(cache)
        assert not durable.is_file_at(claim, cache.location(KEY).fill)
        os.close(claim)


def doubt_nothing(cache: Cache, seconds: float = 60) -> None:
    with cache.writing(KEY, TIMEOUT):
        cache.doubt(KEY, None, time.time() + seconds)


class TestDeadWriters:
    """A dead writer leaves its lock; the next thread that takes it repairs the entry."""

    @pytest.mark.parametrize(
        "act",
        [
            lambda cache: cache.is_being_written(KEY),
            lambda cache: cache.recover_locks(),
            lambda cache: cache.sweep(),
            lambda cache: cache.writing_if_free(KEY).__enter__(),
            lambda cache: cache.writing(KEY, TIMEOUT).__enter__(),
            lambda cache: cache.remove_version(replace(record_of(cache), generation="another")),
            lambda cache: cache.evict(cache.location(KEY).content("another"), 0.0),
        ],
        ids=["reader", "start", "sweep", "publisher", "writer", "remove_version", "evict"],
    )
    def test_whoever_takes_the_lock_doubts_and_clears_up(
        self, cache: Cache, peer: Peer, act: Callable[[Cache], object]
    ) -> None:
        store(cache, b"content")
        peer.call(begin_upload, cache.directory)
        claim = durable.open_lock_file(cache.location(KEY).fill)
        assert durable.try_lock(claim)
        peer.kill()
        taken = act(cache)
        assert record_of(cache).doubtful
        assert not list(cache.location(KEY).record.parent.glob(f"{cache.location(KEY).digest}*.part"))
        assert not durable.is_file_at(claim, cache.location(KEY).fill)
        os.close(claim)
        del taken  # a context manager lets the lock go
        cache.sweep()

    def test_a_broken_entry_does_not_hide_a_dead_writer(self, cache: Cache, peer: Peer) -> None:
        """A reader of a broken entry takes the lock, too, and marks doubtful what the dead writer had published."""
        store(cache, b"old")
        old = record_of(cache)
        store(cache, b"new")
        peer.call(begin_upload, cache.directory)
        peer.kill()
        cache._remove_broken(cache.location(KEY), old)
        assert record_of(cache).doubtful
        cache.sweep()

    def test_a_sweep_marks_the_copy_of_a_dead_deletion_doubtful(self, cache: Cache, peer: Peer) -> None:
        """Nothing but its lock."""
        store(cache, b"content")
        peer.call(begin_deletion, cache.directory)
        peer.kill()
        cache.sweep()
        assert record_of(cache).doubtful

    def test_a_lock_of_something_else_is_cleared_away(self, cache: Cache, peer: Peer) -> None:
        peer.call(take_room_lock, cache.directory)
        peer.kill()
        cache.recover_locks()
        assert cache.locks.names() == []

    def test_the_living_are_left_alone(self, cache: Cache, peer: Peer) -> None:
        store(cache, b"content")
        peer.call(begin_upload, cache.directory)
        cache.recover_locks()
        assert cache.sweep() == 0
        assert not record_of(cache).doubtful
        assert sorted(problem.partition(":")[0] for problem in cache.check()) == [
            "a lock is left",
            "a spool file is left",
            "a temporary file is left",
            "a temporary file is left",
            "a temporary file is left",
        ]
        peer.kill()
        assert cache.sweep() == 3  # one part was cleared away with the lock
        assert record_of(cache).doubtful


def take_room_lock(directory: Path) -> None:
    _held.append(cache_in(directory).locks.try_acquire("room.lock"))


# Broken entries


def truncate(slot: Location, record: Record) -> None:
    os.truncate(slot.content(record.generation), record.info.size - 1)


def grow(slot: Location, record: Record) -> None:
    os.truncate(slot.content(record.generation), record.info.size + 1)


def lose_content(slot: Location, record: Record) -> None:
    slot.content(record.generation).unlink()


def write_garbage(slot: Location, record: Record) -> None:
    slot.record.write_bytes(b"\xff garbage")


def write_nothing(slot: Location, record: Record) -> None:
    slot.record.write_bytes(b"")


def write_other_json(slot: Location, record: Record) -> None:
    slot.record.write_bytes(b'{"info": {"key": "x"}, "generation": 1}')


def write_list(slot: Location, record: Record) -> None:
    slot.record.write_bytes(b"[1, 2]")


def write_other_key(slot: Location, record: Record) -> None:
    slot.record.write_bytes(replace(record, info=replace(record.info, key="another")).to_json())


def write_other_size(slot: Location, record: Record) -> None:
    slot.record.write_bytes(replace(record, info=replace(record.info, size=record.info.size + 1)).to_json())


def write_other_generation(slot: Location, record: Record) -> None:
    slot.record.write_bytes(replace(record, generation="0" * 16).to_json())


BREAKAGES = [
    truncate,
    grow,
    lose_content,
    write_garbage,
    write_nothing,
    write_other_json,
    write_list,
    write_other_key,
    write_other_size,
    write_other_generation,
]
broken = pytest.mark.parametrize("break_it", BREAKAGES, ids=lambda function: function.__name__)
BrokenBy = Callable[[Location, Record], None]


class TestBrokenEntries:
    @broken
    def test_it_counts_as_no_copy_and_is_removed(self, tmp_path: Path, break_it: BrokenBy) -> None:
        cache = Cache(tmp_path)
        store(cache, b"another's", "another")
        store(cache, b"content")
        break_it(cache.location(KEY), record_of(cache))
        assert load(cache) is None
        cache.sweep()  # the usage went by what the record said
        assert cache.check() == []
        assert load(cache, "another") == b"another's"
        store(cache, b"content")
        assert load(cache) == b"content"

    @broken
    def test_nothing_is_left_of_it_without_a_sweep(self, cache: Cache, break_it: BrokenBy) -> None:
        store(cache, b"content")
        break_it(cache.location(KEY), record_of(cache))
        assert load(cache) is None
        left = [path.name for path in cache.location(KEY).record.parent.iterdir()]
        # A record that names another file does not say which one was its own.
        assert left == [] or break_it is write_other_generation
        cache.sweep()

    @broken
    def test_a_process_that_remembers_the_entry_serves_nothing_wrong(
        self, tmp_path: Path, break_it: BrokenBy
    ) -> None:
        cache = Cache(tmp_path)
        store(cache, b"content")
        assert load(cache) == b"content"
        break_it(cache.location(KEY), record_of(cache))
        assert load(cache) in (None, b"content")
        store(cache, b"new one")
        assert load(cache) == b"new one"

    @broken
    def test_it_can_be_replaced_and_removed(self, tmp_path: Path, break_it: BrokenBy) -> None:
        cache = Cache(tmp_path)
        for heal in (lambda: store(cache, b"new one"), lambda: remove(cache)):
            store(cache, b"content")
            break_it(cache.location(KEY), record_of(cache))
            heal()
            assert load(cache) in (None, b"new one")
            cache.sweep()
            assert cache.check() == []

    @broken
    def test_entries_of_living_writers_are_left_alone(self, cache: Cache, break_it: BrokenBy) -> None:
        """A reader that finds the entry broken in the middle of a writer's work leaves it alone."""
        store(cache, b"content")
        with cache.writing(KEY, TIMEOUT):
            break_it(cache.location(KEY), record_of(cache))
            before = sorted(path.name for path in cache.location(KEY).record.parent.iterdir())
            assert load(cache) is None
            assert sorted(path.name for path in cache.location(KEY).record.parent.iterdir()) == before
        assert load(cache) is None
        cache.sweep()

    def test_the_same_request_fetches_it_again(self, start_server: Callable[..., Server]) -> None:
        server = start_server("azure")
        cache = Cache(server.cache_directory)
        for break_it in BREAKAGES:
            key = break_it.__name__
            url = f"{server.url}/{key}"
            requests.put(url, b"content", headers=server.headers()).raise_for_status()
            break_it(cache.location(key), record_of(cache, key))
            answer = requests.get(url)
            assert (answer.status_code, answer.content) == (200, b"content"), key
            assert answer.headers["X-Cache"] == "miss", key
            wait_until(lambda url=url: requests.get(url).headers["X-Cache"] == "hit", TIMEOUT, f"a copy of {key}")
            assert requests.get(url).content == b"content", key
        server.stop()
        cache.sweep()  # the usage still counts what was lost


def remove(cache: Cache) -> None:
    with cache.writing(KEY, TIMEOUT):
        cache.remove(KEY)


class TestFullDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        with small_disk(tmp_path / "disk", 256 * 1024) as folder:
            yield folder

    def test_a_version_that_cannot_be_published_leaves_nothing_not_even_the_old_one(self, disk: Path) -> None:
        cache = Cache(disk / "cache")
        store(cache, b"old")
        with cache.writing(KEY, TIMEOUT), cache.new_part(KEY) as part:
            part.write(b"new")
            fill_up(disk)
            with pytest.raises(InsufficientStorage):
                cache.publish(part, info_of(b"new"))
        assert load(cache) is None
        assert cache.check() == []

    def test_a_copy_whose_doubt_cannot_be_written_is_removed(self, disk: Path) -> None:
        cache = Cache(disk / "cache")
        store(cache, b"content")
        fill_up(disk)
        doubt_nothing(cache)
        assert load(cache) is None
        assert cache.check() == []

    def test_a_copy_whose_doubt_cannot_be_settled_stays_doubtful(self, disk: Path) -> None:
        cache = Cache(disk / "cache")
        store(cache, b"content")
        record = doubt(cache)
        fill_up(disk)
        settle(cache, record.info)
        assert record_of(cache) == record
        assert load(cache) == b"content"
        assert cache.check() == []

    def test_without_an_inode_for_a_lock_reading_goes_on(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 1024 * 1024, inodes=400) as disk:
            cache = Cache(disk / "cache")
            store(cache, b"content")
            store(cache, b"content", "broken")
            truncate(cache.location("broken"), record_of(cache, "broken"))
            doubtful = replace(record_of(cache), doubtful=True)
            use_up_inodes(disk)
            assert load(cache) == b"content"
            assert load(cache, "broken") is None
            cache.remove_version(doubtful)

    def test_without_space_for_the_usage_the_cache_still_works(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 1024 * 1024, inodes=400) as disk:
            cache = Cache(disk / "cache")
            store(cache, b"content")
            entry = cache.lookup(KEY)  # as long as it is open, its content keeps its inode
            assert entry is not None
            (cache.directory / "usage").unlink()
            use_up_inodes(disk).pop().unlink()  # one is left, for the lock
            remove(cache)
            assert load(cache) is None
            os.close(entry.fd)


class TestSweep:
    def test_it_leaves_a_good_directory_as_it_is(self, cache: Cache) -> None:
        for number in range(20):
            store(cache, b"content", str(number))
        assert cache.sweep() == 0
        assert cache.usage.read()[:2] == (20, 140)
        assert all(load(cache, str(number)) == b"content" for number in range(20))

    def test_it_corrects_the_usage(self, cache: Cache) -> None:
        store(cache, b"content")
        cache.usage.add(5, -1000, 0)
        cache.sweep()
        assert cache.usage.read()[:2] == (1, 7)

    def test_concurrent_changes_are_counted_once(self, cache: Cache) -> None:
        store(cache, b"content", "early")
        other = Cache(cache.directory)
        steps = cache.sweeping()
        next(steps)
        for number in range(20):
            store(other, b"content", str(number))
        other.remove("early")
        assert sum(steps) == 0
        assert cache.check() == []

    def test_concurrent_changes_that_are_not_counted_yet_are_counted_once(
        self, cache: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = Cache(cache.directory)
        count = other.usage.add

        def sweep_and_count(*numbers: int) -> None:
            assert cache.sweep() == 0
            count(*numbers)

        monkeypatch.setattr(other.usage, "add", sweep_and_count)
        store(other, b"content")
        assert cache.check() == []
        with other.writing(KEY, TIMEOUT):
            other.remove(KEY)
        assert cache.check() == []

    def test_it_corrects_a_usage_that_others_cannot_have_made_so(self, cache: Cache) -> None:
        for number in range(20):
            store(cache, b"content", str(number))
        cache.usage.add(100, 0, 0)
        other = Cache(cache.directory)
        steps = cache.sweeping()
        next(steps)
        store(other, b"content", "more")
        list(steps)
        assert cache.usage.read()[0] in (21, 22)
        cache.sweep()

    def test_it_leaves_other_programs_files_alone(self, cache: Cache) -> None:
        """The directory was configured to be one that holds something else."""
        foreign = cache.directory / "ab/cdef0123456789.pack"
        foreign.parent.mkdir()
        foreign.write_bytes(b"precious")
        assert cache.sweep() == 0
        assert foreign.read_bytes() == b"precious"

    def test_a_file_that_cannot_be_removed_does_not_end_the_sweep(self, cache: Cache) -> None:
        """In whatever order the file system has its folders."""
        dead = [Path(f"{cache.location(str(number)).stem}.dead.part") for number in range(12)]
        for path in dead:
            durable.NewFile(path).close()
        obstacles = [path.with_name(path.name.replace("dead", "a_folder")) for path in dead[::2]]
        for obstacle in obstacles:
            obstacle.mkdir()
        cache.sweep()
        assert not any(path.exists() for path in dead[1::2])
        for obstacle in obstacles:
            obstacle.rmdir()
        cache.sweep()
        assert not any(path.exists() for path in dead)

    def test_it_removes_what_a_loss_of_power_can_leave(self, cache: Cache) -> None:
        store(cache, b"content")
        slot = cache.location(KEY)
        slot.content("1" * 16).write_bytes(b"a version whose record was not renamed")
        lonely = cache.location("lonely")
        lonely.record.parent.mkdir(exist_ok=True)
        lonely.content("2" * 16).write_bytes(b"a content without a record")
        store(cache, b"content", "lost")
        lose_content(cache.location("lost"), record_of(cache, "lost"))
        assert len(cache.check()) == 4  # these, and the usage
        assert cache.sweep() == 3
        assert load(cache) == b"content"

    def test_two_at_once_do_no_harm(self, cache: Cache, peer: Peer) -> None:
        for number in range(50):
            store(cache, b"content", str(number))
            cache.new_part(str(number)).close()
        peer.start(sweep_there, cache.directory)
        cache.sweep()
        peer.answer()
        cache.sweep()  # each has corrected the usage by what it saw

    def test_it_does_not_disturb_running_writers(self, cache: Cache, peer: Peer) -> None:
        peer.start(store_versions, cache.directory, VERSIONS)
        sweeps = 0
        while sweeps < 2 or load(cache) != version(VERSIONS):
            assert cache.sweep() == 0
            sweeps += 1
        peer.answer()
        cache.sweep()


def sweep_there(directory: Path) -> None:
    cache_in(directory).sweep()


def leave_lock(cache: Cache) -> None:
    os.close(durable.open_lock_file(cache.locks.directory / cache.location(KEY).digest))


def leave_part(cache: Cache) -> None:
    cache.new_part(KEY).close()


def leave_claim(cache: Cache) -> None:
    os.close(durable.open_lock_file(cache.location(KEY).fill))


def leave_spool(cache: Cache) -> None:
    cache.new_spool().close()


def leave_content(cache: Cache) -> None:
    cache.location(KEY).content("1" * 16).write_bytes(b"")
    cache.usage.add(1, 0, 0)


def lose_usage(cache: Cache) -> None:
    (cache.directory / "usage").unlink()


class TestCheck:
    """Each kind of violation, alone, is found and named."""

    @pytest.mark.parametrize(
        ("violate", "problem"),
        [
            (leave_lock, "a lock is left"),
            (leave_part, "a temporary file is left"),
            (leave_claim, "a temporary file is left"),
            (leave_spool, "a spool file is left"),
            (leave_content, "no record names this file"),
            (lose_usage, r"usage says \(0, 0\), but there are 1 files, 7 bytes"),
        ],
    )
    def test_what_is_left(self, tmp_path: Path, violate: Callable[[Cache], None], problem: str) -> None:
        cache = Cache(tmp_path)
        store(cache, b"content")
        assert cache.check() == []
        violate(cache)
        [found] = cache.check()
        assert found.startswith(problem.replace("\\", ""))

    @pytest.mark.parametrize(
        ("break_it", "problems"),
        [
            (truncate, ["the content of 'folder/file.txt' has 6 bytes, its record says 7", "usage"]),
            (write_other_size, ["the content of 'folder/file.txt' has 7 bytes, its record says 8"]),
            (lose_content, ["a record has no content", "usage"]),
            (write_garbage, ["a record cannot be read", "no record names this file"]),
            (write_other_key, ["a record is under another key's name: 'another'"]),
            (write_other_generation, ["a record has no content", "no record names this file"]),
        ],
    )
    def test_what_is_broken(self, tmp_path: Path, break_it: BrokenBy, problems: list[str]) -> None:
        cache = Cache(tmp_path)
        store(cache, b"content")
        break_it(cache.location(KEY), record_of(cache))
        found = sorted(cache.check())
        assert [one for one, problem in zip(found, problems, strict=True) if not one.startswith(problem)] == []


class TestOperators:
    def test_emptying_the_directory_of_a_running_server_does_no_harm(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path / "cache")
        store(cache, b"content")
        with cache.writing("another", TIMEOUT):
            part = cache.new_part("another")
            part.write(b"content")
            for path in sorted(cache.directory.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            with pytest.raises(FileNotFoundError):
                cache.publish(part, info_of(b"content", "another"))
            part.discard()
        assert load(cache) is None
        store(cache, b"new one")
        assert load(cache) == b"new one"
        cache.sweep()
        assert cache.check() == []


def test_a_record_says_all_that_it_was_told() -> None:
    info = ObjectInfo("ä/b", 5, "etag", 1, "text/plain", "ab" * 32, b"\x00" * 16)
    record = Record(info, "generation", 1.5, doubtful=True)
    assert Record.from_json(record.to_json()) == record
    assert json.loads(record.to_json())["info"]["key"] == "ä/b"
