# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file is complete or does not exist: after a kill, on a full disk, and with many writers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kci_storage.errors import InsufficientStorage
from kci_storage.files import durable
from kci_storage.files.counters import SharedCounters
from kci_storage.files.durable import NewFile
from tests.support.disks import fill_up, small_disk, use_up_inodes
from tests.support.peers import Peer, peers
from tests.support.steps import spy


@pytest.fixture
def peer() -> Iterator[Peer]:
    with peers(1) as [one]:
        yield one


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    with small_disk(tmp_path / "disk", 256 * 1024) as folder:
        yield folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestNewFile:
    def test_nothing_has_the_final_name_before_it_is_published(self, tmp_path: Path) -> None:
        with NewFile(tmp_path / "temporary") as file:
            file.write(b"con")
            file.write(b"tent")
            assert names(tmp_path) == ["temporary"]
            assert file.size == 7
            file.publish(tmp_path / "final")
        assert names(tmp_path) == ["final"]
        assert (tmp_path / "final").read_bytes() == b"content"

    def test_it_is_discarded_unless_published(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), NewFile(tmp_path / "temporary") as file:
            file.write(b"content")
            raise ZeroDivisionError
        assert names(tmp_path) == []

    def test_discarding_leaves_alone_what_has_its_name_by_now(self, tmp_path: Path) -> None:
        with NewFile(tmp_path / "temporary"):
            (tmp_path / "temporary").unlink()
            (tmp_path / "temporary").write_bytes(b"another's")
        assert (tmp_path / "temporary").read_bytes() == b"another's"

    def test_it_replaces_a_file_without_touching_its_content(self, tmp_path: Path) -> None:
        (tmp_path / "final").write_bytes(b"old")
        with (tmp_path / "final").open("rb") as reader, NewFile(tmp_path / "temporary") as file:
            file.write(b"new one")
            file.publish(tmp_path / "final")
            assert reader.read() == b"old"
        assert (tmp_path / "final").read_bytes() == b"new one"

    def test_two_cannot_have_one_name(self, tmp_path: Path) -> None:
        with NewFile(tmp_path / "temporary"), pytest.raises(FileExistsError):
            NewFile(tmp_path / "temporary")

    def test_a_name_that_cannot_be_taken_leaves_the_file_to_be_discarded(self, tmp_path: Path) -> None:
        (tmp_path / "final").mkdir()
        with NewFile(tmp_path / "temporary") as file:
            with pytest.raises(IsADirectoryError):
                file.publish(tmp_path / "final")
            assert names(tmp_path) == ["final", "temporary"]
        assert names(tmp_path) == ["final"]

    def test_a_missing_folder_is_made(self, tmp_path: Path) -> None:
        with NewFile.unnamed(tmp_path / "a/b") as file:
            assert file.path.parent == tmp_path / "a/b"

    def test_it_can_take_a_name_in_an_open_folder(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        fd = os.open(tmp_path / "folder", os.O_RDONLY)
        try:
            with NewFile(tmp_path / "temporary") as file:
                assert not file.named
                file.take_name(b"final", fd)
                assert file.named
        finally:
            os.close(fd)
        assert names(tmp_path / "folder") == ["final"]

    def test_its_stamp_is_now_and_what_the_file_keeps(self, tmp_path: Path) -> None:
        with NewFile(tmp_path / "temporary") as file:
            os.utime(file.fileno(), ns=(0, 0))
            before = time.time_ns()
            stamp = file.stamp()
            file.publish(tmp_path / "final")
        assert before - 1 <= stamp.st_mtime_ns <= time.time_ns()
        assert (tmp_path / "final").stat().st_mtime_ns == stamp.st_mtime_ns

    def test_room_that_is_reserved_makes_it_no_longer(self, disk: Path) -> None:
        with NewFile(disk / "temporary") as file:
            file.write(b"con")
            file.reserve(128 * 1024)
            status = os.stat(file.fileno())
            assert status.st_size == 3 and status.st_blocks * 512 >= 128 * 1024
            file.write(b"tent")
            file.publish(disk / "final")
        assert (disk / "final").read_bytes() == b"content"

    def test_room_that_there_is_not_is_no_error_before_it_is_needed(self, disk: Path) -> None:
        with NewFile(disk / "temporary") as file:
            file.reserve(1024 * 1024)
            file.write(bytes(128 * 1024))
            with pytest.raises(InsufficientStorage):
                file.write(bytes(1024 * 1024))

    def test_truncating_is_seen_through_other_descriptors(self, tmp_path: Path) -> None:
        with NewFile(tmp_path / "temporary") as file:
            file.write(b"wrong")
            with (tmp_path / "temporary").open("rb") as reader:
                file.truncate()
                assert (reader.read(), file.size) == (b"", 0)

    def test_the_disk_has_the_content_before_the_name_and_the_name_before_it_returns(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with NewFile(tmp_path / "temporary") as file:
            calls = spy(monkeypatch, "fdatasync", "rename", "fsync")
            file.write(b"content")
            file.publish(tmp_path / "final")
        assert calls == [
            ("fdatasync", str(tmp_path / "temporary")),
            ("rename", str(tmp_path / "temporary")),
            ("fsync", str(tmp_path)),
        ]


class TestFullDisk:
    def test_a_full_disk_raises_and_leaves_nothing(self, disk: Path) -> None:
        durable.write_file(disk / "final", b"old")
        with pytest.raises(InsufficientStorage), NewFile(disk / "temporary") as file:
            file.write(bytes(1024 * 1024))
        assert names(disk) == ["final"]
        assert (disk / "final").read_bytes() == b"old"

    def test_a_file_is_replaced_whole_or_not_at_all(self, disk: Path) -> None:
        durable.write_file(disk / "final", b"old")
        fill_up(disk)
        with pytest.raises(InsufficientStorage):
            durable.write_file(disk / "final", bytes(64 * 1024))
        assert names(disk) == ["ballast", "final"]
        assert (disk / "final").read_bytes() == b"old"

    def test_it_counts_what_was_written_when_a_write_was_cut(self, disk: Path) -> None:
        with NewFile(disk / "temporary") as file:
            with pytest.raises(InsufficientStorage):
                file.write(bytes(1024 * 1024))
            assert file.size == os.fstat(file.fileno()).st_size

    @pytest.mark.parametrize(
        "make",
        [
            NewFile.unnamed,
            lambda folder: durable.open_lock_file(folder / "lock"),
            lambda folder: durable.make_directory(folder / "a"),
        ],
        ids=["temporary", "lock", "folder"],
    )
    def test_no_inode_left(self, tmp_path: Path, make: Callable[[Path], object]) -> None:
        with small_disk(tmp_path / "disk", 1024 * 1024, inodes=20) as disk:
            use_up_inodes(disk)
            with pytest.raises(InsufficientStorage):
                make(disk)


class TestTemporaryFilesAndTheirWriters:
    """A temporary file is locked while it is written, so that a sweep can tell whether its writer is alive."""

    def test_a_living_writers_file_is_left_alone(self, tmp_path: Path, peer: Peer) -> None:
        with NewFile(tmp_path / "temporary") as file:
            assert not peer.call(durable.remove_if_unlocked, tmp_path / "temporary")
            assert not durable.remove_if_unlocked(tmp_path / "temporary")
            file.write(b"content")
            assert not peer.call(durable.remove_if_unlocked, tmp_path / "temporary")
        assert not durable.remove_if_unlocked(tmp_path / "temporary")

    def test_a_dead_writers_file_is_removed(self, tmp_path: Path, peer: Peer) -> None:
        peer.call(leave_open, tmp_path / "temporary")
        assert not durable.remove_if_unlocked(tmp_path / "temporary")
        peer.kill()
        assert durable.remove_if_unlocked(tmp_path / "temporary")
        assert names(tmp_path) == []

    def test_those_of_dead_writers_are_removed_from_a_folder(self, tmp_path: Path, peer: Peer) -> None:
        folder = tmp_path / "folder"
        assert durable.remove_abandoned(folder) == 0
        peer.call(leave_open, folder / "dead 1")
        peer.call(leave_open, folder / "dead 2")
        (folder / "a folder").mkdir()  # it cannot be removed, and keeps nothing else
        with NewFile(folder / "living"):
            assert durable.remove_abandoned(folder) == 0
            peer.kill()
            assert durable.remove_abandoned(folder) == 2
            assert names(folder) == ["a folder", "living"]

    def test_it_is_distinguished_from_another_file_of_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A new file gets the name between the check of the dead one and its removal."""
        path = tmp_path / "temporary"
        path.touch()

        def slow_lock(fd: int) -> bool:
            monkeypatch.undo()
            path.unlink()
            files.append(NewFile(path))
            return durable.try_lock(fd)

        files: list[NewFile] = []
        monkeypatch.setattr(durable, "try_lock", slow_lock)
        assert not durable.remove_if_unlocked(path)
        with files[0]:
            assert path.exists()

    def test_a_sweep_between_creation_and_lock_takes_no_file_from_its_writer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "temporary"

        def slow_lock(fd: int) -> bool:
            monkeypatch.undo()
            assert durable.remove_if_unlocked(path)
            return durable.try_lock(fd)

        monkeypatch.setattr(durable, "try_lock", slow_lock)
        with NewFile(path) as file:
            assert durable.is_file_at(file.fileno(), path)

    def test_a_sweep_that_holds_the_lock_at_that_moment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "temporary"
        swept = []

        def slow_lock(fd: int) -> bool:
            monkeypatch.undo()
            with durable.abandoned(path) as status:
                swept.append(status)
                locked = durable.try_lock(fd)
                durable.remove(path)
            return locked

        monkeypatch.setattr(durable, "try_lock", slow_lock)
        with NewFile(path) as file:
            assert swept != [None]
            assert durable.is_file_at(file.fileno(), path)
            assert not durable.remove_if_unlocked(path)


_open_files: list[NewFile] = []


def leave_open(path: Path) -> None:
    """For a peer process: stop in the middle of writing a file."""
    _open_files.append(NewFile(path))
    _open_files[-1].write(b"half of")


class TestWriteFile:
    def test_readers_see_the_old_or_the_new_content_whole(self, tmp_path: Path, peer: Peer) -> None:
        path = tmp_path / "file"
        durable.write_file(path, content_of(0))
        peer.start(rewrite, path, 50)  # each time it is flushed
        seen = set()
        while 50 not in seen:
            number = int(path.read_bytes().partition(b" ")[0])
            assert path.read_bytes() in (content_of(n) for n in range(number, 51))
            seen.add(number)
        peer.answer()
        assert names(tmp_path) == ["file"]


def content_of(number: int) -> bytes:
    """A content that contains its version, and whose length depends on it."""
    return f"{number} ".encode() * (10_000 + number)


def rewrite(path: Path, times: int) -> None:
    """For a peer process: replace a file a number of times."""
    for number in range(1, times + 1):
        durable.write_file(path, content_of(number))


class TestLockFiles:
    def test_it_says_whether_it_made_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "folder/lock"
        first, made_first = durable.open_or_make_lock_file(path)
        second, made_second = durable.open_or_make_lock_file(path)
        assert (made_first, made_second) == (True, False)
        assert durable.try_lock(first)
        assert not durable.try_lock(second)
        os.close(first)
        assert durable.try_lock(second)
        os.close(second)


class TestSharedCounters:
    def test_no_addition_is_lost_among_processes(self, tmp_path: Path) -> None:
        counters = SharedCounters(tmp_path / "counters", 2)
        with peers(4) as others:
            for other in others:
                other.start(count, tmp_path / "counters", 1000)
            for other in others:
                other.answer()
        assert counters.read() == (4000, -8000)

    def test_they_outlive_their_process(self, tmp_path: Path, peer: Peer) -> None:
        peer.call(count, tmp_path / "counters", 3)
        peer.kill()
        assert SharedCounters(tmp_path / "counters", 2).read() == (3, -6)

    @pytest.mark.parametrize("content", [b"", b"short", bytes(1000)], ids=["empty", "short", "long"])
    def test_a_broken_file_begins_anew(self, tmp_path: Path, content: bytes) -> None:
        counters = SharedCounters(tmp_path / "counters", 2)
        counters.add(1, 1)
        (tmp_path / "counters").write_bytes(content)
        assert counters.read() == (0, 0)
        (tmp_path / "counters").write_bytes(content)
        counters.add(3, 4)
        assert counters.read() == (3, 4)

    def test_a_disk_that_is_full_later_does_not_matter(self, disk: Path) -> None:
        counters = SharedCounters(disk / "counters", 64)
        fill_up(disk)
        counters.add(*range(64))
        assert counters.read() == tuple(range(64))

    def test_without_room_from_the_beginning_it_says_so(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 1024 * 1024, inodes=20) as disk:
            ballast = use_up_inodes(disk)
            counters = SharedCounters(disk / "counters", 1)
            with pytest.raises(InsufficientStorage):
                counters.add(1)
            ballast.pop().unlink()
            counters.add(2)
            assert counters.read() == (2,)

    def test_a_file_that_somebody_removed_begins_anew(self, tmp_path: Path) -> None:
        counters = SharedCounters(tmp_path / "folder/counters", 1)
        counters.add(1)
        (tmp_path / "folder/counters").unlink()
        (tmp_path / "folder").rmdir()
        counters.add(2)
        assert counters.read() == (2,)


def count(path: Path, times: int) -> None:
    """For a peer process: add a number of times."""
    counters = SharedCounters(path, 2)
    for _ in range(times):
        counters.add(1, -2)
