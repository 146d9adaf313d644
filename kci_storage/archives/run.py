# SPDX-License-Identifier: LGPL-2.1-or-later
"""The uploads of an archive's files, many at a time, once the whole archive was received and accepted."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from kci_storage import logfmt
from kci_storage.archives.files import ArchiveFiles, Extent, memory_for
from kci_storage.archives.staging import StagedFile
from kci_storage.errors import BackendError, InsufficientStorage, StorageError, WriteConflict
from kci_storage.store.uploads import Stored

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ArchiveReport:
    """The outcome of an archive."""

    prefix: str  # the folder of its files; empty: the root
    uploaded: int = 0  # files that were stored
    size: int = 0  # bytes in these
    failures: list[str] = field(default_factory=list)  # "key: reason"


class Run:
    """The uploads of one archive's files.

    At most ``parallelism`` of them are submitted to the shared threads at a time, so that archives take turns.

    :param prefix: the folder of the files, for the report.
    """

    def __init__(self, files: ArchiveFiles, prefix: str):
        self._files = files
        self._uploader = files.uploader
        self._report = ArchiveReport(prefix)
        self._mutex = threading.Lock()
        self._submitted = threading.Semaphore(files.uploader.parallelism)
        self._failed_in_a_row = 0  # not counting failures for which the file itself is the reason
        self._again: dict[str, Extent] = {}  # files that were staged in vain, to be sent again

    def upload(self, extents: Mapping[str, Extent], staged: Mapping[str, StagedFile]) -> ArchiveReport:
        """Upload all files. One that fails does not keep the others from being stored.

        :param extents: the files, by key.
        :param staged: those that were sent to the backend already, or are being sent, by key.
        """
        self._upload_all(in_order(extents, staged), staged)
        self._upload_all(self._again, {})
        self._report.failures.sort()
        return self._report

    def _upload_all(self, extents: Mapping[str, Extent], staged: Mapping[str, StagedFile]) -> None:
        begun: list[Future[None]] = []
        try:
            for key, extent in extents.items():
                if self._failed_in_a_row > self._uploader.parallelism:
                    self._failed(key, "not tried, since the uploads before it failed")
                else:
                    begun.append(self._begin(key, extent, staged.get(key)))
        finally:
            wait(begun)  # even after an error: these uploads read the spool file

    def _begin(self, key: str, extent: Extent, staged: StagedFile | None) -> Future[None]:
        memory = 0 if staged else memory_for(extent.size)
        self._submitted.acquire()
        self._uploader.memory.acquire(memory)
        return self._uploader.threads.submit(self._upload, key, extent, staged, memory)

    def _upload(self, key: str, extent: Extent, staged: StagedFile | None, memory: int) -> None:
        try:
            with self._uploader.events.uploading():
                stored = self._commit(key, staged) if staged else self._store(key, extent)
            if stored is None:
                self._again[key] = extent
            else:
                self._succeeded(stored)
        except StorageError as exc:
            self._failed(key, exc.message, exc)
        except Exception as exc:
            log.exception(logfmt.line(event="internal_error", key=key, error=repr(exc)))
            self._failed(key, "internal error", exc)
        finally:
            self._uploader.memory.release(memory)
            self._submitted.release()

    def _store(self, key: str, extent: Extent) -> Stored:
        with contextlib.closing(self._files.begin(key)) as upload:
            for piece in self._files.content(extent):
                upload.write(piece)
            return upload.commit()

    def _commit(self, key: str, staged: StagedFile) -> Stored | None:
        """Commit a staged file; None: that is not possible, and the file has to be sent again."""
        try:
            upload = staged.take()
        except StorageError:
            return None
        if upload is None:
            return None
        with contextlib.closing(upload), self._uploader.uploads.lock(key):
            try:
                return upload.commit(replay=False)
            except WriteConflict:  # another writer's commit came in between
                return None

    def _succeeded(self, stored: Stored) -> None:
        with self._mutex:
            self._report.uploaded += 1
            self._report.size += stored.info.size
            self._failed_in_a_row = 0
        self._files.plan.stored(stored)

    def _failed(self, key: str, reason: str, exc: Exception | None = None) -> None:
        with self._mutex:
            self._report.failures.append(f"{key}: {reason}")
            if isinstance(exc, BackendError | InsufficientStorage):
                self._failed_in_a_row += 1


def in_order(extents: Mapping[str, Extent], staged: Mapping[str, StagedFile]) -> dict[str, Extent]:
    """Sort the files: first the staged ones, which need one request each, and last those that are being staged.

    So a thread that commits a file hardly waits for its staging. This cannot deadlock: the staging was submitted to
    the same threads earlier, and they take calls in order.
    """

    def rank(key: str) -> int:
        return 1 if key not in staged else 0 if staged[key].sent.done() else 2

    return {key: extents[key] for key in sorted(extents, key=rank)}
