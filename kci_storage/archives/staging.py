# SPDX-License-Identifier: LGPL-2.1-or-later
"""Staging: an archive's large files are sent to the backend, uncommitted, while the rest is still being received.

The backend shows no client what is not committed. So an archive that is refused in the end leaves nothing behind. No
lock is held meanwhile, however slowly the client sends: other uploads may write the same keys, and the last commit
wins. If such a commit makes the backend discard a staged file, that file is sent again, as it would have been without
staging. The same happens after any other failure.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from typing import Self

from kci_storage.archives.files import ArchiveFiles, Extent, memory_for
from kci_storage.net import slots
from kci_storage.store.uploads import Upload

MIN_STAGED_SIZE = 2 * 1024 * 1024  # bytes; staging a smaller file saves little, and costs Azure two requests, not one
MAX_STAGED_OF_ONE = 128  # files of one archive, so that a client that stops sending does not use up all


class StagedFile:
    """A file that a thread sends to the backend, to be committed or cancelled later.

    :param memory: bytes of the budget that were taken for this; released as soon as everything is sent.
    """

    def __init__(self, files: ArchiveFiles, key: str, extent: Extent, memory: int):
        self._files = files
        self._key = key
        self._extent = extent
        self._memory = memory
        self._mutex = threading.Lock()
        self._wanted = True
        self._upload: Upload | None = None  # once everything is sent, until take()
        self.sent: Future[None] = files.uploader.threads.submit(self._send)

    def _send(self) -> None:
        try:
            with contextlib.ExitStack() as undo:
                upload = undo.enter_context(contextlib.closing(self._files.stage(self._key)))
                self._fill(upload)
                if self._keep(upload):
                    undo.pop_all()
        finally:
            self._files.uploader.memory.release(self._memory)

    def _fill(self, upload: Upload) -> None:
        """Send the whole file, unless it is cancelled meanwhile; nothing of it stays in memory."""
        for piece in self._files.content(self._extent):
            if not self._wanted:
                return
            upload.write(piece)
        upload.end()
        upload.flush()

    def _keep(self, upload: Upload) -> bool:
        with self._mutex:
            self._upload = upload if self._wanted else None
            return self._wanted

    @property
    def has_failed(self) -> bool:
        """Whether sending has ended with an error."""
        return self.sent.done() and self.sent.exception() is not None

    def take(self) -> Upload | None:
        """Wait until the file is sent.

        :returns: its upload, to be committed and closed by the caller; None: the file was cancelled.
        :raises StorageError: it could not be sent.
        """
        self.sent.result()
        with self._mutex:
            upload, self._upload = self._upload, None
        return upload

    def cancel(self) -> None:
        """Cancel the file. It is closed now, or as soon as its thread notices. Idempotent."""
        with self._mutex:
            self._wanted = False
            upload, self._upload = self._upload, None
        if upload is not None:
            upload.close()


class Staging:
    """The staged files of one archive. Only the thread that receives the archive calls its methods.

    Used as a context manager, it cancels at the end of the block the files that were not taken.
    """

    def __init__(self, files: ArchiveFiles):
        self._files = files
        self._waiting: dict[str, Extent] = {}  # by key, in the archive's order; not begun for want of memory
        self._staged: dict[str, StagedFile] = {}
        self._replaced: list[StagedFile] = []
        self._has_ended = False

    def offer(self, key: str, extent: Extent) -> None:
        """Stage a file that was unpacked, if it is large enough. It replaces an earlier file of this key."""
        self._waiting.pop(key, None)
        if (earlier := self._staged.pop(key, None)) is not None:
            earlier.cancel()
            self._replaced.append(earlier)
        if extent.size >= MIN_STAGED_SIZE:
            self._waiting[key] = extent
        self.begin_waiting()

    def begin_waiting(self) -> None:
        """Begin to send the files that wait, as far as the limits allow it now."""
        while self._waiting and not self._must_end():
            key, extent = next(iter(self._waiting.items()))
            memory = memory_for(extent.size)
            if not self._reserve(memory):
                return
            del self._waiting[key]
            self._staged[key] = StagedFile(self._files, key, extent, memory)

    def _must_end(self) -> bool:
        """Whether a file has failed: the backend may be down, and then each further file would be waited for."""
        self._has_ended = self._has_ended or any(file.has_failed for file in self._staged.values())
        return self._has_ended

    def _reserve(self, memory: int) -> bool:
        """Take what one more file needs of the worker's limits; whether that was free.

        :param memory: bytes.
        """
        uploader = self._files.uploader
        if len(self._staged) + len(self._replaced) >= MAX_STAGED_OF_ONE or not uploader.staged.acquire(
            blocking=False
        ):
            return False
        if not uploader.memory.try_acquire(memory):
            uploader.staged.release()
            return False
        return True

    def accepted(self) -> Mapping[str, StagedFile]:
        """The archive is accepted: begin no further file.

        :returns: the staged files, to be committed, by key.
        """
        self._waiting.clear()
        return dict(self._staged)

    def cancel(self) -> bool:
        """Cancel all staged files, and stage no more of this archive.

        :returns: whether there were any, whose space on the disk is free now.
        """
        files = [*self._staged.values(), *self._replaced]
        try:
            with contextlib.ExitStack() as each:  # every file is cancelled, even if removing one of them fails
                for file in files:
                    each.callback(file.cancel)
        finally:
            if not all(file.sent.done() for file in files):
                with slots.waiting(bounded=False):
                    wait([file.sent for file in files])  # their threads read the spool file
            self._forget_all()
        return bool(files)

    def _forget_all(self) -> None:
        for _ in (*self._staged, *self._replaced):
            self._files.uploader.staged.release()
        self._waiting.clear()
        self._staged.clear()
        self._replaced.clear()
        self._has_ended = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cancel()
