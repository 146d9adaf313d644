# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counters in a file, shared by several processes."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import portalocker

from kci_storage.errors import InsufficientStorage
from kci_storage.files.durable import _full_disk_is_insufficient_storage, open_lock_file


class SharedCounters:
    """A few numbers in a file, to which many processes add. They start at 0, and are not flushed to the disk.

    The file has its full length from the beginning, so that a full disk later does no harm.

    :param path: the file; created if it is missing, and reset if it has another length.
    :param count: how many numbers.
    """

    def __init__(self, path: Path, count: int):
        self._format = struct.Struct(f"<{count}q")
        self._path = path
        with contextlib.suppress(InsufficientStorage):
            self.read()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        fd = open_lock_file(self._path)
        try:
            portalocker.lock(fd, portalocker.LockFlags.EXCLUSIVE)
            with _full_disk_is_insufficient_storage():
                yield fd
        finally:
            os.close(fd)

    def add(self, *amounts: int) -> None:
        """Add to the numbers.

        :param amounts: one for each number.
        :raises InsufficientStorage: the disk is full.
        """
        with self._locked() as fd:
            os.pwrite(fd, self._format.pack(*map(int.__add__, self._numbers(fd), amounts)), 0)

    def read(self) -> tuple[int, ...]:
        """The numbers.

        :raises InsufficientStorage: the disk is full, and the file does not exist yet.
        """
        with self._locked() as fd:
            return self._numbers(fd)

    def _numbers(self, fd: int) -> tuple[int, ...]:
        data = os.pread(fd, self._format.size + 1, 0)
        if len(data) == self._format.size:
            return self._format.unpack(data)
        os.ftruncate(fd, 0)
        os.pwrite(fd, bytes(self._format.size), 0)
        return self._format.unpack(bytes(self._format.size))
