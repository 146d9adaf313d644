# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guard around every driver: invalid keys are neither asked for nor shown, and only whole contents are stored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from kci_storage.config.settings import Config
from kci_storage.drivers.base import LocalObjects, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.drivers.guard import GuardedDriver, GuardedFiles
from kci_storage.drivers.local.driver import LocalDriver
from kci_storage.errors import BackendError, BadKey, ObjectNotFound
from tests.drivers.contract import DriverContract, content_of, digests_of, get, listed, put
from tests.support.backends import WrappingDriver

INVALID = ["", "/", "a//b", "a/", "../a", "a/./b", "v1/x", ".kci/x", "upload", "x" * 256, "a\n", "\ud800", "a\\b"]


class TestGuardedDriver(DriverContract):
    """It keeps the contract itself."""

    @pytest.fixture
    def driver(self, tmp_path: Path) -> GuardedDriver:
        return GuardedDriver(LocalDriver(tmp_path / "storage"))

    @pytest.fixture
    def production_driver(self, driver: GuardedDriver) -> GuardedDriver:
        return driver


class Recorder(WrappingDriver):
    """A driver that remembers what it was asked, and lists names that another program has left."""

    def __init__(self, root: Path):
        super().__init__(LocalDriver(root))
        self.asked: list[str] = []
        self.stray: list[str] = []

    @classmethod
    def from_config(cls, config: Config) -> Recorder:
        return cls(config.local.storage_path)

    def stat(self, key: str) -> ObjectInfo:
        self.asked.append(key)
        return super().stat(key)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        self.asked.append(key)
        return super().read(key, start, stop, etag)

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        self.asked.append(key)
        return super().writer(key, content_type, tags)

    def delete(self, key: str, expected: str) -> None:
        self.asked.append(key)
        super().delete(key, expected)

    def fence(self, key: str, expected: str) -> ObjectInfo | None:
        self.asked.append(key)
        return super().fence(key, expected)

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        self.asked.append(prefix)
        stray = [ObjectInfo(name, 0, "x", 0) for name in self.stray if not name.endswith("/")]
        return Page(tuple(stray), tuple(name for name in self.stray if name.endswith("/")), "next")

    def open(self, key: str) -> tuple[ObjectInfo, int]:
        self.asked.append(key)
        assert isinstance(self.inner, LocalObjects)
        return self.inner.open(key)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    """A driver to be guarded."""
    return Recorder(tmp_path / "storage")


@pytest.mark.parametrize("key", INVALID)
def test_an_invalid_key_reaches_no_driver(recorder: Recorder, key: str) -> None:
    driver = GuardedDriver(recorder)
    for ask in (driver.stat, driver.read, GuardedFiles(recorder).open):
        with pytest.raises(ObjectNotFound):
            ask(key)
    for change in (driver.delete, driver.fence):
        with pytest.raises(ObjectNotFound):
            change(key, "etag")
    with pytest.raises(BadKey):
        driver.writer(key, "text/plain")
    assert recorder.asked == []


def test_valid_keys_do(recorder: Recorder) -> None:
    driver = GuardedDriver(recorder)
    put(driver, "a/b", b"content")
    assert get(driver, "a/b") == b"content"
    info, fd = GuardedFiles(recorder).open("a/b")
    os.close(fd)
    assert driver.stat("a/b") == info
    assert driver.fence("a/b", info.etag) == info
    driver.delete("a/b", info.etag)
    assert recorder.asked == ["a/b"] * 6


def test_names_that_are_no_keys_are_not_shown(recorder: Recorder) -> None:
    recorder.stray = ["good", *INVALID, "a//", "folder/", "v1/", ".kci/", "x" * 256 + "/"]
    page = GuardedDriver(recorder).list()
    assert [info.key for info in page.objects] == ["good"]
    assert page.folders == ("a/", "folder/")
    assert page.next_marker == "next", "an empty page may have a successor"


@pytest.mark.parametrize(
    ("prefix", "asked"),
    [
        ("", True),
        ("a/", True),
        (".kci", True),
        ("uploa", True),
        ("upload", True),
        ("a/..", True),
        ("x" * 255, True),
        ("é" * 127, True),
        ("a/../", False),
        ("a//", False),
        ("/", False),
        (".kci/", False),
        ("v1/a", False),
        ("x" * 256, False),
        ("a\x00", False),
        ("\ud800", False),
        ("a/" * 600, False),
    ],
)
def test_a_prefix_that_no_key_can_have_reaches_no_driver(recorder: Recorder, prefix: str, asked: bool) -> None:
    page = GuardedDriver(recorder).list(prefix)
    assert recorder.asked == ([prefix] if asked else [])
    assert asked or page == Page(())


@pytest.mark.parametrize("written", [0, 99, 101])
def test_a_commit_of_another_size_stores_nothing(recorder: Recorder, written: int) -> None:
    driver = GuardedDriver(recorder)
    with driver.writer("a", "text/plain") as writer:
        for byte in bytes(written):
            writer.write(bytes([byte]))
        with pytest.raises(BackendError, match="not all"):
            writer.commit(digests_of(content_of(100)), None)
    assert recorder.inner.list().objects == ()
    assert listed(GuardedDriver(recorder.inner)) == []


class ReplayingWriter(ObjectWriter):
    """A writer that must send the whole content once more."""

    def __init__(self) -> None:
        self.received = b""

    def write(self, data: bytes | memoryview) -> None:
        """Lost."""

    def flush(self) -> None:
        """Nothing."""

    def commit(self, digests, expected=None, replay=None) -> ObjectInfo:
        self.received = b"".join(replay())
        return ObjectInfo("a", digests.size, "x", 0)

    def abort(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("replayed", [b"", b"conten", b"contents"])
def test_a_content_that_is_sent_again_must_be_whole(recorder: Recorder, monkeypatch, replayed: bytes) -> None:
    writer = ReplayingWriter()
    monkeypatch.setattr(recorder, "writer", lambda *args: writer)
    guarded = GuardedDriver(recorder).writer("a", "text/plain")
    guarded.write(b"content")
    with pytest.raises(BackendError, match="not all"):
        guarded.commit(digests_of(b"content"), None, replay=lambda: [replayed])
    guarded.commit(digests_of(b"content"), None, replay=lambda: [b"con", b"tent"])
    assert writer.received == b"content"
