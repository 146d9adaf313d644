# SPDX-License-Identifier: LGPL-2.1-or-later
"""An archive's files, unpacked: where they lie, how each becomes an upload, and what a worker's archives share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kci_storage.events import Events
from kci_storage.files import durable
from kci_storage.http.multipart import READ_SIZE
from kci_storage.store.digests import INLINE_SIZE
from kci_storage.store.uploads import Stored, Upload, Uploads

UPLOAD_MEMORY = 96 * 1024 * 1024  # bytes that the uploads of one worker's archives may hold, all together
MOST_HELD = 40 * 1024 * 1024  # bytes that one upload's driver holds at most: the blocks that it has in flight
DIGESTING = 2 * 1024 * 1024  # bytes of the buffers of one upload's digests, unless it is small
MOST_STAGED = 512  # files of one worker's archives; each has one open


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """What the caller decides about an archive's files.

    :param admit_folder: raises when no key in the folder may be written.
    :param admit: raises when the key may not be written.
    :param content_type: the type to store, by the key.
    :param tags: those to store, by the key.
    :param stored: called for each file that was stored, by any thread.
    """

    admit_folder: Callable[[str], None]
    admit: Callable[[str], None]
    content_type: Callable[[str], str]
    tags: Callable[[str], Mapping[str, str]]
    stored: Callable[[Stored], None]


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a file's content lies in the spool file."""

    start: int
    size: int  # bytes


class Uploader:
    """What the archives of one worker have in common.

    :param parallelism: files of them that are uploaded at a time.
    """

    def __init__(self, uploads: Uploads, events: Events, parallelism: int):
        self.uploads = uploads
        self.events = events
        self.parallelism = parallelism
        self.memory = Budget(UPLOAD_MEMORY)
        self.threads = ThreadPoolExecutor(parallelism, thread_name_prefix="archive")  # begun as they are needed
        self.staged = threading.Semaphore(MOST_STAGED)


class ArchiveFiles:
    """The files of one archive, in its spool file."""

    def __init__(self, uploader: Uploader, plan: ArchivePlan, spool: durable.NewFile):
        self.uploader = uploader
        self.plan = plan
        self.spool = spool

    def begin(self, key: str) -> Upload:
        """Begin the upload of a file, with its key's lock; the caller closes it."""
        return self.uploader.uploads.begin(key, self.plan.content_type(key), self.plan.tags(key))

    def stage(self, key: str) -> Upload:
        """The same without the lock: whoever commits it takes that first."""
        return self.uploader.uploads.stage(key, self.plan.content_type(key), self.plan.tags(key))

    def content(self, extent: Extent) -> Iterator[bytes]:
        """A file's content, in pieces; while others are appended behind it."""
        end = extent.start + extent.size
        for start in range(extent.start, end, READ_SIZE):
            yield os.pread(self.spool.fileno(), min(READ_SIZE, end - start), start)


def held_for(size: int) -> int:
    """Bytes of memory that the upload of a file of ``size`` bytes needs.

    >>> held_for(1000), held_for(10**9) == MOST_HELD + DIGESTING
    (1000, True)
    """
    return min(size, MOST_HELD) + (DIGESTING if size > INLINE_SIZE else 0)


class Budget:
    """So many bytes, for all who ask."""

    def __init__(self, size: int):
        self._free = size
        self._waiting = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until there is so much, and have it."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._free >= size)
            finally:
                self._waiting -= 1
            self._free -= size

    def take_spare(self, size: int) -> bool:
        """Have so much if it is there, and nobody waits for it; whether it was."""
        with self._changed:
            if self._waiting or self._free < size:
                return False
            self._free -= size
            return True

    def give_back(self, size: int) -> None:
        """As much as was taken."""
        with self._changed:
            self._free += size
            self._changed.notify_all()
