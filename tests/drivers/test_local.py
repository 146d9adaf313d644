# SPDX-License-Identifier: LGPL-2.1-or-later
"""The local driver, and the folder that it keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kci_storage import keys
from kci_storage.config.settings import Config, LocalConfig
from kci_storage.drivers import base
from kci_storage.drivers.base import LocalObjects, ObjectInfo, Sweepable
from kci_storage.drivers.local import driver as local
from kci_storage.drivers.local import properties, tree
from kci_storage.drivers.local.driver import LocalDriver
from kci_storage.errors import (
    BackendError,
    BadKey,
    InsufficientStorage,
    KeyConflict,
    ObjectChanged,
    ObjectNotFound,
    PreconditionFailed,
)
from tests.drivers.contract import (
    HOSTILE_KEYS,
    KIB,
    SOME,
    DriverContract,
    at_once,
    commit_over_anything,
    content_of,
    delete,
    digests_of,
    exists,
    get,
    in_pieces,
    listed,
    pages,
    put,
)
from tests.support.disks import plain_disk

fork = multiprocessing.get_context("fork")


def inside(root: Path) -> list[str]:
    """All that is in the folder, but for the empty folders that the driver keeps, and what locks are made of."""
    kept = {root / name for name in (".kci", ".kci/tmp", ".kci/lock", ".kci/meta", ".kci/markers")}
    own = {root / ".kci/meta", root / ".kci/markers"}
    found = (path for path in root.rglob("*") if path not in kept and path.parent not in own)
    return sorted(str(path.relative_to(root)) for path in found)


class TestLocalDriver(DriverContract):
    @pytest.fixture
    def driver(self, tmp_path, monkeypatch):
        monkeypatch.setattr(local, "PAGE_SIZE", 7)
        monkeypatch.setattr(base, "PIECE_SIZE", 64 * KIB)
        root = tmp_path / ("storage" * 30)  # so deep that the longest keys make no path that the system takes
        assert len(os.fsencode(root)) + len(HOSTILE_KEYS["longest"].encode()) > tree.PATH_MAX
        return LocalDriver(root)

    def leftovers(self, driver):
        return inside(driver._tree.root)


class TestWithoutAttributes(TestLocalDriver):
    """On a file system without extended attributes: records are files of their own."""

    @pytest.fixture
    def driver(self, tmp_path, monkeypatch):
        monkeypatch.setattr(local, "PAGE_SIZE", 7)
        monkeypatch.setattr(base, "PIECE_SIZE", 64 * KIB)
        with plain_disk(tmp_path / "disk") as disk:
            yield LocalDriver(disk / ("storage" * 30))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of the driver."""
    return tmp_path / "storage"


@pytest.fixture
def plain_root(tmp_path: Path) -> Iterator[Path]:
    """Such a folder on a file system without extended attributes."""
    with plain_disk(tmp_path / "disk") as disk:
        yield disk / "storage"


def records_in(root: Path) -> list[Path]:
    """The records that are files of their own."""
    return list((root / ".kci/meta").rglob("*.json"))


@pytest.fixture
def driver(root: Path) -> LocalDriver:
    """A driver with its usual sizes."""
    return LocalDriver(root)


def by_hand(path: Path, content: bytes = b"by hand") -> None:
    """Put a file where an operator would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# Files as they lie there


def test_an_object_is_a_plain_file_at_its_key(driver, root):
    put(driver, "folder/a.txt", b"content")
    assert (root / "folder/a.txt").read_bytes() == b"content"
    assert stat.S_IMODE((root / "folder/a.txt").stat().st_mode) & 0o444 == 0o444


def test_a_file_put_there_by_hand_is_an_object(driver, root):
    by_hand(root / "folder/a", content_of(SOME))
    info = driver.stat("folder/a")
    assert (info.size, info.content_type, info.sha256, info.md5) == (SOME, None, None, None)
    assert info.last_modified == int((root / "folder/a").stat().st_mtime)
    assert get(driver, "folder/a", etag=info.etag) == content_of(SOME)
    assert driver.list().objects == (info,)
    delete(driver, "folder/a")
    assert not exists(driver, "folder/a")


def replace(path: Path, content: bytes) -> None:
    """Put another file in a file's place."""
    by_hand(path.with_name("new"), content)
    path.with_name("new").rename(path)


@pytest.mark.parametrize("change", [by_hand, replace])
def test_a_file_changed_by_hand_has_nothing_of_the_upload(driver, root, change):
    uploaded = put(driver, "folder/a", b"content", "text/plain")
    change(root / "folder/a", b"CONTENT")
    info = driver.stat("folder/a")
    assert (info.size, info.content_type, info.sha256) == (7, None, None)
    assert info.etag != uploaded.etag
    assert LocalDriver(root).stat("folder/a") == info
    with pytest.raises(ObjectChanged):
        driver.read("folder/a", etag=uploaded.etag)
    with pytest.raises(PreconditionFailed):
        put(driver, "folder/a", b"new", expected=uploaded.etag)
    put(driver, "folder/a", b"new", "image/png", expected=info.etag)
    assert driver.stat("folder/a").content_type == "image/png"


def test_each_change_by_hand_is_another_version(driver, root):
    etags = set()
    for number in range(3):
        by_hand(root / "a", str(number).encode())
        os.utime(root / "a", ns=(0, number))
        etags.add(driver.stat("a").etag)
    assert len(etags) == 3


def test_a_file_that_is_changed_while_it_is_read_is_not_mixed(driver, root, monkeypatch):
    monkeypatch.setattr(base, "PIECE_SIZE", 1000)
    by_hand(root / "a", content_of(3000))
    for change in (lambda path: path.write_bytes(b"x" * 3000), lambda path: os.truncate(path, 100)):
        os.utime(root / "a", (0, 0))  # many kernels' clock for files stands still for some milliseconds
        with driver.read("a") as reader:
            pieces = iter(reader)
            next(pieces)
            change(root / "a")
            with pytest.raises(ObjectChanged):
                list(pieces)


def test_another_process_tells_the_same_of_an_object(driver, root):
    info = put(driver, "a", content_of(SOME), "text/plain")
    assert LocalDriver(root).stat("a") == info
    assert LocalDriver(root).list().objects == (info,)


@pytest.mark.parametrize("damaged", [b"{", b"[]", b"{}", b'{"of": 1}', b"\xff"])
def test_a_damaged_record_is_none(driver, root, damaged):
    put(driver, "a", b"content", "text/plain")
    os.setxattr(root / "a", properties.ATTRIBUTE, damaged)
    assert LocalDriver(root).stat("a").content_type is None


def test_a_record_is_on_its_file_and_goes_where_that_goes(driver, root):
    info = put(driver, "a", b"content", "text/plain")
    assert records_in(root) == []
    (root / "folder").mkdir()
    (root / "a").rename(root / "folder/b")
    assert driver.stat("folder/b") == dataclasses.replace(info, key="folder/b")


def test_a_copy_that_keeps_times_and_attributes_keeps_the_records(driver, root, tmp_path):
    """A backup, restored."""
    info = put(driver, "folder/a", b"content", "text/plain")
    shutil.copytree(root, tmp_path / "restored")
    assert LocalDriver(tmp_path / "restored").stat("folder/a") == info


def test_an_upload_makes_one_file_and_deletes_none(driver, root, monkeypatch):
    """ext4 searches past the inodes of files that were deleted lately whenever one is made."""
    put(driver, "folder/a", b"content")  # the folders are there, and a marker for the lock
    made, deleted = [], []
    real_open, real_unlink = os.open, os.unlink

    def counted_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        made.extend([path] if flags & os.O_CREAT else [])
        return real_open(path, flags, *args, **options)

    def counted_unlink(path: Any, **options: Any) -> None:
        deleted.extend([path] if os.stat(path).st_nlink == 1 else [])
        real_unlink(path, **options)

    monkeypatch.setattr(os, "open", counted_open)
    monkeypatch.setattr(os, "unlink", counted_unlink)
    put(driver, "folder/b", b"content", "text/plain")
    assert (len(made), deleted) == (1, [])


def test_a_type_as_long_as_can_be_is_kept(driver, root):
    content_type = "text/" + "x" * 250
    put(driver, "a", b"content", content_type)
    assert LocalDriver(root).stat("a").content_type == content_type


def test_a_record_that_is_too_large_for_its_file_gets_one_of_its_own(driver, root):
    content_type = "text/" + "x" * 70_000  # no file system holds as much
    put(driver, "a", b"content", content_type)
    assert len(records_in(root)) == 1
    assert LocalDriver(root).stat("a").content_type == content_type


def test_a_damaged_file_of_a_record_is_none(plain_root):
    put(LocalDriver(plain_root), "a", b"content", "text/plain")
    [record] = records_in(plain_root)
    record.write_text("{")
    assert LocalDriver(plain_root).stat("a").content_type is None


def test_an_upload_leaves_no_record_of_the_version_before(plain_root):
    for number in range(3):
        put(LocalDriver(plain_root), "a", content_of(number))
    assert len(records_in(plain_root)) == 1


def test_what_is_remembered_is_bounded_and_right(driver, monkeypatch):
    monkeypatch.setattr(properties, "REMEMBERED", 3)
    infos = [put(driver, f"object-{number}", b"", f"x/{number}") for number in range(10)]
    assert [driver.stat(info.key) for info in infos] == infos
    assert [driver.stat(info.key) for info in reversed(infos)] == infos[::-1]
    assert len(driver._records._memory) == 3


def test_opening_what_is_remembered_is_one_open_and_one_look(driver, monkeypatch):
    put(driver, "folder/a", b"content")
    os.close(driver.open("folder/a")[1])
    calls = []
    for name in ("open", "fstat", "stat", "lstat", "read", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    fd = driver.open("folder/a")[1]
    assert calls == ["open", "fstat"]
    os.close(fd)


def test_it_has_the_optional_abilities(driver):
    assert isinstance(driver, LocalObjects)
    assert isinstance(driver, Sweepable)


# What is no object


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_no_object(driver, root):
    root.mkdir()
    os.mkfifo(root / "pipe")
    os.symlink("nowhere", root / "dangling")
    os.symlink("loop", root / "loop")
    os.mknod(root / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3)) if os.geteuid() == 0 else None
    (root / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        with contextlib.chdir(root):
            listener.bind("socket")
        for key in ("pipe", "dangling", "loop", "device", "folder", "socket"):
            assert not exists(driver, key)
            with pytest.raises(ObjectNotFound):
                delete(driver, key)
    assert listed(driver) == []


def test_names_that_are_no_keys_are_not_listed(driver, root):
    put(driver, "good", b"")
    for name in ("back\\slash", "control\x01", "metrics", "v1/x", ".kci/x", "fine/control\x7f/x"):
        by_hand(root / name)
    by_hand(Path(os.fsdecode(os.fsencode(root) + b"/not-utf-8-\xff")))
    by_hand(Path(os.fsdecode(os.fsencode(root) + b"/folder-\xff/x")))
    by_hand(root / "upload/x")
    assert listed(driver) == listed(driver, details=False) == ["good", "upload/x"]
    assert driver.list(delimiter="/").folders == ("upload/",)


def test_links_by_the_operator_are_followed(driver, root, tmp_path):
    by_hand(tmp_path / "elsewhere/file", b"linked")
    root.mkdir()
    os.symlink(tmp_path / "elsewhere/file", root / "link")
    os.symlink(tmp_path / "elsewhere", root / "folder")
    for key in ("link", "folder/file"):
        assert get(driver, key) == b"linked"
    assert listed(driver) == ["folder/file", "link"]
    delete(driver, "link")
    assert not exists(driver, "link")
    assert (tmp_path / "elsewhere/file").read_bytes() == b"linked"


def test_an_upload_replaces_a_link_and_not_what_it_leads_to(driver, root, tmp_path):
    by_hand(tmp_path / "file", b"linked")
    root.mkdir()
    os.symlink(tmp_path / "file", root / "link")
    put(driver, "link", b"uploaded")
    assert get(driver, "link") == b"uploaded"
    assert (tmp_path / "file").read_bytes() == b"linked"


def test_a_listing_ends_where_links_go_round(driver, root):
    put(driver, "a/b/c", b"")
    os.symlink(root / "a", root / "a/b/round")
    os.symlink(root, root / "self")
    os.symlink("b", root / "a/twice")
    assert listed(driver) == ["a/b/c", "a/twice/c"]
    assert driver.list(delimiter="/").folders == ("a/",)


# Files and folders in each other's way

IN_THE_WAY = pytest.mark.parametrize(
    ("first", "second", "culprit"), [("a", "a/b/c", '"a" is a file'), ("a/b/c", "a/b", '"a/b" is a folder')]
)


@IN_THE_WAY
def test_a_key_that_is_in_the_way_is_named_before_the_upload(driver, root, first, second, culprit):
    put(driver, first, b"first")
    before = inside(root)
    with pytest.raises(KeyConflict, match=culprit):
        driver.writer(second, "text/plain")
    assert inside(root) == before


@IN_THE_WAY
def test_a_key_that_gets_in_the_way_meanwhile_is_named_by_the_commit(driver, root, first, second, culprit):
    with driver.writer(second, "text/plain") as writer:
        writer.write(b"second")
        put(driver, first, b"first")
        before = [name for name in inside(root) if not name.startswith(".kci/tmp")]
        with pytest.raises(KeyConflict, match=culprit):
            writer.commit(digests_of(b"second"), None)
    assert inside(root) == before
    assert get(driver, first) == b"first"


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_empty_folders_are_in_nobodys_way(driver, root, when):
    if when == "before":
        (root / "a/b/c").mkdir(parents=True)
    with driver.writer("a", "text/plain") as writer:
        writer.write(b"content")
        if when == "meanwhile":
            (root / "a/b/c").mkdir(parents=True)
        writer.commit(digests_of(b"content"), None)
    assert get(driver, "a") == b"content"


def test_a_folder_that_holds_something_else_is_in_the_way(driver, root):
    (root / "a/b").mkdir(parents=True)
    os.mkfifo(root / "a/b/pipe")
    with pytest.raises(KeyConflict):
        driver.writer("a", "text/plain")
    assert (root / "a/b/pipe").exists()


def test_a_link_to_an_empty_folder_does_not_cost_that_folder(driver, root, tmp_path):
    (tmp_path / "elsewhere/empty").mkdir(parents=True)
    root.mkdir()
    os.symlink(tmp_path / "elsewhere", root / "a")
    with pytest.raises(KeyConflict):
        driver.writer("a", "text/plain")
    assert (tmp_path / "elsewhere/empty").is_dir()


def test_deleting_the_last_object_of_a_folder_removes_it(driver, root):
    put(driver, "a/b/c/d", b"")
    put(driver, "a/e", b"")
    delete(driver, "a/b/c/d")
    assert [path.name for path in (root / "a").iterdir()] == ["e"]
    delete(driver, "a/e")
    assert inside(root) == []


def test_a_folder_that_somebody_else_removed_does_not_keep_those_above(driver, root):
    (root / "a/b").mkdir(parents=True)
    driver._tree.prune("a/b/c/d")
    assert inside(root) == []


def test_a_failed_commit_leaves_no_folders(driver, root):
    put(driver, "x", b"")
    before = inside(root)
    with pytest.raises(PreconditionFailed):
        put(driver, "a/b/c", b"content", expected="made-up")
    assert inside(root) == before


def test_uploads_and_deletions_in_one_folder_do_not_disturb_each_other(driver, root):
    def work(number: int) -> None:
        for _ in range(15):  # each is flushed several times
            put(driver, f"a/b/{number}", b"content", f"x/{number}")
            assert driver.stat(f"a/b/{number}").content_type == f"x/{number}"
            delete(driver, f"a/b/{number}")

    assert at_once(*(lambda number=number: work(number) for number in range(4))) == [None] * 4
    assert inside(root) == []


def in_child(function: Callable[[], object]) -> object:
    """Start a process that runs a function, and whose exit code says whether it returned something true."""
    child = fork.Process(target=lambda: os._exit(0 if function() else 1))
    child.start()
    return child


def test_of_several_processes_that_expect_nothing_one_gets_through(root):
    def attempt(number: int) -> bool:
        try:
            put(LocalDriver(root), "a", content_of(SOME, number), expected=None)
        except PreconditionFailed:
            return False
        return True

    children = [in_child(lambda number=number: attempt(number)) for number in range(5)]
    for child in children:
        child.join()
    assert sorted(child.exitcode for child in children) == [0, 1, 1, 1, 1]


# Listing


def test_a_listing_is_in_the_order_of_the_keys_bytes(driver, monkeypatch):
    monkeypatch.setattr(local, "PAGE_SIZE", 3)
    names = ["a-", "a.txt", "a/b", "a/b.c", "a/b-/x", "a/bc/1", "a0", "B", "z", "é", "日本/x", "🙂", "\uffee"]
    for name in names:
        put(driver, name, b"")
    assert listed(driver) == sorted(names, key=str.encode)
    assert listed(driver, prefix="a/b") == ["a/b", "a/b-/x", "a/b.c", "a/bc/1"]


@pytest.mark.parametrize("settled", [True, False])
def test_folders_larger_than_a_window_are_listed_in_full(driver, root, monkeypatch, settled):
    monkeypatch.setattr(tree, "WINDOW", 5)
    monkeypatch.setattr(local, "PAGE_SIZE", 7)
    monkeypatch.setattr(tree, "SETTLED", 0 if settled else 10**18)
    expected = sorted([f"x/{number:02}" for number in range(23)] + [f"x/{number:02}-/y" for number in range(23)])
    for key in expected:
        by_hand(root / key)
    assert listed(driver) == expected
    assert bool(driver._tree._windows._latest) == settled
    put(driver, "x/99", b"")
    found = []
    for number, page in enumerate(pages(driver)):
        found += [info.key for info in page.objects]
        if number == 1:
            by_hand(root / "x/22-/z")
            by_hand(root / "x/98")
    assert found == sorted([*expected, "x/22-/z", "x/98", "x/99"])


def test_windows_of_few_folders_are_kept(driver, root, monkeypatch):
    monkeypatch.setattr(tree, "WINDOW", 2)
    monkeypatch.setattr(tree, "WINDOWS_KEPT", 3)
    monkeypatch.setattr(tree, "SETTLED", 0)
    for folder, file in ((folder, file) for folder in range(9) for file in range(5)):
        by_hand(root / f"{folder}/{file}")
    assert len(listed(driver)) == 45
    assert len(driver._tree._windows._latest) == 3


def test_folders_that_vanish_from_under_a_listing_are_no_failure(driver, root, monkeypatch):
    for number in range(9):
        put(driver, f"folder-{number}/a", b"")
    real = tree._entries

    def deleting(fd: int) -> Iterator[str]:
        names = list(real(fd))
        for number in (3, 5):
            with contextlib.suppress(ObjectNotFound):
                delete(driver, f"folder-{number}/a")
        yield from names

    monkeypatch.setattr(tree, "_entries", deleting)
    assert listed(driver) == [f"folder-{number}/a" for number in (0, 1, 2, 4, 6, 7, 8)]


def test_files_that_vanish_from_under_a_listing_are_no_failure(driver, root, monkeypatch):
    for number in range(9):
        put(driver, f"object-{number}", b"")
    real = driver._tree.walk

    def deleting(*args: object) -> Iterator[tuple[str, int]]:
        for key, fd in real(*args):
            if key == "object-4":
                (root / key).unlink()
            yield key, fd

    monkeypatch.setattr(driver._tree, "walk", deleting)
    assert [info.key for info in driver.list().objects] == [f"object-{number}" for number in (0, 1, 2, 3, 5, 6, 7, 8)]


@pytest.mark.parametrize("size", [6, 7, 8, 14])
def test_the_last_page_says_so(driver, monkeypatch, size):
    monkeypatch.setattr(local, "PAGE_SIZE", 7)
    for number in range(size):
        put(driver, f"{number:02}", b"")
    assert [len(page.objects) for page in pages(driver)] == [7] * (size // 7) + ([size % 7] if size % 7 else [])


def list_while_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """What is listed when an object is replaced after it was looked at; the object before, and afterwards."""
    old = put(LocalDriver(root), "a", b"old", "text/plain")
    lister = LocalDriver(root)
    real = lister._records.read

    def replaced(*args: object) -> object:
        monkeypatch.setattr(lister._records, "read", real)
        infos.append(put(LocalDriver(root), "a", b"newer", "image/png"))
        return real(*args)

    infos: list[ObjectInfo] = []
    monkeypatch.setattr(lister._records, "read", replaced)
    return list(lister.list().objects), old, *infos


def test_an_object_that_is_replaced_while_it_is_listed_is_listed(root, monkeypatch):
    listed, old, _ = list_while_replaced(root, monkeypatch)
    assert listed == [old]


def test_an_object_whose_record_goes_while_it_is_listed_is_listed(plain_root, monkeypatch):
    listed, _, new = list_while_replaced(plain_root, monkeypatch)
    assert listed == [new]


# Crashes


def crash(driver: LocalDriver, at: str) -> None:
    """Let a process die in mid-upload of ``a``: while it writes, or within its commit."""

    def upload() -> None:
        with driver.writer("a", "text/plain") as writer:
            writer.write(b"content")
            if at == "writing":
                os._exit(9)
            setattr(driver, "_place_content" if at == "placing" else "_place", lambda *args: os._exit(9))
            commit_over_anything(driver, "a", writer, b"content")

    child = fork.Process(target=upload)
    child.start()
    child.join()
    assert child.exitcode == 9


def test_a_sweep_removes_a_record_that_a_crash_has_left(plain_root):
    check_a_sweep_after_a_crash(LocalDriver(plain_root), plain_root, "committing", files=3)


@pytest.mark.parametrize(("at", "files"), [("writing", 1), ("committing", 2)])
def test_a_sweep_removes_what_a_crash_has_left(driver, root, at, files):
    check_a_sweep_after_a_crash(driver, root, at, files)


def check_a_sweep_after_a_crash(driver: LocalDriver, root: Path, at: str, files: int) -> None:
    previous = put(driver, "a", b"previous", "image/png")
    before = inside(root)
    crash(driver, at)
    assert len(inside(root)) == len(before) + files
    assert driver.stat("a") == previous
    assert driver.recover() == files
    assert inside(root) == before
    assert driver.stat("a") == previous
    assert driver.sweep() == 0


def test_a_record_whose_content_was_not_renamed_any_more_goes_with_its_lock(plain_root):
    root, driver = plain_root, LocalDriver(plain_root)
    previous = put(driver, "a", b"previous", "image/png")
    before = inside(root)
    crash(driver, "placing")
    assert len(inside(root)) == len(before) + 3  # the record, the content's temporary file, the lock
    assert driver.recover() == 3
    assert inside(root) == before
    crash(driver, "placing")
    next_one = put(driver, "a", b"next", "image/png")  # whoever takes the lock sees to it
    assert LocalDriver(root).stat("a") == next_one != previous
    assert len(records_in(root)) == 1


def test_a_recovery_takes_nothing_from_those_who_write(driver, root):
    with driver.writer("a", "text/plain") as writer, driver._locked("a"):
        writer.write(b"content")
        before = inside(root)
        assert LocalDriver(root).recover() == 0
        assert inside(root) == before


def test_a_recovery_makes_no_folders(tmp_path):
    assert LocalDriver(tmp_path / "storage").recover() == 0
    assert not (tmp_path / "storage").exists()


def test_a_crash_blocks_nobody(driver):
    crash(driver, "committing")
    put(driver, "a", b"next")
    assert get(driver, "a") == b"next"


def test_a_sweep_removes_records_of_what_was_changed_or_removed_by_hand(plain_root):
    root, driver = plain_root, LocalDriver(plain_root)
    for key in ("changed", "removed", "kept", "folder/x"):
        put(driver, key, b"content", "text/plain")
    by_hand(root / "changed")
    (root / "removed").unlink()
    (root / "folder/x").unlink()
    (root / "folder").rmdir()
    assert driver.sweep() == 3
    assert LocalDriver(root).stat("kept").content_type == "text/plain"


def test_a_sweep_of_nothing_is_no_failure(driver):
    assert driver.sweep() == 0


def test_a_sweep_takes_nothing_from_those_who_write(driver, root):
    done = threading.Event()

    def sweep() -> int:
        other, removed = LocalDriver(root), 0
        while not done.is_set():
            removed += other.sweep()
        return removed

    def write() -> None:
        try:
            for number in range(60):
                with driver.writer(f"folder/{number % 3}", f"x/{number}") as writer:
                    for piece in in_pieces(content_of(SOME), 100_000):
                        writer.write(piece)
                    commit_over_anything(driver, f"folder/{number % 3}", writer, content_of(SOME))
                assert LocalDriver(root).stat(f"folder/{number % 3}").content_type == f"x/{number}"
        finally:
            done.set()

    sweeping, writing = at_once(sweep, write)
    assert writing is None
    assert isinstance(sweeping, int)


def test_a_sweep_waits_for_the_commit_that_has_written_its_record(plain_root, monkeypatch):
    """The record comes before the content that it is of: for a moment it looks like an orphan."""
    root, driver = plain_root, LocalDriver(plain_root)
    place = driver._place_content
    swept = []

    def slow_place(*args: object) -> None:
        sweeping = threading.Thread(target=lambda: swept.append(LocalDriver(root).sweep()))
        sweeping.start()
        sweeping.join(0.2)
        assert not swept
        place(*args)
        threads.append(sweeping)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(driver, "_place_content", slow_place)
    put(driver, "a", b"content", "text/plain")
    threads[0].join()
    assert swept == [0]
    assert LocalDriver(root).stat("a").content_type == "text/plain"


def test_what_is_committed_is_on_the_disk_in_the_right_order(driver, root, monkeypatch):
    """The content, its time and its record, then the object's name, then the folder that says so.

    And a new folder in the one above it, before there is anything in it.
    """
    done = watch(root, monkeypatch)
    put(driver, "folder/a", b"1")
    in_order = [("fsync", "temporary"), ("rename", "folder"), ("fsync", "folder")]
    assert done == [("fsync", "."), *in_order]
    done.clear()
    put(driver, "folder/a", b"2")
    assert done == in_order
    done.clear()
    delete(driver, "folder/a")
    assert done == [("fsync", "folder")]


def test_a_record_is_on_the_disk_before_its_object(plain_root, monkeypatch):
    """The contents and their times, then the record's name, then the object's, then the folders that say so."""
    done = watch(plain_root, monkeypatch)
    driver = LocalDriver(plain_root)
    put(driver, "folder/a", b"1")
    new_folders = [("fsync", ".kci"), ("fsync", ".kci/meta"), ("fsync", ".")]
    in_order = [
        ("fsync", "temporary"), ("fdatasync", "temporary"),
        ("rename", "record"), ("rename", "folder"),
        ("fsync", "record"), ("fsync", "folder"),
    ]  # fmt: skip
    assert done == new_folders[:2] + in_order[:3] + new_folders[2:] + in_order[3:]
    done.clear()
    put(driver, "folder/a", b"2")
    assert done == in_order


def watch(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed from now on."""
    done: list[tuple[str, str]] = []

    def name_of(fd: int) -> str:
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), root)
        return "temporary" if path.startswith(".kci/tmp/") else "record" if path.startswith(".kci/meta/") else path

    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, name=name, real=real: done.append((name, name_of(fd))) or real(fd))
    rename = os.rename
    monkeypatch.setattr(
        os,
        "rename",
        lambda source, target, dst_dir_fd=None: (
            done.append(("rename", name_of(dst_dir_fd))) or rename(source, target, dst_dir_fd=dst_dir_fd)
        ),
    )
    return done


# When the disk or the system fails


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes during the block: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_insufficient_storage(driver, root):
    put(driver, "a", b"previous")
    before = inside(root)
    with largest_file(100 * KIB), pytest.raises(InsufficientStorage):
        put(driver, "a", content_of(SOME))
    assert inside(root) == before
    assert get(driver, "a") == b"previous"


@pytest.fixture
def shared_root() -> Iterator[Path]:
    """A folder that every user can get to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder, "storage")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, who may do everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_the_server_may_not_use_is_an_error_and_not_missing(shared_root):
    driver = LocalDriver(shared_root)
    put(driver, "open/a", b"content")
    put(driver, "closed/b", b"content")
    (shared_root / "open/a").chmod(0)
    (shared_root / "closed").chmod(0)
    fresh = LocalDriver(shared_root)
    try:
        with as_nobody():
            attempts = [
                lambda: fresh.read("open/a"),
                lambda: fresh.stat("closed/b"),
                lambda: fresh.read("closed/b"),
                lambda: fresh.open("closed/b"),
                lambda: delete(fresh, "closed/b"),
                lambda: put(fresh, "closed/c", b"new"),
            ]
            for attempt in attempts:
                with pytest.raises(BackendError) as caught:
                    attempt()
                assert str(shared_root) not in caught.value.message
            assert listed(fresh) == listed(fresh, details=False) == ["open/a"]
    finally:
        (shared_root / "closed").chmod(0o755)


def test_a_storage_folder_that_cannot_be_written_to_fails_the_probe(shared_root):
    driver = LocalDriver(shared_root)
    driver.probe()
    for path in (shared_root, shared_root / ".kci", shared_root / ".kci/tmp"):
        path.chmod(0o555)
    try:
        with as_nobody_for_access(), pytest.raises(BackendError):
            driver.probe()
    finally:
        for path in (shared_root, shared_root / ".kci", shared_root / ".kci/tmp"):
            path.chmod(0o755)


@contextlib.contextmanager
def as_nobody_for_access() -> Iterator[None]:
    """The same for ``access(2)``, which asks for the real user."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_storage_path_that_is_a_file_is_an_error(driver, root):
    root.write_bytes(b"")
    for attempt in (driver.probe, lambda: put(driver, "a", b"content")):
        with pytest.raises(BackendError) as caught:
            attempt()
        assert str(root) not in caught.value.message
    with pytest.raises(ObjectNotFound):
        driver.stat("a")


def test_a_storage_folder_that_is_not_there_yet_is_empty(driver, root):
    assert not exists(driver, "a")
    assert listed(driver) == []
    assert not root.exists()
    driver.probe()
    assert listed(driver) == []


def test_a_name_that_the_file_system_does_not_take_is_a_bad_key(driver, root, monkeypatch):
    """As on a file system with shorter names than usual (eCryptfs takes 143 bytes)."""
    long = "x" * 300
    monkeypatch.setattr(keys, "MAX_SEGMENT_BYTES", 300)
    for ask in (driver.stat, driver.read, driver.open, partial(driver.delete, expected="etag")):
        with pytest.raises(ObjectNotFound):
            ask(f"folder/{long}")
    for key in (long, f"folder/{long}", f"{long}/a"):
        with pytest.raises(BadKey):
            put(driver, key, b"content")
    assert inside(root) == []


def test_a_version_lasts_as_long_as_its_file(driver, root):
    """A copy of the whole folder with its times, on another disk, keeps the content and makes new versions."""
    put(driver, "a", b"content", "text/plain")
    status = (root / "a").stat()
    (root / "a").rename(root / "b")
    (root / "a").write_bytes(b"content")
    os.utime(root / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert driver.stat("a").content_type is None


def test_the_time_of_an_object_is_that_of_its_commit(driver):
    with driver.writer("a", "text/plain") as writer:
        writer.write(b"content")
        os.utime(writer._file.fileno(), (0, 0))
        before = int(time.time())
        assert writer.commit(digests_of(b"content"), None).last_modified >= before


def test_it_is_made_from_the_configuration(root):
    driver = LocalDriver.from_config(Config(path=Path("config.toml"), local=LocalConfig(root)))
    put(driver, "a", b"content")
    assert (root / "a").read_bytes() == b"content"
