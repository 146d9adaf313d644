# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a local object beyond what its file says: content type, digests, ETag, tags.

Such a record lies on the file itself, as an extended attribute (``getfattr -n user.kci-storage FILE`` shows it), or,
where the file system has none, in a file of its own below ``.kci/meta``. It says which version it is of: an attribute
by time of modification and size, so that it may go with a copy of the file; a file of its own by the inode, too, in
its name. So one upload's record is never paired with another's bytes, without a lock; and a file that was put there
or changed by hand has none.

The attribute is written before the content gets its name, and goes where that goes. A file of its own is a second
one to be made, flushed, renamed and one day removed, which is most of what a small upload asks of the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kci_storage.drivers.base import ObjectInfo
from kci_storage.drivers.local.tree import Tree
from kci_storage.files import durable
from kci_storage.files.durable import files_in

ATTRIBUTE = "user.kci-storage"
FOLDER = ".kci/meta"  # of the records that are files
REMEMBERED = 10_000  # objects whose properties a process keeps in memory, about a KiB each


class Identity(NamedTuple):
    """What tells one version of a file from another."""

    inode: int
    mtime_ns: int  # nanoseconds since the epoch
    size: int  # bytes

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity of a file that was looked at."""
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)

    def __str__(self) -> str:
        return f"{self.inode:x}-{self.version}"

    @property
    def version(self) -> str:
        """What a copy of the file has in common with it."""
        return f"{self.mtime_ns:x}-{self.size:x}"


class NewRecord(NamedTuple):
    """A record on its way into a file of its own."""

    file: durable.NewFile
    name: bytes  # that it is to get, in the folder
    folder_fd: int

    def take_name(self) -> None:
        """Let it be found; the caller flushes the folder.

        :raises InsufficientStorage: the disk is full.
        """
        self.file.take_name(self.name, self.folder_fd)

    def remove(self) -> None:
        """Take it away again, name and all. Never raises: a sweep gets what is left."""
        with contextlib.suppress(OSError):
            durable.remove_from(self.folder_fd, self.name)


class Records:
    """The records of a folder of objects, and the latest ones in memory.

    :param tree: the objects.
    :param temporary: a folder on the same file system for records that are being written.
    """

    def __init__(self, tree: Tree, temporary: Path):
        self._tree = tree
        self._temporary = temporary
        self._memory: OrderedDict[tuple[str, Identity], ObjectInfo] = OrderedDict()
        self._mutex = threading.Lock()

    def remembered(self, key: str, identity: Identity) -> ObjectInfo | None:
        """What this process knows already of the file of that identity."""
        return self._memory.get((key, identity))

    def read(self, key: str, identity: Identity, fd: int) -> ObjectInfo | None:
        """The record of an open file of that identity, if there is one that can be read."""
        return _read_attribute(fd, key, identity) or _read_file(self._tree.root / self._path(key, identity))

    def remember(self, key: str, identity: Identity, info: ObjectInfo) -> None:
        """Keep a record in memory, and let go of the one that has been there longest."""
        with self._mutex:
            self._memory[key, identity] = info
            if len(self._memory) > REMEMBERED:
                self._memory.popitem(last=False)

    @contextlib.contextmanager
    def attached(self, content: durable.NewFile, info: ObjectInfo, identity: Identity) -> Iterator[NewRecord | None]:
        """Give a content its record during the block, at the end of which it is gone again unless it has its name.

        The block gets None where the content has it with it, else a file which needs a name of its own.

        :raises InsufficientStorage: the disk is full.
        """
        if content.set_attribute(ATTRIBUTE, _to_attribute(info, identity)):
            yield None
            return
        folder, _, name = self._path(info.key, identity).rpartition("/")
        with durable.NewFile.unnamed(self._temporary) as file, self._tree.folder(folder, make=True) as fd:
            file.write(json.dumps(info.to_fields()).encode())
            durable.flush_together(content, file)
            yield NewRecord(file, name.encode(), fd)

    def remove(self, key: str, identity: Identity) -> None:
        """Forget a record, whose object is gone. Never raises: a sweep gets what is left."""
        with self._mutex:
            self._memory.pop((key, identity), None)
        with contextlib.suppress(OSError):
            durable.remove(self._tree.root / self._path(key, identity))

    def files(self) -> Iterator[tuple[Path, str, str]]:
        """Each file of a record, and the key and identity, as text, that it is of; of no key if it is unreadable."""
        for folder in files_in(self._tree.root / FOLDER):
            yield from map(_described, files_in(folder))

    def files_of(self, digest: str) -> Iterator[tuple[Path, str, str]]:
        """As :meth:`files`, of one key.

        :param digest: the key's SHA-256, in hexadecimal digits.
        """
        folder = files_in(self._tree.root / FOLDER / digest[:2])
        yield from (_described(path) for path in folder if path.name.startswith(digest))

    @staticmethod
    def _path(key: str, identity: Identity) -> str:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return f"{FOLDER}/{digest[:2]}/{digest}.{identity}.json"


def _to_attribute(info: ObjectInfo, identity: Identity) -> bytes:
    """All but what the file itself says. It must fit into a block of the file system, so the key is left out, too."""
    md5 = info.md5.hex() if info.md5 else None
    fields: dict[str, Any] = {
        "of": identity.version,
        "etag": info.etag,
        "type": info.content_type,
        "sha256": info.sha256,
        "md5": md5,
    }
    if info.tags:
        fields["tags"] = dict(info.tags)
    return json.dumps(fields).encode()


def _read_attribute(fd: int, key: str, identity: Identity) -> ObjectInfo | None:
    try:
        fields = json.loads(os.getxattr(fd, ATTRIBUTE))
        if fields["of"] != identity.version:  # the file was changed since
            return None
        md5 = bytes.fromhex(fields["md5"]) if fields["md5"] else None
        etag, content_type, sha256 = fields["etag"], fields["type"], fields["sha256"]
        tags = dict(fields.get("tags", {}))
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        return None
    return ObjectInfo(key, identity.size, etag, identity.mtime_ns // 10**9, content_type, sha256, md5, tags)


def _described(path: Path) -> tuple[Path, str, str]:
    info = _read_file(path)
    return path, info.key if info else "", path.name.partition(".")[2].removesuffix(".json")


def _read_file(path: Path) -> ObjectInfo | None:
    try:
        return ObjectInfo.from_fields(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):
        return None
