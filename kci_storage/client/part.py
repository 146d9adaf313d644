# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place where the client writes files: what has come of a download, until it is whole.

Beside the target lies ``<name>.<digest of the URL>.part``, and beside that a ``.json`` that says which version it is
of. Both stay when a download is interrupted. The target is only ever replaced by a file that is whole and verified.
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
from kci_storage.client.storage import PIECE, Properties


class Part:
    """What has come of one file. Used as a context manager; nobody else has the same part meanwhile.

    :param target: what it is to become; its folder is made.
    :param source: the URL that it comes from.
    :raises ClientError: somebody else is downloading the same file to the same place.
    :raises OSError: the disk does not take it.
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
        """The part's file, locked. If it was renamed or removed before we had the lock, we look again."""
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
        while piece := os.read(self._fd, PIECE):
            self._digest.update(piece)
            self.size += len(piece)

    def begin(self, version: Properties) -> None:
        """Throw away what is here: another version comes."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._digest = hashlib.sha256()
        self.size, self.version = 0, version
        self._record.write_text(json.dumps(vars(version)))

    def cut(self, size: int) -> None:
        """Throw away what is here beyond so many bytes."""
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
        """Verify it, and make it the target.

        :returns: the SHA-256 in hex if it was compared with the server's; None: the server does not know that.
        :raises Corrupt: it is not what the server has; nothing is left of it.
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
        """Throw everything away."""
        self._record.unlink(missing_ok=True)
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._digest, self.size, self.version = hashlib.sha256(), 0, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._published and (self.version is None or self.size == 0):  # nothing that could be resumed
            with contextlib.suppress(OSError):
                self._record.unlink(missing_ok=True)
                self.path.unlink()
        os.close(self._fd)
