# SPDX-License-Identifier: LGPL-2.1-or-later
"""Durable files: the only module of this program that opens files for writing (a test checks that).

A file is written under a temporary name, is flushed, and is renamed to its final name; then its folder is flushed.
So a file under a final name is complete, even after a crash of the process or a loss of power.

A full disk or an exhausted quota is :class:`~kci_storage.errors.InsufficientStorage` here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import portalocker

from kci_storage.errors import InsufficientStorage
from kci_storage.files.syscalls import FALLOC_FL_KEEP_SIZE, SYNC_FILE_RANGE_WRITE, fallocate, sync_file_range

FILE_MODE = 0o644  # nginx, as another user, reads what it is told to send
DIRECTORY_MODE = 0o755
WRITEBACK_STEP = 8 * 1024 * 1024  # new bytes after which writing to the disk begins
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ATTRIBUTE = {errno.ENOTSUP, errno.E2BIG, errno.ENOSPC, errno.EDQUOT}  # no attributes here, or none of this size


@contextlib.contextmanager
def _full_disk_is_insufficient_storage() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in _DISK_FULL:
            raise InsufficientStorage("no room on the server's disk", detail=str(exc)) from exc
        raise


class NewFile:
    """A file that is being written, under a temporary name until :meth:`publish`.

    It is locked (``flock``) from its creation until it is closed: the writer of an unlocked temporary file is dead,
    and :func:`remove_if_unlocked` may remove the file. Used as a context manager, it is discarded at the end of the
    block unless it was published.

    :param path: its temporary name, on the file system of its final one.
    :param fd: the open file, locked by the caller; None: it is created, and must not exist.
    :raises InsufficientStorage: the disk is full.
    """

    def __init__(self, path: Path, fd: int | None = None):
        self.path = path
        with _full_disk_is_insufficient_storage():
            self._fd = _create(path) if fd is None else fd
        self.size = 0 if fd is None else os.lseek(fd, 0, os.SEEK_END)  # bytes written so far
        self._begun = 0  # bytes for which writing to the disk has begun
        self._flushed = False
        self._stamped = False
        self.named = False  # whether it has its final name

    @classmethod
    def unnamed(cls, directory: Path) -> NewFile:
        """A new file of a random temporary name in ``directory``."""
        return cls(directory / f"{secrets.token_hex(8)}.part")

    @classmethod
    def take_over(cls, path: Path) -> NewFile | None:
        """Open and lock a temporary file of a dead writer; None: there is no such file, or it is locked."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if try_lock(fd) and is_file_at(fd, path):
            return cls(path, fd)
        os.close(fd)
        return None

    def fileno(self) -> int:
        """The descriptor, open for reading and writing."""
        return self._fd

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``.

        :raises InsufficientStorage: the disk is full.
        """
        view = memoryview(data)
        self._flushed = False
        with _full_disk_is_insufficient_storage():
            while view:
                written = os.write(self._fd, view)
                self.size += written
                view = view[written:]

    def reserve(self, size: int) -> None:
        """Reserve disk space for ``size`` bytes in all, if the file system can; this is a hint only.

        The file's length does not change. Writing a large file is faster then, since the file system allocates its
        blocks together.
        """
        if fallocate is not None:
            fallocate(self._fd, FALLOC_FL_KEEP_SIZE, 0, size)

    def begin_writeback(self, min_size: int = WRITEBACK_STEP) -> None:
        """Begin writing to the disk what was written to the file, so that a later flush is short; a hint only.

        It does not wait for the disk, unless the disk's queue is full.

        :param min_size: bytes; nothing is done for fewer new ones.
        """
        if self.size - self._begun >= min_size and sync_file_range is not None:
            sync_file_range(self._fd, self._begun, self.size - self._begun, SYNC_FILE_RANGE_WRITE)
            self._begun = self.size

    def stamp(self) -> os.stat_result:
        """Set the modification time to now, after the last write; the file's status, which does not change later."""
        now = time.time_ns()
        os.utime(self._fd, ns=(now, now))
        self._flushed, self._stamped = False, True
        return os.fstat(self._fd)

    def set_attribute(self, name: str, value: bytes) -> bool:
        """Set an extended attribute (``xattr(7)``), after :meth:`stamp`; False: this file system cannot store it."""
        try:
            os.setxattr(self._fd, name, value)
        except OSError as exc:
            if exc.errno in _NO_ATTRIBUTE:
                return False
            raise
        return True

    def flush(self) -> None:
        """Flush the content to the disk, so that :meth:`publish` is quick.

        :raises InsufficientStorage: the disk is full.
        """
        if not self._flushed:
            with _full_disk_is_insufficient_storage():
                if self._stamped:
                    os.fsync(self._fd)
                else:
                    os.fdatasync(self._fd)  # without the times
            self._flushed = True

    def truncate(self) -> None:
        """Cut the file to no bytes; other processes that have it open see this as well."""
        os.ftruncate(self._fd, 0)
        self.size = self._begun = 0
        self._flushed = False

    def publish(self, name: Path | str | bytes) -> None:
        """Flush, take the final name, replacing a file of that name, and flush the folder.

        :raises InsufficientStorage: the disk is full.
        :raises OSError: the name cannot be taken; the temporary file is still there.
        """
        self.take_name(name)
        sync_directory(Path(os.fsdecode(name)).parent)
        self.close()

    def take_name(self, name: Path | str | bytes, directory_fd: int | None = None) -> None:
        """Flush, and take the final name, replacing a file of that name; the caller flushes the folder.

        :param name: relative to ``directory_fd`` if that is given (for paths that are longer than ``PATH_MAX``).
        :raises InsufficientStorage: the disk is full.
        :raises OSError: the name cannot be taken; the temporary file is still there.
        """
        self.flush()
        with _full_disk_is_insufficient_storage():
            os.rename(self.path, name, dst_dir_fd=directory_fd)
        self.named = True

    def discard(self) -> None:
        """Remove the temporary file and close. Does nothing if it was published, discarded or closed."""
        try:
            if self._fd >= 0 and not self.named and is_file_at(self._fd, self.path):
                remove(self.path)
        finally:
            self.close()

    def close(self) -> None:
        """Close the descriptor; the file stays under the name it has."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.discard()


def _create(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    while True:
        try:
            fd = os.open(path, flags, FILE_MODE)
        except FileNotFoundError:
            make_directory(path.parent)
            continue
        if try_lock(fd) and os.fstat(fd).st_nlink > 0:
            return fd
        os.close(fd)  # a sweep came between creation and lock, and took the file for that of a dead writer
        remove(path)


def try_lock(fd: int) -> bool:
    """Lock an open file without waiting; whether that worked.

    The lock belongs to the open file description (``flock(2)``), so it excludes other threads as well as processes.
    """
    try:
        portalocker.lock(fd, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.exceptions.AlreadyLocked:
        return False
    return True


def is_file_at(fd: int, path: str | Path) -> bool:
    """Whether ``path`` names the open file, rather than another one or none."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


@contextlib.contextmanager
def abandoned(path: Path) -> Iterator[os.stat_result | None]:
    """Hold the lock of a temporary file during the block if its writer is dead.

    The block's value is the file's status; None: the writer is alive, or there is no such file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield os.fstat(fd) if try_lock(fd) and is_file_at(fd, path) else None
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether there is a temporary file whose writer is alive."""
    with abandoned(path) as status:
        return status is None and path.exists()


def remove_if_unlocked(path: Path) -> bool:
    """Remove a temporary file if its writer is dead; whether it was removed."""
    with abandoned(path) as status:
        return status is not None and remove(path)


def remove_abandoned(directory: Path) -> int:
    """Remove the temporary files of dead writers from a folder; how many. A missing folder has none.

    A file that cannot be removed, such as another user's, does not keep the others.
    """
    removed = 0
    for path in files_in(directory):
        with contextlib.suppress(OSError):
            removed += remove_if_unlocked(path)
    return removed


def files_in(directory: Path) -> Iterator[Path]:
    """The paths of a folder's files; none if the folder is missing."""
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            yield Path(entry.path)


def flush_together(*files: NewFile) -> None:
    """Flush the content of several files to the disk.

    Writing begins for all of them before the first is waited for, so that one journal commit serves all.

    :raises InsufficientStorage: the disk is full.
    """
    for file in files:
        file.begin_writeback(min_size=1)
    for file in files:
        file.flush()


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` to a file, atomically, replacing a file of that name.

    :raises InsufficientStorage: the disk is full.
    """
    with NewFile(path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")) as file:
        file.write(data)
        file.publish(path)


def open_lock_file(path: Path) -> int:
    """Open a file to lock, created with its folder if there is none; its descriptor.

    :raises InsufficientStorage: the disk is full.
    """
    return open_or_make_lock_file(path)[0]


def open_or_make_lock_file(path: Path) -> tuple[int, bool]:
    """As :func:`open_lock_file`; the descriptor, and whether this call created the file.

    :raises InsufficientStorage: the disk is full.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    while True:
        with _full_disk_is_insufficient_storage():
            try:
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, FILE_MODE), True
            except FileNotFoundError:
                make_directory(path.parent)
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):  # removed since
                    return os.open(path, flags), False


def write_lock_file(fd: int, data: bytes) -> None:
    """Write ``data`` to a lock file. A concurrent reader may see a part of it.

    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        os.ftruncate(fd, 0)
        written = os.pwrite(fd, data, 0)
        if written < len(data):
            os.pwrite(fd, data[written:], written)


def open_log_file(path: Path) -> int:
    """Open a log file for appending, created if there is none; its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)


def make_directory(path: Path) -> None:
    """Create a folder and its parents, where they are missing.

    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)


def make_subdirectory(name: bytes, directory_fd: int) -> None:
    """Create a folder in an open one, unless it exists, and flush the open one.

    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage(), contextlib.suppress(FileExistsError):
        os.mkdir(name, DIRECTORY_MODE, dir_fd=directory_fd)
        os.fsync(directory_fd)


def remove(path: Path) -> bool:
    """Remove a file; whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def remove_from(directory_fd: int, name: bytes) -> None:
    """Remove a file from an open folder, and flush that folder.

    :raises FileNotFoundError: it is not there.
    """
    os.unlink(name, dir_fd=directory_fd)
    os.fsync(directory_fd)


def link(old: Path, new: Path) -> bool:
    """Make a hard link; False: there is a file of that name. The folder is not flushed.

    :raises FileNotFoundError: the file, or the new name's folder, does not exist.
    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        try:
            os.link(old, new)
        except FileExistsError:
            return False
    return True


def rename(old: Path, new: Path) -> None:
    """Rename a file within its folder, which is not flushed.

    :raises FileNotFoundError: there is no such file.
    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        os.rename(old, new)


def set_access_time(fd: int, status: os.stat_result, seconds: float) -> None:
    """Set an open file's access time, where the system allows that.

    :param status: the file's, whose modification time is kept.
    :param seconds: since the epoch.
    """
    with contextlib.suppress(OSError):  # another user's file, a disk that is full or read-only
        os.utime(fd, ns=(int(seconds * 1e9), status.st_mtime_ns))


def sync_directory(path: Path) -> None:
    """Flush a folder, so that a rename in it survives a loss of power.

    :raises InsufficientStorage: the disk is full.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_directory_fd(fd)
    finally:
        os.close(fd)


def sync_directory_fd(directory_fd: int) -> None:
    """As :func:`sync_directory`, for an open folder.

    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        os.fsync(directory_fd)
