# SPDX-License-Identifier: LGPL-2.1-or-later
"""Uploading one file: with its digest, so that the server stores this content or nothing; retries are safe."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from kci_storage.client.errors import ClientError
from kci_storage.client.paths import LocalFile
from kci_storage.client.progress import Progress
from kci_storage.client.retries import Attempts
from kci_storage.client.storage import PIECE_SIZE, Properties, Storage


def upload(storage: Storage, file: LocalFile, attempts: Attempts, progress: Progress, absent: bool) -> Properties:
    """Store a file.

    It is read twice. The digest is sent before the content, so the server can refuse content that was damaged on the
    way, or that changed while it was sent, before it replaces the old version.

    :param absent: fail if a file of that key exists.
    :returns: the stored file's properties.
    :raises ClientError: the file was not stored, or it is unknown whether it was.
    :raises OSError: the file cannot be read.
    """
    storage.url_of(file.key)  # refuses an invalid key before the file is read
    with open(file.path, "rb") as content:
        size = os.fstat(content.fileno()).st_size
        sha256 = _digest(content, size)
        doubtful = False  # whether a failed attempt may have stored it nevertheless
        while True:
            body = FileBody(content, size, progress)
            try:
                return storage.upload(file.key, body, size, sha256, absent=absent)
            except ClientError as exc:
                body.take_back()
                if exc.status == 412 and doubtful:
                    there = attempts.run(lambda: storage.properties(file.key))
                    if there.sha256 == sha256:
                        progress.add(size)
                        return there
                doubtful = doubtful or exc.status is None or exc.status >= 500
                attempts.failed(exc)


def _digest(content: BinaryIO, size: int) -> str:
    sha256 = hashlib.sha256()
    for piece in FileBody(content, size):
        sha256.update(piece)
    return sha256.hexdigest()


class FileBody:
    """The first ``size`` bytes of a file, as a body for ``requests`` that is read in pieces."""

    def __init__(self, content: BinaryIO, size: int, progress: Progress | None = None):
        content.seek(0)
        self._content = content
        self._size = size
        self._left = size
        self._progress = progress

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(PIECE_SIZE):
            yield piece

    def read(self, size: int) -> bytes:
        """The next bytes, at most ``size``; empty at the end.

        :raises ClientError: the file has become shorter.
        """
        data = self._content.read(min(size, self._left))
        if not data and self._left:
            raise ClientError("the file has become shorter while it was read")
        self._left -= len(data)
        if self._progress is not None:
            self._progress.add(len(data))
        return data

    def take_back(self) -> None:
        """Take the sent bytes back from the progress."""
        if self._progress is not None:
            self._progress.add(self._left - self._size)
