# SPDX-License-Identifier: LGPL-2.1-or-later
"""One file comes: resumed where it was interrupted, verified, and only then under its name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kci_storage.client.errors import ClientError, Corrupt, Unexpected, Unreachable
from kci_storage.client.part import Part
from kci_storage.client.paths import Target, is_regular
from kci_storage.client.progress import Progress
from kci_storage.client.retries import Attempts
from kci_storage.client.storage import Download, Properties, Storage

CLEAN_STARTS = 2  # how often a file is fetched whose digest is wrong at the end
GONE = (404, 410, 416)  # statuses after which what has come so far is of no use


def download(storage: Storage, target: Target, attempts: Attempts, progress: Progress) -> tuple[Properties, bool]:
    """Have the file, whole and right, at its target.

    :returns: what it is; and whether anything had to be fetched, which is not so if it was there already.
    :raises ClientError: it cannot be had. What has come is kept for the next time, beside the target.
    :raises OSError: the disk does not take it.
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
    """Whether a file is what the server has."""
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
        self._expected = target.size  # bytes that the progress knows of
        self._furthest = part.size  # bytes
        progress.add(part.size)

    def run(self) -> Properties:
        """All of the file, in as many attempts as it takes."""
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
        # At least the last byte is asked for again: so the answer tells whether it still is that version.
        start = min(part.size, part.version.size - 1) if part.version and part.size else 0
        with self._storage.download(self._key, start, etag) as incoming:
            version = self._begun(incoming, start)
            for piece in incoming.pieces():
                self._take(piece)
        if part.size != version.size:
            raise Unreachable("the connection ended early")
        return version

    def _begun(self, incoming: Download, start: int) -> Properties:
        """The version that comes; the part is ready for it."""
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
