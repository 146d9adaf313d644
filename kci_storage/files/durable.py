# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one way in which this program writes files.

A file comes into being under a name that nobody reads, is flushed, and is renamed to its final name; then its
folder is flushed. So whatever is found under a final name is complete, after a crash of the process and after a
loss of power. Nothing else in the program opens a file for writing (a test holds that).

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
WRITEBACK_STEP = 8 * 1024 * 1024  # bytes after which the disk is given something to do
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ATTRIBUTE = {errno.ENOTSUP, errno.E2BIG, errno.ENOSPC, errno.EDQUOT}  # there are none, or none so large


@contextlib.contextmanager
def _full_disk_is_insufficient_storage() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            raise InsufficientStorage("no room on the server's disk", detail=str(exc)) from exc
        raise


class NewFile:
    """A file that is being written: readable by nobody by its final name until :meth:`publish`.

    It is locked (``flock``) from its creation until it is closed: a temporary file that is not locked has lost its
    writer, and :func:`remove_if_unlocked` may take it. Used as a context manager, it is discarded at the end of the
    block unless it was published.

    :param path: its temporary name, on the file system of its final one.
    :param fd: the file itself, open for appending and locked by the caller; None: it is made, and must not exist.
    :raises InsufficientStorage: the disk is full.
    """

    def __init__(self, path: Path, fd: int | None = None):
        self.path = path
        with _full_disk_is_insufficient_storage():
            self._fd = _create(path) if fd is None else fd
        self.size = 0 if fd is None else os.lseek(fd, 0, os.SEEK_END)  # bytes written so far
        self._begun = 0  # bytes that the disk was asked to begin with
        self._flushed = False
        self._stamped = False
        self.named = False  # whether it has its final name

    @classmethod
    def unnamed(cls, directory: Path) -> NewFile:
        """A new file of a random temporary name in ``directory``."""
        return cls(directory / f"{secrets.token_hex(8)}.part")

    @classmethod
    def take_over(cls, path: Path) -> NewFile | None:
        """What a writer that died has left under this temporary name; None: nothing, or somebody else has it."""
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
        """Have the file system set room aside for ``size`` bytes in all, if it can; nothing is promised by it.

        The file stays as long as what was written. Of a large file, writes are quicker then: the file system need not
        look for each block's place on its own.
        """
        if fallocate is not None:
            fallocate(self._fd, FALLOC_FL_KEEP_SIZE, 0, size)

    def begin_writeback(self, least: int = WRITEBACK_STEP) -> None:
        """Have the disk begin with what was written, so that a flush is short. Nothing is promised by it.

        It does not wait for the disk, unless that has more than enough to do already.

        :param least: bytes; fewer than these new ones are not worth it.
        """
        if self.size - self._begun >= least and sync_file_range is not None:
            sync_file_range(self._fd, self._begun, self.size - self._begun, SYNC_FILE_RANGE_WRITE)
            self._begun = self.size

    def stamp(self) -> os.stat_result:
        """Set its time of modification to now, when all has been written; its status, which it keeps."""
        now = time.time_ns()
        os.utime(self._fd, ns=(now, now))
        self._flushed, self._stamped = False, True
        return os.fstat(self._fd)

    def set_attribute(self, name: str, value: bytes) -> bool:
        """Attach a piece of information, after :meth:`stamp`; False: this file system cannot hold it."""
        try:
            os.setxattr(self._fd, name, value)
        except OSError as exc:
            if exc.errno in _NO_ATTRIBUTE:
                return False
            raise
        return True

    def flush(self) -> None:
        """Have the disk take what was written, so that :meth:`publish` is quick.

        :raises InsufficientStorage: the disk is full.
        """
        if not self._flushed:
            with _full_disk_is_insufficient_storage():
                if self._stamped:
                    os.fsync(self._fd)
                else:
                    os.fdatasync(self._fd)  # which leaves out the times
            self._flushed = True

    def truncate(self) -> None:
        """Throw away all that was written, for everybody who has it open."""
        os.ftruncate(self._fd, 0)
        self.size = self._begun = 0
        self._flushed = False

    def publish(self, name: Path | str | bytes) -> None:
        """Flush, take the final name, replacing what has it, and flush the folder.

        :raises InsufficientStorage: the disk is full.
        :raises OSError: the name cannot be taken; the temporary file is still there.
        """
        self.take_name(name)
        sync_directory(Path(os.fsdecode(name)).parent)
        self.close()

    def take_name(self, name: Path | str | bytes, directory_fd: int | None = None) -> None:
        """Flush, and take the final name, replacing what has it; the caller flushes the folder.

        :param name: relative to ``directory_fd`` where that is given (paths that are longer than the system takes in
            one piece).
        :raises InsufficientStorage: the disk is full.
        :raises OSError: the name cannot be taken; the temporary file is still there.
        """
        self.flush()
        with _full_disk_is_insufficient_storage():
            os.rename(self.path, name, dst_dir_fd=directory_fd)
        self.named = True

    def discard(self) -> None:
        """Remove the temporary file and close; nothing when it was published, discarded or closed."""
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
        os.close(fd)  # a sweep came between creation and lock, and took the file for left behind
        remove(path)


def try_lock(fd: int) -> bool:
    """Lock an open file for this descriptor alone, without waiting; whether that worked.

    Two descriptors of one file exclude each other, be they of two processes or two threads (``flock(2)``).
    """
    try:
        portalocker.lock(fd, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.exceptions.AlreadyLocked:
        return False
    return True


def is_file_at(fd: int, path: str | Path) -> bool:
    """Whether ``path`` leads to the open file, rather than to another one or nowhere."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


@contextlib.contextmanager
def abandoned(path: Path) -> Iterator[os.stat_result | None]:
    """Hold the lock of a temporary file during the block if its writer is dead.

    The block gets the file's status; None: its writer lives, or there is no such file.
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
    """Whether a temporary file is there and its writer lives."""
    with abandoned(path) as status:
        return status is None and path.exists()


def remove_if_unlocked(path: Path) -> bool:
    """Remove a temporary file if its writer is dead; whether it was removed."""
    with abandoned(path) as status:
        return status is not None and remove(path)


def flush_together(*files: NewFile) -> None:
    """Have the disk take what was written to several files.

    It begins with all before any is waited for: then one commit of the file system's journal is enough for all.

    :raises InsufficientStorage: the disk is full.
    """
    for file in files:
        file.begin_writeback(least=1)
    for file in files:
        file.flush()


def write_file(path: Path, data: bytes) -> None:
    """Put ``data`` under ``path``, whole or not at all, replacing what was there.

    :raises InsufficientStorage: the disk is full.
    """
    with NewFile(path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")) as file:
        file.write(data)
        file.publish(path)


def open_lock_file(path: Path) -> int:
    """A descriptor of a file to lock, made, with its folder, where there is none.

    :raises InsufficientStorage: the disk is full.
    """
    return open_or_make_lock_file(path)[0]


def open_or_make_lock_file(path: Path) -> tuple[int, bool]:
    """The same, and whether this call made the file.

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
    """Put ``data`` into a lock file. Who reads it meanwhile may see a part of it.

    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        os.ftruncate(fd, 0)
        written = os.pwrite(fd, data, 0)
        if written < len(data):
            os.pwrite(fd, data[written:], written)


def open_log_file(path: Path) -> int:
    """A descriptor that appends to ``path``."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)


def make_directory(path: Path) -> None:
    """Make a folder and those above it; nothing when it is there.

    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)


def make_subdirectory(name: bytes, directory_fd: int) -> None:
    """Make a folder in an open one, which is flushed; nothing when it is there.

    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage(), contextlib.suppress(FileExistsError):
        os.mkdir(name, DIRECTORY_MODE, dir_fd=directory_fd)
        os.fsync(directory_fd)


def remove(path: Path) -> bool:
    """Remove a file; whether it was there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def remove_from(directory_fd: int, name: bytes) -> None:
    """Remove a file from an open folder, which is flushed.

    :raises FileNotFoundError: it is not there.
    """
    os.unlink(name, dir_fd=directory_fd)
    os.fsync(directory_fd)


def link(old: Path, new: Path) -> bool:
    """Give a file one more name; False: there is a file of that name. The folder is not flushed.

    :raises FileNotFoundError: the file, or the new name's folder, is not there.
    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        try:
            os.link(old, new)
        except FileExistsError:
            return False
    return True


def rename(old: Path, new: Path) -> None:
    """Give a file another name in its folder, which is not flushed.

    :raises FileNotFoundError: there is no such file.
    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        os.rename(old, new)


def set_access_time(fd: int, status: os.stat_result, seconds: float) -> None:
    """Note when an open file was used; nothing where the system forbids that.

    :param status: of the file.
    :param seconds: since the epoch.
    """
    with contextlib.suppress(OSError):  # another user's file, a disk that is full or read-only
        os.utime(fd, ns=(int(seconds * 1e9), status.st_mtime_ns))


def sync_directory(path: Path) -> None:
    """Flush a folder, so that a rename in it outlives a loss of power.

    :raises InsufficientStorage: the disk is full.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_directory_fd(fd)
    finally:
        os.close(fd)


def sync_directory_fd(directory_fd: int) -> None:
    """The same of an open folder.

    :raises InsufficientStorage: the disk is full.
    """
    with _full_disk_is_insufficient_storage():
        os.fsync(directory_fd)
