# SPDX-License-Identifier: LGPL-2.1-or-later
"""An archive's large files, sent to the backend while the rest of it still comes, and not committed.

The backend shows nobody what is not committed. So when the archive is refused in the end, it has left nothing. No
lock is held meanwhile, however slowly the client sends: others may write the same keys, and whose commit comes last
has the last word. If their commits have made the backend throw away what was staged here, the file is sent again, as
it would have been without all this; so it is after any other failure.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from typing import Self

from kci_storage.archives.files import ArchiveFiles, Extent, held_for
from kci_storage.net import slots
from kci_storage.store.uploads import Upload

STAGED_FROM = 2 * 1024 * 1024  # bytes; a smaller file is little work, but two requests to Azure instead of one
MOST_OF_ONE = 128  # files of one archive, so that a client that stands still leaves the others theirs


class StagedFile:
    """A file that a thread sends to the backend, and that then waits to be committed, or given up.

    :param held: bytes of memory that were taken for that; they are given back as soon as all is sent.
    """

    def __init__(self, files: ArchiveFiles, key: str, extent: Extent, held: int):
        self._files = files
        self._key = key
        self._extent = extent
        self._held = held
        self._mutex = threading.Lock()
        self._wanted = True
        self._upload: Upload | None = None  # when all is sent, until somebody takes it
        self.sent: Future[None] = files.uploader.threads.submit(self._send)

    def _send(self) -> None:
        try:
            with contextlib.ExitStack() as undo:
                upload = undo.enter_context(contextlib.closing(self._files.stage(self._key)))
                self._fill(upload)
                if self._keep(upload):
                    undo.pop_all()
        finally:
            self._files.uploader.memory.give_back(self._held)

    def _fill(self, upload: Upload) -> None:
        """Send all of it, unless it is given up meanwhile; nothing of it stays in memory."""
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
        """Whether it is known already that it could not be sent."""
        return self.sent.done() and self.sent.exception() is not None

    def take(self) -> Upload | None:
        """Wait for the end of it; all of the file, to be committed and closed by the caller.

        :returns: None: it was given up.
        :raises StorageError: it failed.
        """
        self.sent.result()
        with self._mutex:
            upload, self._upload = self._upload, None
        return upload

    def give_up(self) -> None:
        """It is not wanted any more: it is closed now, or else as soon as its thread notices. Idempotent."""
        with self._mutex:
            self._wanted = False
            upload, self._upload = self._upload, None
        if upload is not None:
            upload.close()


class Staging:
    """The files of one archive that are staged. Its methods are called by the thread that receives the archive.

    Used as a context manager, it gives up at the end of the block what nobody has taken.
    """

    def __init__(self, files: ArchiveFiles):
        self._files = files
        self._waiting: dict[str, Extent] = {}  # by key, in the archive's order: there is no room for them yet
        self._staged: dict[str, StagedFile] = {}
        self._replaced: list[StagedFile] = []
        self._has_ended = False

    def offer(self, key: str, extent: Extent) -> None:
        """A file was unpacked, maybe in place of an earlier one with this key: stage it if that is worth it."""
        self._waiting.pop(key, None)
        if (earlier := self._staged.pop(key, None)) is not None:
            earlier.give_up()
            self._replaced.append(earlier)
        if extent.size >= STAGED_FROM:
            self._waiting[key] = extent
        self.go_on()

    def go_on(self) -> None:
        """Begin with those that wait, as far as there is room for them now."""
        while self._waiting and not self._must_end():
            key, extent = next(iter(self._waiting.items()))
            held = held_for(extent.size)
            if not self._has_room(held):
                return
            del self._waiting[key]
            self._staged[key] = StagedFile(self._files, key, extent, held)

    def _must_end(self) -> bool:
        """Whether one has failed: the backend may be away, and then each of them would be waited for."""
        self._has_ended = self._has_ended or any(file.has_failed for file in self._staged.values())
        return self._has_ended

    def _has_room(self, held: int) -> bool:
        """Whether one more may be begun, which has its memory and its place among the worker's then."""
        uploader = self._files.uploader
        if len(self._staged) + len(self._replaced) >= MOST_OF_ONE or not uploader.staged.acquire(blocking=False):
            return False
        if not uploader.memory.take_spare(held):
            uploader.staged.release()
            return False
        return True

    def accepted(self) -> Mapping[str, StagedFile]:
        """The archive has been seen and is accepted: those to be committed, by key."""
        self._waiting.clear()
        return dict(self._staged)

    def give_up(self) -> bool:
        """Stage nothing of this archive; whether something had been, whose room on the disk is free now."""
        files = [*self._staged.values(), *self._replaced]
        try:
            with contextlib.ExitStack() as each:  # one that cannot be removed keeps no other from it
                for file in files:
                    each.callback(file.give_up)
        finally:
            if not all(file.sent.done() for file in files):
                with slots.waiting(bounded=False):
                    wait([file.sent for file in files])  # they read the spool file
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
        self.give_up()
