# SPDX-License-Identifier: LGPL-2.1-or-later
"""Receiving archives: unpacked while they are received, checked as a whole, then stored, many files at a time.

An archive is decompressed once, while its client still sends it, and its files' contents go to one spool file. The
thread that uploads a file reads it from there, and nothing is in memory but the pieces in hand. Large files are sent
to the backend while the rest of the archive is still being received (:mod:`.staging`). But nothing is committed
before the whole archive was received and accepted: a refused archive leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

from kci_storage import keys
from kci_storage.archives.files import ArchiveFiles, ArchivePlan, Extent, Uploader
from kci_storage.archives.run import ArchiveReport, Run
from kci_storage.archives.staging import Staging
from kci_storage.archives.unpacking import Limits, Piece, TarReader, decompressed
from kci_storage.errors import BadArchive, BadForm, InsufficientStorage, Overloaded
from kci_storage.events import Events
from kci_storage.http.multipart import PATH_FIELD, Body, Event, Part, form_events
from kci_storage.net import slots
from kci_storage.net.threads import trim_memory
from kci_storage.store.form_receiver import append_to_path, decoded_path
from kci_storage.store.uploads import Uploads

MAX_UNPACKING = 32  # archives of one worker at a time; each may need as much memory as its compression allows


class Archives:
    """Receives and stores archives.

    :param limits: how large one may be.
    :param parallelism: how many of their files are uploaded at a time.
    """

    def __init__(self, uploads: Uploads, events: Events, limits: Limits, parallelism: int):
        self.uploads = uploads
        self.limits = limits
        self.uploader = Uploader(uploads, events, parallelism)
        self._unpacking = threading.BoundedSemaphore(MAX_UNPACKING)

    def store(self, body: Body, boundary: bytes, plan: ArchivePlan) -> ArchiveReport:
        """Store the files of the archive in a multipart form (RFC 7578), under the form's ``path``.

        :returns: what was stored, and which files failed.
        :raises BadArchive: the archive is not acceptable. Nothing is stored, as with all errors.
        :raises BadForm: the form is malformed, or has not exactly one ``archive`` and one ``path``.
        :raises Forbidden: a key may not be written.
        :raises Overloaded: too many archives are being unpacked.
        """
        with self.uploads.cache.new_spool() as spool:
            try:
                return self._store(body, boundary, ArchiveFiles(self.uploader, plan, spool))
            finally:
                trim_memory(spool.size)

    def _store(self, body: Body, boundary: bytes, files: ArchiveFiles) -> ArchiveReport:
        with Staging(files) as staging:
            form = _Form(files, staging, self.limits)
            with self._turn():
                form.receive(form_events(body, boundary, self.uploads.max_bytes))
            prefix, extents = form.files()
            with slots.waiting():  # for the threads that upload
                return Run(files, prefix).upload(extents, staging.accepted())

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Count as one of the archives that are being unpacked, during the block.

        :raises Overloaded: there were too many for all of the time that a request may wait.
        """
        if not self._unpacking.acquire(blocking=False):
            with slots.waiting():
                acquired = self._unpacking.acquire(timeout=self.uploads.lock_timeout)
            if not acquired:
                raise Overloaded("too many archives are being unpacked; try later", retry_after=5)
        try:
            yield
        finally:
            self._unpacking.release()


class _Form:
    """A form with an archive, while it is received; its fields come in any order."""

    def __init__(self, files: ArchiveFiles, staging: Staging, limits: Limits):
        self._plan = files.plan
        self._spool = files.spool
        self._staging = staging
        self._limits = limits
        self._prefix: str | None = None
        self._found: dict[str, Extent] | None = None  # by name; of two files of one name the last, as in tar

    def receive(self, events: Iterator[Event]) -> None:
        """Receive the whole form."""
        for event in events:
            if isinstance(event, Part):
                self._take(event, _content(events))

    def _take(self, part: Part, content: Iterator[Piece]) -> None:
        if part.name == PATH_FIELD:
            self._take_path(part, content)
        elif part.name == "archive":
            part.check_encoding()
            self._take_archive(content, part.file_name() if part.has_file_name else "")
        for _ in content:  # skip what is left of the part
            pass

    def _take_path(self, part: Part, content: Iterator[Piece]) -> None:
        if self._prefix is not None:
            raise BadForm("the form has more than one field path")
        part.check_encoding()
        self._prefix = keys.folder(_path_text(part, content))
        keys.for_upload(self._prefix, "x")
        self._plan.admit_folder(self._prefix)

    def _take_archive(self, content: Iterator[Piece], filename: str) -> None:
        if self._found is not None:
            raise BadForm("the form has more than one archive")
        self._found = {}
        reader = TarReader(decompressed(content, filename), self._limits)
        for member in reader:
            key = None if self._prefix is None else self._key(self._prefix, member.name)
            extent = self._found[member.name] = Extent(self._spool.size, member.size)
            for piece in reader.content():
                self._take_piece(piece)
            if key is not None:
                self._staging.offer(key, extent)

    def _take_piece(self, piece: memoryview) -> None:
        before = self._spool.size
        try:
            self._spool.write(piece)
        except InsufficientStorage:
            if not self._staging.cancel():  # there may be room for the archive, if not for copies of its files too
                raise
            self._spool.write(piece[self._spool.size - before :])
        self._staging.begin_waiting()

    def _key(self, prefix: str, name: str) -> str:
        key = keys.for_upload(prefix, name)
        self._plan.admit(key)
        return key

    def files(self) -> tuple[str, Mapping[str, Extent]]:
        """The folder, and the files to store, by key.

        :raises BadForm: a field is missing.
        :raises BadArchive: the archive is empty.
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
    """The content of the part whose head was the last event."""
    for event in events:
        if event is None:
            return
        assert not isinstance(event, Part)
        yield event


def _path_text(part: Part, content: Iterator[Piece]) -> str:
    text = bytearray()
    for piece in content:
        append_to_path(text, piece)
    return decoded_path(text, part)
