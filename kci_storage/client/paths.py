# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mapping between local files and keys. Pure, except for reading local folders.

As with ``cp -r``, a folder keeps its name: ``upload build --to x`` stores ``x/build/…``, ``download x/build/`` makes
``build/…``. ``upload build/.`` stores the folder's content without its name.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kci_storage import keys
from kci_storage.client.errors import UsageError
from kci_storage.errors import BadKey

MAX_NAME = 255  # bytes of a file's name on Linux (NAME_MAX)


@dataclass(frozen=True)
class LocalFile:
    """A file to upload."""

    path: str
    key: str


def key_prefix(to: str) -> str:
    """The start of all keys of an upload.

    >>> key_prefix("/mainline/v6.12/"), key_prefix("/"), key_prefix(".")
    ('mainline/v6.12/', '', '')
    """
    folder = "/".join(segment for segment in to.split("/") if segment)
    return f"{folder}/" if folder not in ("", ".") else ""


def files_to_upload(paths: Iterable[str], to: str, note: Callable[[str], None]) -> list[LocalFile]:
    """The given files, and all files in the given folders, ordered by name within each folder.

    In a folder, symbolic links to files count as files. Links to folders are left out, since they may lead anywhere
    or form loops; so are other kinds of files. A link that is given itself is followed.

    :param note: called with a message for each entry that is left out.
    :raises UsageError: two files would get the same key, or one does not exist.
    """
    found: dict[str, str] = {}
    for path in paths:
        for file in _below(path, key_prefix(to), note):
            if (other := found.setdefault(file.key, file.path)) != file.path:
                raise UsageError(f"{other} and {file.path} would both become {file.key}")
    return [LocalFile(path, key) for key, path in found.items()]


def _below(path: str, prefix: str, note: Callable[[str], None]) -> Iterator[LocalFile]:
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file or folder")
    if os.path.isfile(path):
        yield LocalFile(path, prefix + os.path.basename(path))
        return
    if not os.path.isdir(path):
        raise UsageError(f"{path}: neither a file nor a folder")
    last = path.rstrip("/").rpartition("/")[2]
    name = "" if last in ("", ".") else os.path.basename(os.path.abspath(path))
    yield from _in_folder(path, f"{prefix}{name}/" if name else prefix, note)


def _in_folder(folder: str, prefix: str, note: Callable[[str], None]) -> Iterator[LocalFile]:
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as exc:
        raise UsageError(f"{folder}: {exc.strerror}") from exc
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _in_folder(entry.path, f"{prefix}{entry.name}/", note)
        elif entry.is_dir():
            note(f"{entry.path}: left out, a symbolic link to a folder")
        elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
            yield LocalFile(entry.path, prefix + entry.name)  # a link that leads nowhere fails when it is opened
        else:
            note(f"{entry.path}: left out, neither a file nor a folder")


@dataclass(frozen=True)
class Target:
    """A file to download, and its local path."""

    key: str
    path: Path | None  # None: it cannot be stored
    size: int = 0  # bytes; 0: not known yet
    problem: str = ""  # why it cannot be stored


def target(folder: Path, key: str, relative: str, size: int = 0) -> Target:
    """The target of a key.

    The server is not trusted: whatever keys it lists, no file is written outside the folder.

    :param folder: the folder for the downloads.
    :param relative: the end of the key that becomes the path below the folder.
    :param size: bytes, if known.

    >>> str(target(Path("out"), "a/b/c", "b/c").path), target(Path("out"), "a/../../b", "../../b").problem
    ('out/b/c', "the key has the segment '..'")
    """
    try:
        keys.check(key)
        keys.check(f"x/{relative}")
    except BadKey as exc:
        return Target(key, None, problem=exc.message)
    return Target(key, folder.joinpath(*relative.split("/")), size)


def without_conflicts(targets: Iterable[Target]) -> list[Target]:
    """The same targets, each once; a target that conflicts with others gets a problem.

    A store may have both ``a`` and ``a/b``, but a file system cannot. Then ``a`` always fails.

    :raises UsageError: two keys have the same path.
    """
    unusable, found = [], dict[Path, Target]()
    for each in targets:
        if each.path is None:
            unusable.append(each)
        elif (other := found.setdefault(each.path, each)).key != each.key:
            raise UsageError(f"{other.key} and {each.key} would both become {each.path}")
    folders = {parent for path in found for parent in path.parents}
    return unusable + [
        replace(each, path=None, size=0, problem=f"{path} is a folder, for other files of this download")
        if path in folders
        else each
        for path, each in found.items()
    ]


def part_name(name: str, source: str) -> str:
    """The name of a part.

    :param name: the target's name.
    :param source: the URL. Its digest keeps apart the parts of different files with the same name, and ``x`` and
        ``x.part`` may both be downloaded.

    >>> part_name("Image", "https://storage.example.com/Image")
    'Image.2a9957f168.part'
    """
    end = f".{hashlib.sha256(source.encode()).hexdigest()[:10]}.part"
    length = MAX_NAME - len(end) - len(".json")
    return name.encode()[:length].decode(errors="ignore") + end


def is_regular(path: Path) -> bool:
    """Whether the path is a regular file."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
