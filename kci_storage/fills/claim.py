# SPDX-License-Identifier: LGPL-2.1-or-later
"""The claim: the small file whose lock says who fetches an object, and whose content says what that is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Self

from kci_storage.cache.entry import Record
from kci_storage.cache.names import Location
from kci_storage.drivers.base import ObjectInfo
from kci_storage.files import durable


class Claim:
    """The file whose lock says who fetches an object. Closed at the end of its block, and thereby unlocked.

    :param fd: the file, opened; closed with the claim.
    """

    def __init__(self, location: Location, fd: int):
        self._location = location
        self._fd = fd
        self._status = os.fstat(fd)

    @classmethod
    def at(cls, location: Location) -> Claim:
        """The claim that is there, or a new one.

        :raises InsufficientStorage: it cannot be made.
        """
        return cls(location, durable.open_lock_file(location.fill))

    def try_lock(self) -> bool:
        """Lock it if it is free now; whether that worked."""
        return durable.try_lock(self._fd)

    def is_current(self) -> bool:
        """Whether newcomers still find it."""
        try:
            return os.path.samestat(self._status, os.stat(self._location.fill))
        except FileNotFoundError:
            return False

    def read(self) -> Record | None:
        """What is fetched; None when nobody knows yet."""
        with contextlib.suppress(ValueError):
            return Record.from_json(os.pread(self._fd, os.fstat(self._fd).st_size, 0))
        return None

    def write(self, record: Record) -> None:
        """Tell the others what is fetched.

        :raises InsufficientStorage: the disk is full.
        """
        durable.write_lock_file(self._fd, record.to_json())

    def file(self) -> durable.NewFile:
        """What was written, to become the cache's record. It is closed with the claim."""
        return durable.NewFile(self._location.fill, self._fd)

    def part(self, record: Record) -> Path:
        """The path of the part file."""
        return self._location.part(record.generation)

    def read_living(self) -> tuple[ObjectInfo, Path] | None:
        """What is fetched, and where to; None also when that was written by a filler that died."""
        record = self.read()
        if record is None or not durable.is_locked(self.part(record)):
            return None
        return record.info, self.part(record)

    def withdraw(self) -> None:
        """Take it from its path. The caller holds its lock."""
        if self.is_current():
            durable.remove(self._location.fill)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._fd)


def open_claim(location: Location) -> Claim:
    """The claim that is there, to be read.

    :raises FileNotFoundError: there is none.
    """
    return Claim(location, os.open(location.fill, os.O_RDONLY | os.O_CLOEXEC))
