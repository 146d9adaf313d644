# SPDX-License-Identifier: LGPL-2.1-or-later
"""The local driver: objects are plain files under one folder, at the path of their key, for an operator to look at.

A file put there by hand is an object too. The properties that a file does not have by itself (content type, digests,
ETag) are its record (:mod:`kci_storage.drivers.local.properties`), which belongs to one version of the file. A file
that was put there or changed by hand has no record: its ETag is its identity, and its type is unknown.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from kci_storage.config.settings import Config
from kci_storage.drivers.base import Digests, Driver, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.drivers.local import legacy_types
from kci_storage.drivers.local.properties import Identity, NewRecord, Records
from kci_storage.drivers.local.tree import ABSENT, Tree
from kci_storage.errors import (
    BackendError,
    BadKey,
    KeyConflict,
    ObjectChanged,
    ObjectNotFound,
    OutcomeUnknown,
    PreconditionFailed,
    StorageError,
)
from kci_storage.files import durable
from kci_storage.files.locks import KeyLocks

PAGE_SIZE = 1000  # objects and folders
TRIES = 20  # how often to start over when another process changes the files meanwhile
LOCK_TIMEOUT = 30  # seconds; a commit holds its lock while the disk is flushed a few times

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: opening a named pipe waits for its writer


class LocalDriver(Driver):
    """Objects as files under one folder.

    :param storage_path: the folder; the first upload creates it.
    """

    def __init__(self, storage_path: Path):
        self._tree = Tree(storage_path)
        self._temporary = storage_path / ".kci/tmp"
        self._lock_directory = storage_path / ".kci/lock"
        self._records = Records(self._tree, self._temporary)

    @classmethod
    def from_config(cls, config: Config) -> LocalDriver:
        return cls(config.local.storage_path)

    def open(self, key: str) -> tuple[ObjectInfo, int]:
        """The object's properties and its open file, see :class:`~kci_storage.drivers.base.LocalObjects`.

        Every download does this, so it costs one open, one fstat and a look-up in memory.
        """
        _check_visible(key)
        for _ in range(TRIES):
            fd = -1
            try:
                fd = self._tree.call(os.open, key, _READ)
                info = self._describe(key, fd)
                if info is not None:
                    opened, fd = fd, -1
                    return info, opened
            except OSError as exc:
                raise _read_error(exc) from exc
            finally:
                if fd >= 0:
                    os.close(fd)
        raise _busy()

    def stat(self, key: str) -> ObjectInfo:
        _check_visible(key)
        with _own_errors():
            identity = _identity_of(self._tree.call(os.stat, key))
        info = self._records.remembered(key, identity)
        if info is None:
            info, fd = self.open(key)
            os.close(fd)
        return info

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        info, fd = self.open(key)
        if etag not in (None, info.etag):
            os.close(fd)
            raise ObjectChanged("the object was replaced")
        return _Reader(info, io.FileIO(fd), start, info.size if stop is None else min(stop, info.size))

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        """Begin a new version.

        :raises KeyConflict: a file or folder is in the way. This is raised before the body is received.
        :raises BadKey: it is in the folder of an earlier server's files.
        """
        if legacy_types.is_hidden(key):
            raise BadKey(f'"{legacy_types.FOLDER}/" is reserved, for what an earlier server has left there')
        with _own_errors(_write_error):
            self._check_place(key)
            return _Writer(self, key, content_type, tags or {}, durable.NewFile.unnamed(self._temporary))

    def delete(self, key: str, expected: str) -> None:
        _check_visible(key)
        with _own_errors(), self._locked(key):
            identity = self._identity(key)
            if identity is None:
                raise _not_found()
            self._check_expectation(key, identity, expected)
            try:
                self._remove(key, identity)
            except OSError as exc:
                if self._identity(key) != identity:
                    raise _unconfirmed(exc) from exc
                raise

    def _remove(self, key: str, identity: Identity) -> None:
        folder, _, name = key.rpartition("/")
        with self._tree.folder(folder) as fd:
            durable.remove_from(fd, name.encode())
        self._records.remove(key, identity)
        self._tree.prune(key)

    def fence(self, key: str, expected: str) -> ObjectInfo | None:
        """There is nothing to do: a change is carried out before the call returns, or never."""
        info = self.stat(key)
        if info.etag != expected:
            raise _unexpected()
        return info

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        with _own_errors(), contextlib.closing(self._tree.walk(prefix, marker or "", bool(delimiter))) as walk:
            return self._page(walk, details)

    def probe(self) -> None:
        with _own_errors(_write_error):
            durable.make_directory(self._temporary)
            if not os.access(self._temporary, os.W_OK | os.X_OK):
                raise BackendError("the storage folder cannot be written to")
            self._locks.check_usable()

    def close(self) -> None:
        """Nothing to do: no file is kept open."""

    def recover(self) -> int:
        """Remove temporary files and locks whose holder died, and records that it had written without content."""
        with _own_errors():
            removed = durable.remove_abandoned(self._temporary)
            if self._lock_directory.exists():
                removed += sum(1 + self._remove_stale_records(digest) for digest in self._locks.orphans())
                self._locks.sweep()
        return removed

    def sweep(self) -> int:
        """As :meth:`recover`, and remove all records without content: also of files that were changed by hand."""
        removed = self.recover()
        with _own_errors():
            for path, key, identity in self._records.files():
                if self._identity_text(key) != identity:
                    removed += self._remove_orphan(path, key, identity)
        return removed

    def _remove_stale_records(self, digest: str) -> int:
        """Remove a key's records that are not of its present version; how many. The caller holds its lock."""
        files = self._records.files_of(digest)
        return sum(durable.remove(path) for path, key, identity in files if self._identity_text(key) != identity)

    def _remove_orphan(self, path: Path, key: str, identity: str) -> bool:
        with self._locked(key):  # a commit writes the record shortly before the content
            return self._identity_text(key) != identity and durable.remove(path)

    def _identity_text(self, key: str) -> str:
        return str(self._identity(key)) if key else ""

    # Describing files

    def _describe(self, key: str, fd: int, remember: bool = True) -> ObjectInfo | None:
        """The properties of an open file; None: it has been replaced meanwhile."""
        identity = _identity_of(os.fstat(fd))
        info = self._records.remembered(key, identity)
        if info is not None:
            return info
        info = self._records.read(key, identity, fd) or self._describe_plain(key, identity)
        if info is not None and remember:
            self._records.remember(key, identity, info)
        return info

    def _describe_plain(self, key: str, identity: Identity) -> ObjectInfo | None:
        """The properties of a file without a record; None: it has been replaced, and its record removed."""
        if self._identity(key) != identity:
            return None
        content_type = legacy_types.content_type(self._tree.root, key)
        return ObjectInfo(key, identity.size, str(identity), identity.mtime_ns // 10**9, content_type)

    def _identity(self, key: str) -> Identity | None:
        """The identity of the file at ``key``; None: there is none."""
        try:
            status = self._tree.call(os.stat, key)
        except OSError as exc:
            if exc.errno in ABSENT:
                return None
            raise
        return Identity.of(status) if stat.S_ISREG(status.st_mode) else None

    def _page(self, walk: Iterator[tuple[str, int]], details: bool) -> Page:
        objects: list[ObjectInfo] = []
        folders: list[str] = []
        last = None
        for key, folder_fd in islice(walk, PAGE_SIZE):
            last = key
            if key.endswith("/"):
                folders.append(key)
            elif not details:
                objects.append(ObjectInfo(key, 0, "", 0))
            else:
                objects.extend(self._listed(key, folder_fd))
        more = next(walk, None) is not None
        return Page(tuple(objects), tuple(folders), last if more else None)

    def _listed(self, key: str, folder_fd: int) -> Iterable[ObjectInfo]:
        """The properties of a listed object, if it is still there."""
        with contextlib.suppress(FileNotFoundError, ObjectNotFound):
            name = key.rpartition("/")[2].encode()
            identity = _identity_of(os.stat(name, dir_fd=folder_fd))
            info = self._records.remembered(key, identity) or self._look_at(key, identity, name, folder_fd)
            return (info or self.stat(key),)
        return ()

    def _look_at(self, key: str, identity: Identity, name: bytes, folder_fd: int) -> ObjectInfo | None:
        """The properties of a listed file. Remembering them would evict those that downloads need."""
        try:
            fd = os.open(name, _READ, dir_fd=folder_fd)
        except PermissionError:  # the other files must be listed all the same
            return self._describe_plain(key, identity)
        try:
            return self._describe(key, fd, remember=False)
        finally:
            os.close(fd)

    # Committing, for the writer

    @cached_property
    def _locks(self) -> KeyLocks:
        return KeyLocks(self._lock_directory)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Lock ``key`` during the block, against commits and deletions of all processes on this machine."""
        with self._locks.hold(_digest(key), LOCK_TIMEOUT) as lease:
            if lease.orphaned:
                self._remove_stale_records(_digest(key))
            yield

    def _check_place(self, key: str) -> None:
        obstacle = self._tree.obstacle(key)
        if obstacle is not None:
            raise KeyConflict(obstacle)

    def _commit(self, file: durable.NewFile, info: ObjectInfo, expected: str | None) -> ObjectInfo:
        """Make a temporary file the content of an object; ``info`` lacks only the time of modification."""
        with _own_errors(_write_error), self._locked(info.key):
            previous = self._identity(info.key)
            self._check_expectation(info.key, previous, expected)
            identity = Identity.of(file.stamp())
            info = replace(info, last_modified=identity.mtime_ns // 10**9)
            with self._records.attached(file, info, identity) as record:
                self._place(file, record, info.key)
            if previous is not None:
                self._records.remove(info.key, previous)
        return info

    def _place(self, file: durable.NewFile, record: NewRecord | None, key: str) -> None:
        """Rename an object's record, if it is a file, and its content to their final names, durably.

        The order matters: a journalling file system never keeps a later rename without an earlier one over a loss of
        power. So one flush at the end is enough for both.
        """
        if record is not None:
            record.take_name()
        try:
            self._place_content(file, record, key)
        except BaseException:
            if not file.named:
                if record is not None:
                    record.remove()
                self._tree.prune(key)
            raise

    def _place_content(self, file: durable.NewFile, record: NewRecord | None, key: str) -> None:
        """Rename the content to its key, create the folders that it needs, and wait for the disk."""
        folder, _, name = key.rpartition("/")
        for _ in range(TRIES):
            with contextlib.ExitStack() as stack:
                try:
                    fd = stack.enter_context(self._tree.folder(folder, make=True))
                    file.take_name(name.encode(), fd)
                except (
                    FileNotFoundError
                ):  # another process has deleted the last file in the folder, and so the folder
                    continue
                except (IsADirectoryError, NotADirectoryError):
                    self._check_place(key)  # which removes empty folders
                    continue
                if record is not None:
                    durable.sync_directory_fd(record.folder_fd)
                durable.sync_directory_fd(fd)
                return
        raise _busy()

    def _check_expectation(self, key: str, present: Identity | None, expected: str | None) -> None:
        etag = None
        if present is not None:
            with contextlib.suppress(ObjectNotFound):  # it was removed by hand meanwhile
                etag = self.stat(key).etag
        if etag != expected:
            raise _unexpected()


class _Reader(ObjectReader):
    """Bytes of an open file. An upload replaces the file, and does not change the open one."""

    def __init__(self, info: ObjectInfo, file: io.FileIO, start: int, stop: int):
        self.info = info
        self._file = file
        self._position = start
        self._stop = stop
        self._identity = Identity.of(os.fstat(file.fileno()))

    def readinto(self, buffer: memoryview) -> int:
        wanted = buffer[: max(self._stop - self._position, 0)]
        with _own_errors():
            size = os.preadv(self._file.fileno(), [wanted], self._position)
            unchanged = Identity.of(os.fstat(self._file.fileno())) == self._identity
        if wanted and not (size and unchanged):
            raise ObjectChanged("the file was changed by hand while it was read")
        self._position += size
        return size

    def close(self) -> None:
        self._file.close()


class _Writer(ObjectWriter):
    """A temporary file that becomes the object."""

    def __init__(
        self, driver: LocalDriver, key: str, content_type: str, tags: Mapping[str, str], file: durable.NewFile
    ):
        self._driver = driver
        self._key = key
        self._content_type = content_type
        self._tags = tags
        self._file = file

    def flush(self) -> None:
        """Nothing to do: nothing is held in memory."""

    def write(self, data: bytes | memoryview) -> None:
        with _own_errors(_write_error):
            self._file.write(data)
            self._file.begin_writeback()

    def commit(
        self,
        digests: Digests,
        expected: str | None,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        etag = _etag(digests.sha256, self._content_type)
        info = ObjectInfo(
            self._key, digests.size, etag, 0, self._content_type, digests.sha256, digests.md5, self._tags
        )
        try:
            return self._driver._commit(self._file, info, expected)  # noqa: SLF001  (no part of the contract)
        except StorageError as exc:
            if self._file.named:
                raise _unconfirmed(exc) from exc
            raise

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.discard()


def _etag(sha256: str, content_type: str) -> str:
    """The ETag of an upload.

    It is made from the content, so it is strong (RFC 9110 section 8.8.1), and after the same upload again clients'
    copies are still valid; and from the type, since another type is another representation. 128 bits of SHA-256 do
    not collide by chance.
    """
    return hashlib.sha256(f"{sha256} {content_type}".encode()).hexdigest()[:32]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _read_error(exc: OSError) -> StorageError:
    return _not_found() if exc.errno in ABSENT else _failure(exc)


def _write_error(exc: OSError) -> StorageError:
    if exc.errno == errno.ENAMETOOLONG:
        return BadKey("the key has a segment that is longer than the server's file system takes")
    return _failure(exc)


def _failure(exc: OSError) -> BackendError:
    if isinstance(exc, PermissionError):
        return BackendError("the server may not use a file or folder in its storage", detail=str(exc))
    return BackendError("the server's storage failed", detail=str(exc))


@contextlib.contextmanager
def _own_errors(error: Callable[[OSError], StorageError] = _read_error) -> Iterator[None]:
    """Translate the system's errors into the server's."""
    try:
        yield
    except OSError as exc:
        raise error(exc) from exc


def _check_visible(key: str) -> None:
    if legacy_types.is_hidden(key):
        raise _not_found()


def _identity_of(status: os.stat_result) -> Identity:
    """The identity of a file, from its status.

    :raises ObjectNotFound: it is not a regular file, so not an object.
    """
    if not stat.S_ISREG(status.st_mode):
        raise _not_found()
    return Identity.of(status)


def _not_found() -> ObjectNotFound:
    return ObjectNotFound("no such file")


def _unconfirmed(error: Exception) -> OutcomeUnknown:
    """The error for a change that was made, but that a loss of power may undo."""
    detail = getattr(error, "detail", None) or str(error)
    return OutcomeUnknown("the change was made, but the server's disk did not confirm it", detail=detail)


def _unexpected() -> PreconditionFailed:
    return PreconditionFailed("the stored version is not the expected one")


def _busy() -> BackendError:
    return BackendError("the object is being changed all the time")
