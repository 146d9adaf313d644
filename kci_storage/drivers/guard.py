# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks that are the same for every driver: which keys it may be asked for and may list, and the size of a commit.

Other programs may store objects under names that this server cannot serve, and a client may ask for any name. Since
the guard is around every driver, a driver itself need not know which keys are valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kci_storage.drivers.base import (
    Digests,
    Driver,
    LocalObjects,
    ObjectInfo,
    ObjectReader,
    ObjectWriter,
    Page,
)
from kci_storage.errors import BackendError, ObjectNotFound
from kci_storage.keys import check, is_valid


class GuardedDriver(Driver):
    """A driver around another one, which asks it for valid keys only, and lists no others."""

    def __init__(self, driver: Driver):
        self._driver = driver
        self.wants_md5 = driver.wants_md5

    @classmethod
    def from_config(cls, config: Any) -> Driver:
        """Not possible: it is made around a driver."""
        raise TypeError("a GuardedDriver is made around another driver")

    def stat(self, key: str) -> ObjectInfo:
        _check_readable(key)
        return self._driver.stat(key)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        _check_readable(key)
        return self._driver.read(key, start, stop, etag)

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        """Begin a new version.

        :raises BadKey: the key breaks a rule.
        """
        return GuardedWriter(self._driver.writer(check(key), content_type, tags))

    def delete(self, key: str, expected: str) -> None:
        _check_readable(key)
        self._driver.delete(key, expected)

    def fence(self, key: str, expected: str) -> ObjectInfo | None:
        _check_readable(key)
        return self._driver.fence(key, expected)

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        if not (is_valid(prefix) or is_valid(prefix + "x")):  # no key starts so
            return Page(())
        return _shown(self._driver.list(prefix, delimiter, marker, details))

    def probe(self) -> None:
        self._driver.probe()

    def close(self) -> None:
        self._driver.close()


class GuardedFiles:
    """The ability of a driver to open objects as local files, for valid keys only.

    It implements :class:`~kci_storage.drivers.base.LocalObjects`.
    """

    def __init__(self, driver: LocalObjects):
        self._driver = driver

    def open(self, key: str) -> tuple[ObjectInfo, int]:
        """The object's properties and a descriptor of its content, which the caller closes.

        :raises ObjectNotFound: there is none.
        """
        _check_readable(key)
        return self._driver.open(key)


class GuardedWriter(ObjectWriter):
    """A writer around another one, which commits only the whole content."""

    def __init__(self, writer: ObjectWriter):
        self._writer = writer
        self._size = 0  # bytes written

    @property
    def held(self) -> int:
        return self._writer.held

    def flush(self) -> None:
        self._writer.flush()

    def write(self, data: bytes | memoryview) -> None:
        self._writer.write(data)
        self._size += len(data)

    def commit(
        self,
        digests: Digests,
        expected: str | None,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        _check_size(self._size, digests)
        return self._writer.commit(digests, expected, None if replay is None else lambda: _whole(replay(), digests))

    def abort(self) -> None:
        self._writer.abort()


def _check_readable(key: str) -> None:
    if not is_valid(key):
        raise ObjectNotFound("no such file")


def _shown(page: Page) -> Page:
    """A page without invalid keys, and without folders that can have no valid key below them."""
    return Page(
        tuple(info for info in page.objects if is_valid(info.key)),
        tuple(folder for folder in page.folders if is_valid(folder + "x")),
        page.next_marker,
    )


def _whole(pieces: Iterable[bytes], digests: Digests) -> Iterator[bytes]:
    """The pieces of a replayed content.

    :raises BackendError: after the last piece, if their size is not that of the upload.
    """
    size = 0
    for piece in pieces:
        size += len(piece)
        yield piece
    _check_size(size, digests)


def _check_size(size: int, digests: Digests) -> None:
    if size != digests.size:
        raise BackendError("not all of the content was written", detail=f"{size} of {digests.size} B")
