# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which local file belongs to which key. Pure, but for looking at local folders.

As with ``cp -r``, a folder keeps its name: ``upload build --to x`` stores ``x/build/…``, ``download x/build/`` makes
``build/…``; what is in a folder, without its name, is ``build/.`` when it is uploaded.
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

MOST_NAME = 255  # bytes of a file's name on Linux


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
    """The files that are named, and all that are in the folders that are named, in the order of their names.

    In a folder, symbolic links to files count as files. Those to folders are left out, since they may lead anywhere
    and round in circles; so is what is neither a file nor a folder. A link that is named itself is followed.

    :param note: is told what is left out.
    :raises UsageError: two files would get the same key, or one is not there.
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
    """A file to download, and where to."""

    key: str
    path: Path | None  # None: nowhere
    size: int = 0  # bytes, if that is known already
    problem: str = ""  # why it cannot be stored there


def target(folder: Path, key: str, relative: str, size: int = 0) -> Target:
    """Where a key goes.

    The server is not trusted: whatever its list says, nothing is written outside the folder.

    :param relative: the key's end, from where its path below the folder begins.

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
    """The same targets, each once; what cannot be stored beside others has a problem.

    A store may hold both ``a`` and ``a/b``, a file system cannot: then ``a`` is the one that fails, always.

    :raises UsageError: two would become the same file.
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
    """The name of the file that holds what has come so far.

    :param name: of the file that it becomes.
    :param source: its URL. A part of another file of the same name is another one, and ``x`` and ``x.part`` may both
        be downloaded.

    >>> part_name("Image", "https://storage.example.com/Image")
    'Image.2a9957f168.part'
    """
    end = f".{hashlib.sha256(source.encode()).hexdigest()[:10]}.part"
    room = MOST_NAME - len(end) - len(".json")
    return name.encode()[:room].decode(errors="ignore") + end


def is_regular(path: Path) -> bool:
    """Whether there is a plain file at the path."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
