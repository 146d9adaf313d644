# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a multipart form, which are committed when its end has been seen."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from werkzeug.sansio.multipart import Data, Event, Field, File

from kci_storage import keys
from kci_storage.errors import BadForm, BadKey, StorageError
from kci_storage.files import durable
from kci_storage.http.multipart import READ_SIZE, Body, form_events, too_large
from kci_storage.store.uploads import Stored, Upload, Uploads

LONGEST_PATH_FIELD = 8 * 1024  # bytes; a key has at most 1,024 characters
MOST_FILES = 1_000  # each keeps a few files open until the form's end
FORM_HELD = 16 * 1024 * 1024  # bytes of a form's files that may wait in memory for its end
FILE_FIELD = re.compile(r"file[0-9]+")
# A backslash that escapes nothing: a Windows path, of which the decoder would silently drop the separators.
LONE_BACKSLASH = re.compile(r'\\(?!["\\])')


@dataclass(frozen=True, slots=True)
class FormPlan:
    """What the caller decides about a form's files.

    :param admit: raises when the key may not be written.
    :param content_type: the type to store, by the key.
    :param tags: those to store, by the key.
    """

    admit: Callable[[str], None]
    content_type: Callable[[str], str]
    tags: Callable[[str], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Spooled:
    """A file that came before the form's ``path``: its key is not known yet."""

    filename: str
    file: durable.NewFile

    def close(self) -> None:
        """Let go of it; it is gone."""
        self.file.discard()


def store_form(uploads: Uploads, body: Body, boundary: bytes, plan: FormPlan) -> list[Stored]:
    """Store the files of a multipart form (RFC 7578).

    :raises BadForm: it is malformed, has no file, or names a key twice. Nothing is stored.
    :raises StorageError: a commit failed; the message says which files had been stored by then.
    """
    with contextlib.closing(FormReceiver(uploads, plan)) as form:
        for event in form_events(body, boundary, uploads.max_bytes):
            form.take(event)
        return form.commit()


class FormReceiver:
    """Takes a form's parts, in whatever order they come, and commits its files at the end.

    A file whose ``path`` is not known yet goes to a spool file first.
    """

    def __init__(self, uploads: Uploads, plan: FormPlan):
        self._uploads = uploads
        self._plan = plan
        self._path: str | None = None
        self._path_text: bytearray | None = None  # while the field comes in
        self._keys: set[str] = set()
        self._files: list[Upload | Spooled] = []  # as the form has them
        self._write: Callable[[bytes | memoryview], None] | None = None

    def take(self, event: Event) -> None:
        """Take what the decoder saw.

        :raises BadForm: it cannot be.
        :raises StorageError: the file may not, or cannot, be stored.
        """
        if isinstance(event, Data):
            if self._write is not None:
                self._write(event.data)
            if not event.more_data:
                self._end_part()
        elif isinstance(event, File) and FILE_FIELD.fullmatch(event.name or ""):
            self._begin_file(event)
        elif isinstance(event, Field) and event.name == "path":
            self._begin_path()

    def _end_part(self) -> None:
        self._write = None
        if self._path_text is not None:
            self._set_path(bytes(self._path_text))
            self._path_text = None
        elif self._files and isinstance(self._files[-1], Upload):
            self._end_upload(self._files[-1])

    def _end_upload(self, upload: Upload) -> None:
        """Small files wait in memory to be committed by one request each; many of them, and large ones, must not."""
        upload.end()
        waiting = sorted((file for file in self._files if isinstance(file, Upload)), key=lambda file: file.held)
        held = sum(upload.held for upload in waiting)
        while held > FORM_HELD:
            largest = waiting.pop()
            held -= largest.held
            largest.flush()

    def _begin_path(self) -> None:
        if self._path is not None:
            raise BadForm("the form has more than one field path")
        self._path_text = bytearray()
        self._write = self._add_to_path

    def _add_to_path(self, data: bytes | memoryview) -> None:
        assert self._path_text is not None
        self._path_text += data
        if len(self._path_text) > LONGEST_PATH_FIELD:
            raise BadKey("path is too long: a key has at most 1,024 characters")

    def _set_path(self, text: bytes) -> None:
        try:
            self._path = text.decode()
        except UnicodeDecodeError:
            raise BadKey("path is not UTF-8") from None
        for file in self._files:
            if isinstance(file, Spooled):
                self._admit(file.filename)

    def _begin_file(self, event: File) -> None:
        if LONE_BACKSLASH.search(event.headers.get("Content-Disposition", "")):
            raise BadKey("a file name contains a backslash")
        if len(self._files) == MOST_FILES:
            raise BadForm(f"a form may have at most {MOST_FILES} files; send the others in another one")
        if self._path is None:
            self._write = self._spool(event.filename)
        else:
            upload = self._begin_upload(self._admit(event.filename))
            self._files.append(upload)
            self._write = upload.write

    def _spool(self, filename: str) -> Callable[[bytes | memoryview], None]:
        keys.for_upload("", filename)  # as much as can be said without the path
        spool = self._uploads.cache.new_spool()
        self._files.append(Spooled(filename, spool))

        def write(data: bytes | memoryview) -> None:
            if spool.size + len(data) > self._uploads.max_bytes:
                raise too_large(self._uploads.max_bytes)
            spool.write(data)

        return write

    def _admit(self, filename: str) -> str:
        assert self._path is not None
        key = keys.for_upload(self._path, filename)
        self._plan.admit(key)
        if key in self._keys:
            raise BadForm(f"the form has the file {key} twice")
        self._keys.add(key)
        return key

    def _begin_upload(self, key: str) -> Upload:
        return self._uploads.begin(key, self._plan.content_type(key), self._plan.tags(key))

    def commit(self) -> list[Stored]:
        """Store the files, each in turn.

        :raises BadForm: there is none, or no path.
        :raises StorageError: one failed; the message says which had been stored by then.
        """
        if not self._files:
            raise BadForm("the form has no file: name its file fields file0, file1, …")
        if self._path is None:
            raise BadForm("the form has no field path")
        uploads = self._all_uploaded()
        stored: list[Stored] = []
        for upload in uploads:
            try:
                stored.append(Stored(upload.commit(), upload.sha256))
            except StorageError as exc:
                if stored:
                    exc.message += "; stored before that: " + ", ".join(item.info.key for item in stored)
                raise
            upload.close()
        return stored

    def _all_uploaded(self) -> list[Upload]:
        """The files, of which those that were spooled are uploaded only now."""
        for place, file in enumerate(self._files):
            if isinstance(file, Spooled):
                self._files[place] = upload = self._upload_spooled(file)
                self._end_upload(upload)
        return [file for file in self._files if isinstance(file, Upload)]

    def _upload_spooled(self, spooled: Spooled) -> Upload:
        assert self._path is not None
        with contextlib.closing(spooled), contextlib.ExitStack() as undo:
            upload = self._begin_upload(keys.for_upload(self._path, spooled.filename))
            undo.callback(upload.close)
            for start in range(0, spooled.file.size, READ_SIZE):
                upload.write(os.pread(spooled.file.fileno(), READ_SIZE, start))
            undo.pop_all()
        return upload

    def close(self) -> None:
        """Let go of everything; what was not committed is gone."""
        with contextlib.ExitStack() as held:  # one that cannot be removed keeps no other's lock
            for file in self._files:
                held.callback(file.close)
