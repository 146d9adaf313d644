# SPDX-License-Identifier: LGPL-2.1-or-later
"""Drivers for tests, installed like a third party's package: one with a cache in front, and one that pauses."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from kci_storage import drivers
from kci_storage.config.settings import Config
from kci_storage.drivers.base import Digests, Driver, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.drivers.local.driver import LocalDriver

PAUSES_VARIABLE = "KCI_STORAGE_TEST_PAUSES"
BEHIND_VARIABLE = "KCI_STORAGE_TEST_BEHIND"
ROOT = Path(__file__).parents[2]


def install(folder: Path) -> str:
    """Make a package of these drivers, "remote" and "pausing", in a folder; returns the ``PYTHONPATH`` for it."""
    metadata = folder / "kci_storage_tests-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kci-storage-tests\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[{drivers.GROUP}]\nremote = {__name__}:RemoteDriver\npausing = {__name__}:PausingDriver\n"
    )
    return f"{folder}{os.pathsep}{ROOT}"


class WrappingDriver(Driver):
    """A driver that delegates to another one, without that one's optional abilities."""

    def __init__(self, inner: Driver):
        self.inner = inner
        self.wants_md5 = inner.wants_md5

    def stat(self, key: str) -> ObjectInfo:
        return self.inner.stat(key)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        return self.inner.read(key, start, stop, etag)

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        return self.inner.writer(key, content_type, tags)

    def delete(self, key: str, expected: str) -> None:
        self.inner.delete(key, expected)

    def fence(self, key: str, expected: str) -> ObjectInfo | None:
        return self.inner.fence(key, expected)

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        return self.inner.list(prefix, delimiter, marker, details)

    def probe(self) -> None:
        self.inner.probe()

    def close(self) -> None:
        self.inner.close()


class RemoteDriver(WrappingDriver):
    """The local driver, with the cache in front, as if its files were on another machine."""

    @classmethod
    def from_config(cls, config: Config) -> RemoteDriver:
        return cls(LocalDriver.from_config(config))


class PausingDriver(WrappingDriver):
    """A driver that pauses at certain points, as long as a file with the point's name exists.

    The points are ``before-commit``, ``after-commit``, ``before-delete``, ``after-delete``, and ``in-read``, when the
    backend has answered. The environment names the driver that does the work.
    """

    @classmethod
    def from_config(cls, config: Config) -> PausingDriver:
        return cls(drivers.load(os.environ[BEHIND_VARIABLE]).from_config(config))

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        return _PausingWriter(self.inner.writer(key, content_type, tags))

    def delete(self, key: str, expected: str) -> None:
        with _pausing("delete"):
            self.inner.delete(key, expected)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        reader = self.inner.read(key, start, stop, etag)
        _pause("in-read")
        return reader


class _PausingWriter(ObjectWriter):
    def __init__(self, inner: ObjectWriter):
        self._inner = inner

    def write(self, data: bytes | memoryview) -> None:
        self._inner.write(data)

    def flush(self) -> None:
        self._inner.flush()

    def commit(
        self,
        digests: Digests,
        expected: str | None,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        with _pausing("commit"):
            return self._inner.commit(digests, expected, replay)

    def abort(self) -> None:
        self._inner.abort()


@contextlib.contextmanager
def _pausing(name: str) -> Iterator[None]:
    _pause(f"before-{name}")
    yield
    _pause(f"after-{name}")


def _pause(point: str) -> None:
    pauses = Path(os.environ[PAUSES_VARIABLE])
    if (pauses / point).exists():
        (pauses / f"{point}.{secrets.token_hex(4)}-{os.getpid()}").touch()
        while (pauses / point).exists():
            time.sleep(0.005)


class Pauses:
    """The points at which servers with a :class:`PausingDriver` pause.

    :param folder: empty.
    :param behind: the driver that does the work.
    """

    def __init__(self, folder: Path, behind: str):
        self._folder = folder
        self.environ = {
            PAUSES_VARIABLE: str(folder),
            BEHIND_VARIABLE: behind,
            "PYTHONPATH": install(folder / "packages"),
        }

    @contextlib.contextmanager
    def during(self, point: str) -> Iterator[None]:
        """Have each thread that reaches the point during the block pause until the block's end."""
        (self._folder / point).touch()
        try:
            yield
        finally:
            (self._folder / point).unlink()
            for path in self._folder.glob(f"{point}.*"):
                path.unlink()

    def waiting(self, point: str) -> list[int]:
        """The process ID of each thread that pauses at the point."""
        return [int(path.name.rpartition("-")[2]) for path in self._folder.glob(f"{point}.*")]
