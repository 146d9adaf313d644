# SPDX-License-Identifier: LGPL-2.1-or-later
"""An archive's unpacked files: where they are, how each becomes an upload, and what a worker's archives share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kci_storage.events import Events
from kci_storage.files import durable
from kci_storage.http.multipart import READ_SIZE
from kci_storage.store.digests import BUFFER_SIZE, BUFFERS, INLINE_SIZE
from kci_storage.store.uploads import Stored, Upload, Uploads

UPLOAD_MEMORY = 96 * 1024 * 1024  # bytes that the uploads of one worker's archives may use, all together
MAX_DRIVER_MEMORY = 40 * 1024 * 1024  # bytes that the driver uses for one upload at most: the blocks in flight
DIGEST_MEMORY = 2 * BUFFERS * BUFFER_SIZE  # bytes for the digests of one upload, SHA-256 and MD5, unless it is small
MAX_STAGED = 512  # staged files of one worker's archives; each needs a descriptor


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """The caller's decisions on an archive's files, as functions of the key.

    :param admit_folder: raises when no key in the folder may be written.
    :param admit: raises when the key may not be written.
    :param content_type: the content type to store.
    :param tags: the tags to store.
    :param stored: called after each file that was stored, in any thread.
    """

    admit_folder: Callable[[str], None]
    admit: Callable[[str], None]
    content_type: Callable[[str], str]
    tags: Callable[[str], Mapping[str, str]]
    stored: Callable[[Stored], None]


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a file's content is in the spool file."""

    start: int  # bytes
    size: int  # bytes


class Uploader:
    """The threads and the memory that the archives of one worker share.

    :param parallelism: how many of their files are uploaded at a time.
    """

    def __init__(self, uploads: Uploads, events: Events, parallelism: int):
        self.uploads = uploads
        self.events = events
        self.parallelism = parallelism
        self.memory = Budget(UPLOAD_MEMORY)
        self.threads = ThreadPoolExecutor(parallelism, thread_name_prefix="archive")  # started on demand
        self.staged = threading.Semaphore(MAX_STAGED)


class ArchiveFiles:
    """The files of one archive, in its spool file."""

    def __init__(self, uploader: Uploader, plan: ArchivePlan, spool: durable.NewFile):
        self.uploader = uploader
        self.plan = plan
        self.spool = spool

    def begin(self, key: str) -> Upload:
        """Take a file's key lock and begin its upload; the caller closes it.

        :raises StorageError: as of :meth:`.Uploads.begin`.
        """
        return self.uploader.uploads.begin(key, self.plan.content_type(key), self.plan.tags(key))

    def stage(self, key: str) -> Upload:
        """Begin the upload of a file without its key's lock, which must be held at the commit; the caller closes it.

        :raises StorageError: as of :meth:`.Uploads.stage`.
        """
        return self.uploader.uploads.stage(key, self.plan.content_type(key), self.plan.tags(key))

    def content(self, extent: Extent) -> Iterator[bytes]:
        """A file's content, in pieces. Other files may be appended to the spool file meanwhile."""
        end = extent.start + extent.size
        for start in range(extent.start, end, READ_SIZE):
            yield os.pread(self.spool.fileno(), min(READ_SIZE, end - start), start)


def memory_for(size: int) -> int:
    """How many bytes of memory the upload of a file of ``size`` bytes needs.

    >>> memory_for(1000), memory_for(10**9) == MAX_DRIVER_MEMORY + DIGEST_MEMORY
    (1000, True)
    """
    return min(size, MAX_DRIVER_MEMORY) + (DIGEST_MEMORY if size > INLINE_SIZE else 0)


class Budget:
    """A number of bytes that threads share.

    :param size: that number.
    """

    def __init__(self, size: int):
        self._free = size
        self._waiting = 0
        self._changed = threading.Condition()

    def acquire(self, size: int) -> None:
        """Wait until ``size`` bytes are free, and take them."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._free >= size)
            finally:
                self._waiting -= 1
            self._free -= size

    def try_acquire(self, size: int) -> bool:
        """Take ``size`` bytes if they are free and no thread waits in :meth:`acquire`; whether they were."""
        with self._changed:
            if self._waiting or self._free < size:
                return False
            self._free -= size
            return True

    def release(self, size: int) -> None:
        """Give back ``size`` bytes that were taken."""
        with self._changed:
            self._free += size
            self._changed.notify_all()
