# SPDX-License-Identifier: LGPL-2.1-or-later
"""A folder of plain files, addressed by keys: the paths of the local driver.

A key of 1,024 characters can be 4,096 bytes, more than the system accepts as one path. Such a file is reached folder
by folder. Every other file is reached by its path in one call, since each download begins with that.

Keys are valid by :mod:`kci_storage.keys`, so a path leaves the folder only through a link that the operator has made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kci_storage.drivers.local.legacy_types import is_hidden
from kci_storage.files import durable
from kci_storage.keys import is_valid

PATH_MAX = 4096  # bytes, with the NUL that ends it (limits.h)
WINDOW = 10_000  # names of one folder that a listing holds at a time
WINDOWS_KEPT = 8  # for the next pages of listings
SETTLED = 2 * 10**9  # nanoseconds; a younger folder may change again without a new time of modification

# The system's errors for a path at which there is no file: a folder in it is a file, a link is broken, a socket
# cannot be opened, a name is longer than the file system accepts.
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG}

T = TypeVar("T")

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Tree:
    """The files below one folder, which need not exist.

    Its methods raise OSError, as the system does.
    """

    def __init__(self, root: Path):
        self.root = root
        self._prefix = os.fsencode(root) + b"/"
        self._windows = _Windows()

    def call(self, function: Callable[..., T], key: str, *args: Any) -> T:
        """Call ``function`` for a key's file; it takes a path and ``dir_fd``, as ``os.open`` and ``os.stat`` do."""
        path = self._prefix + key.encode()
        if len(path) < PATH_MAX:
            return function(path, *args)
        folder, _, name = key.rpartition("/")
        with self.folder(folder) as fd:
            return function(name.encode(), *args, dir_fd=fd)

    @contextlib.contextmanager
    def folder(self, path: str, make: bool = False) -> Iterator[int]:
        """A descriptor of a folder (``""``: the root), open during the block.

        :param make: whether to create it if it is missing, durably.
        """
        fd = self._open_folder(path, make)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_folder(self, path: str, make: bool) -> int:
        whole = self._prefix + path.encode()
        if len(whole) < PATH_MAX:
            try:
                return os.open(whole, _FOLDER)
            except FileNotFoundError:
                if not make:
                    raise
        return self._open_in_steps(path, make)

    def _open_in_steps(self, path: str, make: bool) -> int:
        fd = os.open(self._prefix, _FOLDER)
        for segment in filter(None, path.split("/")):
            outer = fd
            try:
                fd = _enter(outer, segment.encode(), make)
            finally:
                os.close(outer)
        return fd

    def obstacle(self, key: str) -> str | None:
        """Why no file can be stored at ``key``, as a sentence; None: it can."""
        try:
            kind = self._kind(key)
        except NotADirectoryError:
            return self._file_above(key)
        if kind is not None and stat.S_ISDIR(kind) and not self.remove_if_empty(key):
            return f"{_quote(key)} is a folder, so there can be no file of this name"
        return None

    def _file_above(self, key: str) -> str | None:
        for folder in reversed(list(_folders_above(key))):
            kind = self._kind(folder)
            if kind is None:
                return None
            if not stat.S_ISDIR(kind):
                return f"{_quote(folder)} is a file, so there can be nothing below it"
        return None

    def _kind(self, key: str) -> int | None:
        try:
            return self.call(os.stat, key).st_mode
        except FileNotFoundError:
            return None

    def remove_if_empty(self, folder: str) -> bool:
        """Remove a folder if there is no file in it at any depth; whether it is gone."""
        try:
            if not stat.S_ISDIR(self.call(os.lstat, folder).st_mode):
                return False  # a link to a folder
            with self.folder(folder) as fd, os.scandir(fd) as entries:
                inner = [os.fsencode(entry.name).decode() for entry in entries if entry.is_dir(follow_symlinks=False)]
            for name in inner:
                self.remove_if_empty(f"{folder}/{name}")
            self.call(os.rmdir, folder)
        except FileNotFoundError:
            return True
        except (OSError, UnicodeDecodeError):
            return False
        return True

    def prune(self, key: str) -> None:
        """Remove the folders above ``key`` that are empty. Never raises."""
        for folder in _folders_above(key):
            try:
                self.call(os.rmdir, folder)
            except FileNotFoundError:
                continue
            except OSError:
                return

    def walk(
        self, prefix: str = "", marker: str = "", grouped: bool = False
    ) -> Generator[tuple[str, int], None, None]:
        """The keys that start with ``prefix`` and come after ``marker``, in the order of their UTF-8 bytes.

        :param grouped: whether a folder below ``prefix`` is given as one name that ends in a slash, if there is any
            key in it.
        :returns: each key, and a descriptor of its folder, open until the next key is requested.
        """
        folder, slash, _ = prefix.rpartition("/")
        if slash and not is_valid(f"{folder}/x"):
            return
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(self.folder(folder))
            except OSError as exc:
                if exc.errno not in ABSENT:
                    raise
                return
            yield from _Walk(self._windows, prefix, marker, grouped).below(fd, folder + slash, ())


class _Walk:
    """One listing."""

    def __init__(self, windows: _Windows, prefix: str, marker: str, grouped: bool):
        self._windows = windows
        self._prefix = prefix
        self._marker = marker
        self._grouped = grouped

    def below(self, fd: int, path: str, above: tuple[tuple[int, int], ...]) -> Generator[tuple[str, int], None, None]:
        """The wanted keys in one folder and in the folders below it.

        :param path: the folder's path with its closing slash; empty: the root.
        :param above: device and inode of the folders on the way here; a link back to one of them is not followed.
        """
        identity = _identity(fd)
        if identity in above:
            return
        for name in self._names(fd, path):
            if not name.endswith("/"):
                yield path + name, fd
                continue
            with _inner_folder(fd, name) as inner:
                if inner is None:
                    continue
                if not self._grouped:
                    yield from self.below(inner, path + name, (*above, identity))
                elif self._holds_keys(inner, path + name, (*above, identity)):
                    yield path + name, fd

    def _holds_keys(self, fd: int, path: str, above: tuple[tuple[int, int], ...]) -> bool:
        with contextlib.closing(_Walk(self._windows, "", "", False).below(fd, path, above)) as keys:
            return next(keys, None) is not None

    def _names(self, fd: int, path: str) -> Iterator[str]:
        """The wanted entries of a folder, in order."""
        start = self._prefix[len(path) :]  # nothing but in the uppermost folder
        low: str | None = max(start, self._lowest(path))
        while low is not None:
            names, low = self._windows.get(fd, low)
            for name in names:
                if not name.startswith(start):
                    return
                if _is_listed(path + name):
                    yield name

    def _lowest(self, path: str) -> str:
        """The first name in a folder that comes after the marker."""
        if not self._marker.startswith(path):
            return ""
        name, slash, _ = self._marker[len(path) :].partition("/")
        if slash and not self._grouped:
            return name + slash  # the marker is in that folder, or is the folder itself
        return _successor(name + slash)


class _Windows:
    """The names in folders, sorted, some thousands at a time: a folder may hold more than fits into memory.

    The latest windows of large folders are kept, so that not every page of a listing reads the folder again.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], tuple[int, str, list[str]]] = {}  # by folder: its mtime, low, the names

    def get(self, fd: int, low: str) -> tuple[list[str], str | None]:
        """The names in a folder from ``low`` on, and where the next ones begin; None: these are the last."""
        status = os.fstat(fd)
        folder = status.st_dev, status.st_ino
        mtime_ns, lowest, names = self._latest.get(folder, (None, "", []))
        if mtime_ns == status.st_mtime_ns and lowest <= low <= names[-1]:
            return names[bisect_left(names, low) :], _successor(names[-1])
        names = _window(fd, low)
        if len(names) < WINDOW:
            return names, None
        if time.time_ns() - status.st_mtime_ns > SETTLED:
            self._keep(folder, (status.st_mtime_ns, low, names))
        return names, _successor(names[-1])

    def _keep(self, folder: tuple[int, int], window: tuple[int, str, list[str]]) -> None:
        with contextlib.suppress(KeyError, RuntimeError):  # another thread made room at the same time
            while len(self._latest) >= WINDOWS_KEPT and folder not in self._latest:
                del self._latest[next(iter(self._latest))]
        self._latest[folder] = window


def _window(fd: int, low: str) -> list[str]:
    """The first names in a folder from ``low`` on, in order."""
    names: list[str] = []
    for name in _entries(fd):
        if name >= low:
            names.append(name)
            if len(names) >= 2 * WINDOW:
                names = sorted(set(names))[:WINDOW]
    return sorted(set(names))[:WINDOW]


def _successor(name: str) -> str:
    """The text that sorts right after a name, with no other name in between."""
    return name + "\0"


def _enter(fd: int, name: bytes, make: bool) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=fd)
    except FileNotFoundError:
        if not make:
            raise
    durable.make_subdirectory(name, fd)
    return os.open(name, _FOLDER, dir_fd=fd)


@contextlib.contextmanager
def _inner_folder(fd: int, name: str) -> Iterator[int | None]:
    """A subfolder, open during the block; None: it is gone, or the server may not read it."""
    try:
        inner = os.open(name[:-1].encode(), _FOLDER, dir_fd=fd)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # the last: lost+found of a file system
        yield None
        return
    try:
        yield inner
    finally:
        os.close(inner)


def _entries(fd: int) -> Iterator[str]:
    """The names in a folder that could be part of a key, unsorted; those of folders end in a slash."""
    with os.scandir(fd) as entries:
        for entry in entries:
            with contextlib.suppress(OSError, UnicodeDecodeError):  # a loop of links; a name that is not UTF-8
                name = entry.name if entry.name.isascii() else os.fsencode(entry.name).decode()
                if entry.is_dir():
                    yield name + "/"
                elif entry.is_file():
                    yield name


def _is_listed(path: str) -> bool:
    """Whether it is a valid key, or a folder in which there can be valid keys.

    >>> _is_listed("a.txt"), _is_listed("upload"), _is_listed("upload/")
    (True, False, True)
    >>> _is_listed(".kci/"), _is_listed(".metadata/")
    (False, False)
    """
    return is_valid(path + "x" if path.endswith("/") else path) and not is_hidden(path)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _folders_above(key: str) -> Iterator[str]:
    """The folders above a key, the innermost first.

    >>> list(_folders_above("a/b/c"))
    ['a/b', 'a']
    """
    while "/" in key:
        key = key.rpartition("/")[0]
        yield key


def _quote(key: str) -> str:
    return f'"{key}"' if len(key) <= 80 else f'"…{key[-80:]}"'
