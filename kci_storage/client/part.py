# SPDX-License-Identifier: LGPL-2.1-or-later
"""Partial downloads, the only files that the client writes.

A part is ``<name>.<digest of the URL>.part`` beside the target, with a ``.json`` that records its version. Both are
kept when a download is interrupted. Only a complete and verified file replaces the target.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Self

from kci_storage.client.errors import ClientError, Corrupt
from kci_storage.client.paths import part_name
from kci_storage.client.storage import PIECE_SIZE, Properties


class Part:
    """The part of one file. It is locked until the end of the ``with`` block.

    :param target: the file that it will become; its folder is made.
    :param source: the URL of the content.
    :raises ClientError: another process is downloading the same file to the same target.
    :raises OSError: it cannot be written.
    """

    def __init__(self, target: Path, source: str):
        self.target = target
        self.path = target.with_name(part_name(target.name, source))
        self._record = Path(f"{self.path}.json")
        if target.is_dir():
            raise ClientError(f"{target} is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._fd = self._opened()
        self.version = self._read_record()
        self._digest = hashlib.sha256()
        self.size = 0  # bytes
        self._published = False
        if self.version is None:
            os.ftruncate(self._fd, 0)
        else:
            self._read_content()

    def _opened(self) -> int:
        """Open and lock the part's file; again if it was renamed or removed before the lock was acquired."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                        return fd
            except BlockingIOError:
                os.close(fd)
                raise ClientError(f"another download to {self.target} is running") from None
            os.close(fd)

    def _read_record(self) -> Properties | None:
        try:
            version = Properties(**json.loads(self._record.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return version if version.etag and os.fstat(self._fd).st_size <= version.size else None

    def _read_content(self) -> None:
        os.lseek(self._fd, 0, os.SEEK_SET)
        while piece := os.read(self._fd, PIECE_SIZE):
            self._digest.update(piece)
            self.size += len(piece)

    def begin(self, version: Properties) -> None:
        """Discard the content, and record the version that is received from now on."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._digest = hashlib.sha256()
        self.size, self.version = 0, version
        self._record.write_text(json.dumps(vars(version)))

    def cut(self, size: int) -> None:
        """Discard the content beyond ``size`` bytes."""
        if size < self.size:
            os.ftruncate(self._fd, size)
            self._digest = hashlib.sha256()
            self.size = 0
            self._read_content()

    def write(self, data: bytes) -> None:
        """Append."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._digest.update(data)
        self.size += len(data)

    def publish(self) -> str | None:
        """Verify the content, and rename the file to the target.

        :returns: the SHA-256 in hex, which equals the server's; None: the server has none to compare with.
        :raises Corrupt: the digests differ; the content has been discarded.
        """
        assert self.version is not None
        if self.version.sha256 not in (None, self._digest.hexdigest()):
            self.remove()
            raise Corrupt("what arrived has another SHA-256 than what the server has")
        self._record.unlink(missing_ok=True)
        self.path.rename(self.target)
        self._published = True
        return self.version.sha256

    def remove(self) -> None:
        """Discard the content and the record."""
        self._record.unlink(missing_ok=True)
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._digest, self.size, self.version = hashlib.sha256(), 0, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._published and (self.version is None or self.size == 0):  # nothing to resume
            with contextlib.suppress(OSError):
                self._record.unlink(missing_ok=True)
                self.path.unlink()
        os.close(self._fd)
