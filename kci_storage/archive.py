"""Archives on their way in: unpacked while they arrive, looked at as a whole, then uploaded, many files at a time.

An archive is decompressed once, while its client still sends it, and its files' contents go to one spool file. Each
file is read from there by whoever uploads it, and nothing is held in memory but the pieces in hand. Nothing is stored
before all of it has been seen: an archive that is refused has left nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from werkzeug.sansio.multipart import Data, Event, Field, File

from kci_storage import durable, keys, logs, memory, places
from kci_storage.digests import ALONE
from kci_storage.errors import (
    BackendError,
    BadArchive,
    BadForm,
    BadKey,
    InsufficientStorage,
    Overloaded,
    StorageError,
)
from kci_storage.forms import READ_SIZE, Body, form_events
from kci_storage.unpacking import Limits, Piece, TarReader, decompressed
from kci_storage.upload import LONGEST_PATH_FIELD, Stored, Uploads

if TYPE_CHECKING:
    from kci_storage.metrics import Metrics

UNPACKED_AT_ONCE = 32  # archives, of one worker; each may need as much memory as its compression allows
UPLOAD_MEMORY = 96 * 1024 * 1024  # bytes that the uploads of one worker's archives may hold, all together
MOST_HELD = 40 * 1024 * 1024  # bytes that one upload's driver holds at most: the blocks that it has in flight
DIGESTING = 2 * 1024 * 1024  # bytes of the buffers of one upload's digests, unless it is small
log = logging.getLogger(__name__)


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


@dataclass(slots=True)
class ArchiveReport:
    """What came of an archive."""

    prefix: str  # the folder of its files; empty: the root
    uploaded: int = 0  # files
    size: int = 0  # bytes in them
    failures: list[str] = field(default_factory=list)  # "key: reason"


class Archives:
    """Takes archives.

    :param limits: how large one may be.
    :param parallelism: files of them that are uploaded at a time.
    """

    def __init__(self, uploads: Uploads, metrics: Metrics, limits: Limits, parallelism: int):
        self.uploads = uploads
        self.metrics = metrics
        self.limits = limits
        self.parallelism = parallelism
        self.memory = _Budget(UPLOAD_MEMORY)
        self.threads = ThreadPoolExecutor(parallelism, thread_name_prefix="archive")  # begun as they are needed
        self._unpacking = threading.BoundedSemaphore(UNPACKED_AT_ONCE)

    def store(self, body: Body, boundary: bytes, plan: ArchivePlan) -> ArchiveReport:
        """Store the files of the archive in a multipart form (RFC 7578), under the form's ``path``.

        :raises BadArchive: it cannot be taken. Nothing is stored, as with all errors.
        :raises BadForm: the form is malformed, or has not one ``archive`` and one ``path``.
        :raises Forbidden: a key may not be written.
        """
        with self.uploads.cache.new_spool() as spool:
            form = _Form(self, plan, spool)
            with self._turn():
                form.receive(form_events(body, boundary, self.uploads.max_bytes))
            prefix, files = form.files()
            with places.aside():  # it waits for the threads that upload
                report = _Run(self, plan, spool, prefix).upload(files)
        memory.give_back(report.size)
        return report

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Be one of those that are unpacked during the block."""
        with places.aside():
            mine = self._unpacking.acquire(timeout=self.uploads.lock_timeout)
        if not mine:
            raise Overloaded("too many archives are being unpacked; try later", retry_after=5)
        try:
            yield
        finally:
            self._unpacking.release()


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a file's content lies in the spool file."""

    start: int
    size: int  # bytes


class _Form:
    """A form with an archive on its way in; its fields come in any order."""

    def __init__(self, archives: Archives, plan: ArchivePlan, spool: durable.NewFile):
        self._archives = archives
        self._plan = plan
        self._spool = spool
        self._prefix: str | None = None
        self._found: dict[str, _Extent] | None = None  # by name; of two files of one name the last, as tar has it

    def receive(self, events: Iterator[Event]) -> None:
        """Take all of it."""
        for event in events:
            if isinstance(event, Field | File):
                self._take(event, _content(events))

    def _take(self, part: Field | File, content: Iterator[Piece]) -> None:
        if part.name == "path" and isinstance(part, Field):
            self._take_path(content)
        elif part.name == "archive":
            self._take_archive(content, getattr(part, "filename", ""))
        for _ in content:  # of a part that nobody wanted
            pass

    def _take_path(self, content: Iterator[Piece]) -> None:
        if self._prefix is not None:
            raise BadForm("the form has more than one field path")
        self._prefix = keys.folder(_path_text(content))
        keys.for_upload(self._prefix, "x")
        self._plan.admit_folder(self._prefix)

    def _take_archive(self, content: Iterator[Piece], filename: str) -> None:
        if self._found is not None:
            raise BadForm("the form has more than one archive")
        self._found = {}
        reader = TarReader(decompressed(content, filename), self._archives.limits)
        for member in reader:
            if self._prefix is not None:
                self._key(self._prefix, member.name)
            self._found[member.name] = _Extent(self._spool.size, member.size)
            for piece in reader.content():
                self._spool.write(piece)

    def _key(self, prefix: str, name: str) -> str:
        key = keys.for_upload(prefix, name)
        self._plan.admit(key)
        return key

    def files(self) -> tuple[str, Mapping[str, _Extent]]:
        """The folder, and what is to be stored, by key.

        :raises BadForm: a field is missing.
        :raises BadArchive: there is nothing.
        """
        if self._found is None:
            raise BadForm("the form has no archive: name its field archive")
        if self._prefix is None:
            raise BadForm("the form has no field path")
        if not self._found:
            raise BadArchive("the archive has no file")
        prefix = self._prefix
        return prefix, {self._key(prefix, name): extent for name, extent in self._found.items()}


def _content(events: Iterator[Event]) -> Iterator[Piece]:
    """The content of the part that has begun."""
    for event in events:
        assert isinstance(event, Data)
        yield event.data
        if not event.more_data:
            return


def _path_text(content: Iterator[Piece]) -> str:
    text = bytearray()
    for piece in content:
        text += piece
        if len(text) > LONGEST_PATH_FIELD:
            raise BadKey("path is too long: a key has at most 1,024 characters")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise BadKey("path is not UTF-8") from None


class _Run:
    """The uploads of one archive's files.

    It has at most ``parallelism`` of them with the threads, so that those of several archives take turns.
    """

    def __init__(self, archives: Archives, plan: ArchivePlan, spool: durable.NewFile, prefix: str):
        self._archives = archives
        self._plan = plan
        self._spool = spool
        self._report = ArchiveReport(prefix)
        self._mutex = threading.Lock()
        self._places = threading.Semaphore(archives.parallelism)
        self._failed_in_a_row = 0  # for reasons that are not the file's own

    def upload(self, files: Mapping[str, _Extent]) -> ArchiveReport:
        """Upload them all; one that fails keeps no other from being stored."""
        begun: list[Future[None]] = []
        try:
            for key, extent in files.items():
                if self._failed_in_a_row > self._archives.parallelism:
                    self._failed(key, "not tried, since the uploads before it failed")
                else:
                    begun.append(self._begin(key, extent))
        finally:
            wait(begun)  # whatever happens: they read the spool file
        self._report.failures.sort()
        return self._report

    def _begin(self, key: str, extent: _Extent) -> Future[None]:
        held = held_for(extent.size)
        self._places.acquire()
        self._archives.memory.take(held)
        return self._archives.threads.submit(self._upload, key, extent, held)

    def _upload(self, key: str, extent: _Extent, held: int) -> None:
        try:
            with self._archives.metrics.uploading():
                stored = self._store(key, extent)
            self._succeeded(stored)
        except StorageError as exc:
            self._failed(key, exc.message, exc)
        except Exception as exc:
            log.exception(logs.logfmt(event="internal_error", key=key, error=repr(exc)))
            self._failed(key, "internal error", exc)
        finally:
            self._archives.memory.give_back(held)
            self._places.release()

    def _store(self, key: str, extent: _Extent) -> Stored:
        plan = self._plan
        with contextlib.closing(self._archives.uploads.begin(key, plan.content_type(key), plan.tags(key))) as upload:
            end = extent.start + extent.size
            for start in range(extent.start, end, READ_SIZE):
                upload.write(os.pread(self._spool.fileno(), min(READ_SIZE, end - start), start))
            return Stored(upload.commit(), upload.sha256)

    def _succeeded(self, stored: Stored) -> None:
        with self._mutex:
            self._report.uploaded += 1
            self._report.size += stored.info.size
            self._failed_in_a_row = 0
        self._plan.stored(stored)

    def _failed(self, key: str, reason: str, exc: Exception | None = None) -> None:
        with self._mutex:
            self._report.failures.append(f"{key}: {reason}")
            if isinstance(exc, BackendError | InsufficientStorage):
                self._failed_in_a_row += 1


def held_for(size: int) -> int:
    """Bytes of memory that the upload of a file of ``size`` bytes needs.

    >>> held_for(1000), held_for(10**9) == MOST_HELD + DIGESTING
    (1000, True)
    """
    return min(size, MOST_HELD) + (DIGESTING if size > ALONE else 0)


class _Budget:
    """So many bytes, for all who ask."""

    def __init__(self, size: int):
        self._free = size
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until there is so much, and have it."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size

    def give_back(self, size: int) -> None:
        """As much as was taken."""
        with self._changed:
            self._free += size
            self._changed.notify_all()
