# SPDX-License-Identifier: LGPL-2.1-or-later
"""Downloading one file: resumes after an interruption, verifies, and only then replaces the target."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kci_storage.client.errors import ClientError, Corrupt, Unexpected, Unreachable
from kci_storage.client.part import Part
from kci_storage.client.paths import Target, is_regular
from kci_storage.client.progress import Progress
from kci_storage.client.retries import Attempts
from kci_storage.client.storage import Download, Properties, Storage

CLEAN_STARTS = 2  # attempts at a file whose digest is wrong at the end
GONE = (404, 410, 416)  # statuses that make the part useless


def download(storage: Storage, target: Target, attempts: Attempts, progress: Progress) -> tuple[Properties, bool]:
    """Download a file, unless the target is the same already.

    :returns: its properties, and whether it had to be fetched.
    :raises ClientError: it cannot be downloaded. The part that has come is kept beside the target, to be resumed.
    :raises OSError: it cannot be written.
    """
    if target.path is None:
        raise ClientError(target.problem)
    if is_regular(target.path):
        there = attempts.run(lambda: storage.properties(target.key))
        if _is_same(target.path, there):
            progress.expect(there.size - target.size)
            progress.add(there.size)
            return there, False
    with Part(target.path, storage.url_of(target.key)) as part:
        transfer = _Transfer(storage, target, part, attempts, progress)
        for remaining in reversed(range(CLEAN_STARTS)):
            version = transfer.run()
            try:
                part.publish()
                return version, True
            except Corrupt:
                progress.add(-version.size)
                if not remaining:
                    raise
    raise AssertionError("unreachable")


def _is_same(path: Path, there: Properties) -> bool:
    """Whether a local file equals the server's."""
    if there.sha256 is None or path.stat().st_size != there.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == there.sha256


class _Transfer:
    """Receives one file into its part."""

    def __init__(self, storage: Storage, target: Target, part: Part, attempts: Attempts, progress: Progress):
        self._storage = storage
        self._key = target.key
        self._part = part
        self._attempts = attempts
        self._progress = progress
        self._expected = target.size  # bytes that the progress expects
        self._furthest = part.size  # bytes
        progress.add(part.size)

    def run(self) -> Properties:
        """Receive the whole file, in as many attempts as necessary."""
        while True:
            try:
                return self._attempt()
            except ClientError as exc:
                if exc.status in GONE or isinstance(exc, Unexpected):
                    self._progress.add(-self._part.size)
                    self._part.remove()
                self._attempts.failed(exc)

    def _attempt(self) -> Properties:
        part = self._part
        etag = part.version.etag if part.version else None
        # The last byte is always requested again, since the response tells whether the version is still the same.
        start = min(part.size, part.version.size - 1) if part.version and part.size else 0
        with self._storage.download(self._key, start, etag) as incoming:
            version = self._begun(incoming, start)
            for piece in incoming.pieces():
                self._take(piece)
        if part.size != version.size:
            raise Unreachable("the connection ended early")
        return version

    def _begun(self, incoming: Download, start: int) -> Properties:
        """Prepare the part for the response's content; the version that is being received."""
        part, version = self._part, incoming.properties
        if incoming.start == 0:
            self._progress.add(-part.size)
            part.begin(version)
        elif part.version and (incoming.start, version.etag, version.size) == (
            start, part.version.etag, part.version.size
        ):  # fmt: skip
            self._progress.add(start - part.size)
            part.cut(start)
            version = part.version
        else:
            raise Unexpected("the server sent another part of the file than it was asked for")
        self._progress.expect(version.size - self._expected)
        self._expected = version.size
        return version

    def _take(self, piece: bytes) -> None:
        self._part.write(piece)
        self._progress.add(len(piece))
        if self._part.size > self._furthest:
            self._furthest = self._part.size
            self._attempts.progressed()
