# SPDX-License-Identifier: LGPL-2.1-or-later
"""The claim of a fill: a small file that the thread that fetches has locked, and that holds the object's record."""

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
    """A claim's open file, which the filler locks. It is closed, and so unlocked, at the end of the claim's block.

    :param fd: the open file; closed with the claim.
    """

    def __init__(self, location: Location, fd: int):
        self._location = location
        self._fd = fd
        self._status = os.fstat(fd)

    @classmethod
    def at(cls, location: Location) -> Claim:
        """Open the key's claim, created if there is none.

        :raises InsufficientStorage: the disk is full.
        """
        return cls(location, durable.open_lock_file(location.fill))

    def try_lock(self) -> bool:
        """Lock the claim without waiting; whether that worked."""
        return durable.try_lock(self._fd)

    def is_current(self) -> bool:
        """Whether new requests still find this claim: its path leads to this file."""
        try:
            return os.path.samestat(self._status, os.stat(self._location.fill))
        except FileNotFoundError:
            return False

    def read(self) -> Record | None:
        """The record of the object that is fetched; None: the backend has not answered yet."""
        with contextlib.suppress(ValueError):
            return Record.from_json(os.pread(self._fd, os.fstat(self._fd).st_size, 0))
        return None

    def write(self, record: Record) -> None:
        """Tell other threads and processes what is fetched.

        :raises InsufficientStorage: the disk is full.
        """
        durable.write_lock_file(self._fd, record.to_json())

    def file(self) -> durable.NewFile:
        """The claim's file, to become the cache's record. It is closed with the claim."""
        return durable.NewFile(self._location.fill, self._fd)

    def part(self, record: Record) -> Path:
        """The path of the part file."""
        return self._location.part(record.generation)

    def read_if_alive(self) -> tuple[ObjectInfo, Path] | None:
        """The object that is fetched, and its part file; None: not known yet, or the filler died."""
        record = self.read()
        if record is None or not durable.is_locked(self.part(record)):
            return None
        return record.info, self.part(record)

    def withdraw(self) -> None:
        """Remove the claim from its path. The caller holds its lock."""
        if self.is_current():
            durable.remove(self._location.fill)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._fd)


def open_claim(location: Location) -> Claim:
    """Open the key's claim for reading.

    :raises FileNotFoundError: there is none.
    """
    return Claim(location, os.open(location.fill, os.O_RDONLY | os.O_CLOEXEC))
