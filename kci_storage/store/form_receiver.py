# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a multipart form: received one by one, and committed after the form's last byte."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kci_storage import keys
from kci_storage.errors import BadForm, BadKey, StorageError
from kci_storage.files import durable
from kci_storage.http.multipart import FILE_FIELD, PATH_FIELD, READ_SIZE, Body, Event, Part, form_events, too_large
from kci_storage.store.uploads import Stored, Upload, Uploads

MAX_PATH_FIELD_BYTES = 8 * 1024  # bytes; a key has at most 1,024 characters
MAX_FILES = 1_000  # each keeps a few files open until the form's end
MAX_MEMORY = 16 * 1024 * 1024  # bytes of a form's files that may be kept in memory until its end


@dataclass(frozen=True, slots=True)
class FormPlan:
    """The caller's decisions on a form's files, as functions of the key.

    :param admit: raises when the key may not be written.
    :param content_type: the content type to store.
    :param tags: the tags to store.
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
        """Delete the spool file."""
        self.file.discard()


def store_form(uploads: Uploads, body: Body, boundary: bytes, plan: FormPlan) -> list[Stored]:
    """Store the files of a multipart form (RFC 7578).

    :raises BadForm: the form is malformed, has no file, or names a key twice. Nothing is stored.
    :raises StorageError: a commit failed; the message says which files had been stored by then.
    """
    with contextlib.closing(FormReceiver(uploads, plan)) as form:
        for event in form_events(body, boundary, uploads.max_bytes):
            form.take(event)
        return form.commit()


def append_to_path(text: bytearray, piece: bytes | memoryview) -> None:
    """Append a piece of a form's field ``path`` to the text received so far.

    :raises BadKey: the field is longer than any key.
    """
    text += piece
    if len(text) > MAX_PATH_FIELD_BYTES:
        raise BadKey(f"path is too long: a key has at most {keys.MAX_CHARACTERS:,} characters")


def decoded_path(text: bytes | bytearray, part: Part) -> str:
    """A form's field ``path`` as text.

    :param part: its head, which may name another charset than UTF-8.
    :raises BadKey: it is not UTF-8.
    """
    try:
        return text.decode("utf-8" if part.is_utf8 else "ascii")
    except UnicodeDecodeError:
        raise BadKey("path is not UTF-8") from None


def _refuse_content(reason: str) -> Callable[[bytes | memoryview], None]:
    """The function that takes the content of a part that may be there only if it is empty.

    :param reason: the message if it is not.
    """

    def refuse(_: bytes | memoryview) -> None:
        raise BadForm(reason)

    return refuse


class FormReceiver:
    """Receives a form's parts, in any order, and commits its files at the end.

    A file that comes before the form's field ``path`` goes to a spool file first.
    """

    def __init__(self, uploads: Uploads, plan: FormPlan):
        self._uploads = uploads
        self._plan = plan
        self._path: str | None = None
        self._path_part: Part | None = None  # while the field is being received
        self._path_text = bytearray()
        self._keys: set[str] = set()
        self._files: list[Upload | Spooled] = []  # in the form's order
        self._write: Callable[[bytes | memoryview], None] | None = None

    def take(self, event: Event) -> None:
        """Process one event of the decoder.

        :raises BadForm: the form is not as it has to be.
        :raises StorageError: the file may not, or cannot, be stored.
        """
        if event is None:
            self._end_part()
        elif isinstance(event, Part):
            self._begin_part(event)
        elif self._write is not None:
            self._write(event)

    def _begin_part(self, part: Part) -> None:
        """Begin with a part. The content of unknown ones is skipped."""
        if part.name == PATH_FIELD:
            self._begin_path(part)
        elif FILE_FIELD.fullmatch(part.name):
            self._begin_file(part)
        elif not part.name:
            self._write = _refuse_content("the form has a part without a name: name its file fields file0, file1, …")

    def _end_part(self) -> None:
        self._write = None
        if self._path_part is not None:
            part, self._path_part = self._path_part, None
            self._set_path(decoded_path(self._path_text, part))
        elif self._files and isinstance(self._files[-1], Upload):
            self._end_upload(self._files[-1])

    def _end_upload(self, upload: Upload) -> None:
        """End an upload, and keep the form's memory within :data:`MAX_MEMORY`: the largest files are flushed first.

        A small file stays in memory, since one request to the backend can then send and commit it.
        """
        upload.end()
        waiting = sorted((file for file in self._files if isinstance(file, Upload)), key=lambda file: file.held)
        held = sum(upload.held for upload in waiting)
        while held > MAX_MEMORY:
            largest = waiting.pop()
            held -= largest.held
            largest.flush()

    def _begin_path(self, part: Part) -> None:
        if self._path is not None:
            raise BadForm("the form has more than one field path")
        part.check_encoding()
        self._path_part = part
        self._write = self._add_to_path

    def _add_to_path(self, data: bytes | memoryview) -> None:
        append_to_path(self._path_text, data)

    def _set_path(self, path: str) -> None:
        self._path = path
        for file in self._files:
            if isinstance(file, Spooled):
                self._admit(file.filename)

    def _begin_file(self, part: Part) -> None:
        part.check_encoding()
        filename = part.file_name()
        if not filename:  # a browser's file field in which no file was chosen
            self._write = _refuse_content(f"the file name of {part.name} is empty")
            return
        if len(self._files) == MAX_FILES:
            raise BadForm(f"a form may have at most {MAX_FILES} files; send the others in another one")
        if self._path is None:
            self._write = self._spool(filename)
        else:
            upload = self._begin_upload(self._admit(filename))
            self._files.append(upload)
            self._write = upload.write

    def _spool(self, filename: str) -> Callable[[bytes | memoryview], None]:
        keys.for_upload("", filename)  # refuses a bad file name now; the rest needs the path
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
        """Commit the files, one after another.

        A form without a path is one for the root.

        :raises BadForm: the form has no file.
        :raises StorageError: one failed; the message says which had been stored by then.
        """
        if not self._files:
            raise BadForm("the form has no file: name its file fields file0, file1, …")
        if self._path is None:
            self._set_path("")
        uploads = self._all_uploaded()
        stored: list[Stored] = []
        for upload in uploads:
            try:
                stored.append(upload.commit())
            except StorageError as exc:
                if stored:
                    exc.message += "; stored before that: " + ", ".join(item.info.key for item in stored)
                raise
            upload.close()
        return stored

    def _all_uploaded(self) -> list[Upload]:
        """All files as uploads: those in spool files are sent to the driver now."""
        for index, file in enumerate(self._files):
            if isinstance(file, Spooled):
                self._files[index] = upload = self._upload_spooled(file)
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
        """Discard every file that was not committed, and release the locks."""
        with contextlib.ExitStack() as held:  # every file is closed, even if removing one of them fails
            for file in self._files:
                held.callback(file.close)
