"""The directory that holds copies of backend objects.

For a key whose SHA-512 is ``abcd…``, in the folder ``ab``:

=========================  =============================================================================
``abcd….json``             the record: the object's properties, and the name of its content file
``abcd….<generation>.data``  the content; never modified once it has this name
``abcd….<generation>.part``  an upload on its way in, locked by its writer
``abcd….fill``             a cold object on its way in, locked by its filler (:mod:`kci_storage.fill`)
``abcd….fill.<inode>.json``  what that object is
=========================  =============================================================================

The rename of the record is the commit. Each version has a generation, hence a content file, of its own, and before a
new record takes its place the old content is unlinked: so a record that a process remembers is right for as long as
the content file that it names can be opened. That makes a hit two system calls, without a lock, and an overwrite
through one worker visible to the very next request on every other one.

Whoever changes an entry holds the key's lock (:meth:`Cache.writing`). A writer that dies leaves its lock file
behind; whoever finds that makes the entry *doubtful*: it is checked against the backend before it is served again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from kci_storage import durable
from kci_storage.drivers.base import ObjectInfo
from kci_storage.locks import KeyLocks, Lease

RECORD, CONTENT, PART, FILL = ".json", ".data", ".part", ".fill"
LOCKS, SPOOL = "locks", "spool"
TOUCH_INTERVAL = 300  # seconds; a hit renews a content file's access time at most this often
REMEMBERED_RECORDS = 20_000  # per process; about 1 KiB each
FOLDERS = tuple(f"{number:02x}" for number in range(256))


class Slot(NamedTuple):
    """Where a key's files lie."""

    digest: str
    stem: str  # the path that all of the key's files start with

    @property
    def record(self) -> Path:
        """The path of the record."""
        return Path(self.stem + RECORD)

    @property
    def fill(self) -> Path:
        """The path of a cold object's part file."""
        return Path(self.stem + FILL)

    def fill_record(self, inode: int) -> Path:
        """The path of the record of the part file that is this inode."""
        return Path(f"{self.stem}{FILL}.{inode}{RECORD}")

    def content(self, generation: str) -> Path:
        """The path of one generation's content."""
        return Path(f"{self.stem}.{generation}{CONTENT}")


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a cached object, and which file holds it."""

    info: ObjectInfo
    generation: str
    validated: float  # seconds since the epoch: when the backend was last known to have this version
    doubtful: bool = False  # a writer died, or failed in its commit: ask the backend before serving this

    def to_json(self) -> bytes:
        """The record as its file holds it."""
        fields = {
            "info": self.info.to_fields(),
            "generation": self.generation,
            "validated": self.validated,
            "doubtful": self.doubtful,
        }
        return json.dumps(fields, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        """Read a record.

        :raises ValueError: it is not one.
        """
        try:
            fields = json.loads(data)
            return cls(**{**fields, "info": ObjectInfo.from_fields(fields["info"])})
        except (TypeError, KeyError) as exc:
            raise ValueError(f"not a cache record: {exc}") from exc


class Entry(NamedTuple):
    """A hit: a record and its content, opened. The caller closes ``fd``."""

    record: Record
    fd: int
    path: str


class Usage(NamedTuple):
    """How much the cache holds."""

    files: int
    size: int  # bytes


class Cache:
    """The cache directory, as one process sees it.

    :param directory: made where it is missing.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.spool_directory = directory / SPOOL
        self.locks = KeyLocks(directory / LOCKS)
        self.usage = durable.SharedCounters(directory / "usage", len(Usage._fields))
        self._remembered: dict[str, Record] = {}
        durable.make_directory(self.spool_directory)

    def slot(self, key: str) -> Slot:
        """Where the key's files lie."""
        return self._slot_of_digest(hashlib.sha512(key.encode()).hexdigest())

    def _slot_of_digest(self, digest: str) -> Slot:
        return Slot(digest, f"{self.directory}/{digest[:2]}/{digest}")

    # Reading: no lock, and nobody is asked

    def lookup(self, key: str) -> Entry | None:
        """The copy of the object, opened, or None.

        An entry that turns out broken (unreadable, of the wrong size, content gone) is removed and counts as none.
        """
        slot = self.slot(key)
        remembered = self._remembered.get(key)
        if remembered is not None:
            entry = self._open(slot, remembered)
            if entry is not None:
                return entry
        return self._lookup_afresh(slot, key)

    def _lookup_afresh(self, slot: Slot, key: str) -> Entry | None:
        while True:
            self._remembered.pop(key, None)
            record = self._read_record(slot)
            if record is None:
                return None
            if record.info.key != key:
                self._remove_broken(slot, record)
                return None
            entry = self._open(slot, record)
            if entry is not None:
                self._remember(key, record)
                return entry
            # Overwritten between the two looks, then the next look finds another record; or broken.
            if self._read_record(slot) == record:
                self._remove_broken(slot, record)
                return None

    def _remember(self, key: str, record: Record) -> None:
        if len(self._remembered) >= REMEMBERED_RECORDS:
            self._remembered.clear()
        self._remembered[key] = record

    def _read_record(self, slot: Slot) -> Record | None:
        try:
            data = slot.record.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Record.from_json(data)
        except ValueError:
            self._remove_broken(slot, None)
            return None

    def _open(self, slot: Slot, record: Record) -> Entry | None:
        path = f"{slot.stem}.{record.generation}{CONTENT}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        status = os.fstat(fd)
        if status.st_size != record.info.size:
            os.close(fd)
            return None
        self._touch(fd, status)
        return Entry(record, fd, path)

    @staticmethod
    def _touch(fd: int, status: os.stat_result) -> None:
        # Kept by hand, since file systems are mounted noatime; it orders the eviction.
        now = time.time()
        if now - status.st_atime > TOUCH_INTERVAL:
            with contextlib.suppress(PermissionError):  # the file is another user's; eviction is then less exact
                os.utime(fd, ns=(int(now * 1e9), status.st_mtime_ns))

    def _remove_broken(self, slot: Slot, record: Record | None) -> None:
        """Remove an entry that cannot be served, unless somebody is at work on it or has replaced it."""
        with self.locks.hold_if_free(slot.digest) as lease:
            if lease is None:
                return
            if record is None or self._parse(slot) == record:
                self._unlink_entry(slot, record)

    @staticmethod
    def _parse(slot: Slot) -> Record | None:
        """The record, or None when there is none that can be read."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return Record.from_json(slot.record.read_bytes())
        return None

    # Writing

    @contextlib.contextmanager
    def writing(self, key: str, timeout: float) -> Iterator[None]:
        """Hold the key's lock during the block: for uploads and deletions.

        :param timeout: seconds to wait for it.
        :raises WriteConflict: it was held by others all that time.
        """
        slot = self.slot(key)
        with self.locks.hold(slot.digest, timeout) as lease:
            self._heal(slot, lease)
            yield

    @contextlib.contextmanager
    def writing_if_free(self, key: str) -> Iterator[bool]:
        """Hold the key's lock during the block if it is free now; the block gets whether it is."""
        slot = self.slot(key)
        with self.locks.hold_if_free(slot.digest) as lease:
            if lease is not None:
                self._heal(slot, lease)
            yield lease is not None

    def _heal(self, slot: Slot, lease: Lease) -> None:
        if lease.orphaned:
            self._doubt(slot)

    def is_being_written(self, key: str) -> bool:
        """Whether an upload or deletion of the key is running. One that died is cleared away."""
        slot = self.slot(key)
        if not self.locks.is_present(slot.digest):
            return False
        with self.writing_if_free(key) as free:
            return not free

    def new_part(self, key: str) -> durable.NewFile:
        """A file for a new version's content.

        :raises InsufficientStorage: the disk is full.
        """
        slot = self.slot(key)
        return durable.NewFile(Path(f"{slot.stem}.{new_generation()}{PART}"))

    def new_spool(self) -> durable.NewFile:
        """A file for a form part whose key is not known yet.

        :raises InsufficientStorage: the disk is full.
        """
        return durable.NewFile(self.spool_directory / f"{new_generation()}{PART}")

    def announce_commit(self, key: str) -> None:
        """Before the backend commits a new version: see that a copy of the old one is doubted if we never return.

        The caller holds the key's lock, whose file is the announcement; here it is made to outlive a loss of power.
        """
        if self.slot(key).record.exists():
            self.locks.sync()

    def publish(self, part: durable.NewFile, info: ObjectInfo) -> None:
        """Make the part file the object's copy, in place of the one there was. The caller holds the key's lock.

        :raises InsufficientStorage: the disk is full. The old copy is gone then, and the part is to be discarded.
        """
        slot = self.slot(info.key)
        old = self._parse(slot)
        new = Record(info, new_generation(), validated=time.time())
        try:
            with durable.NewFile(Path(f"{slot.stem}.{new.generation}{RECORD}{PART}")) as record:
                record.write(new.to_json())
                record.flush()
                part.publish(slot.content(new.generation))
                self._unlink_content(slot, old)
                record.publish(slot.record)
        except BaseException:
            self._unlink_entry(slot, old)
            raise
        self.usage.add(0 if old else 1, info.size - (old.info.size if old else 0))

    def remove(self, key: str) -> bool:
        """Remove the copy; whether there was one. The caller holds the key's lock."""
        slot = self.slot(key)
        return self._unlink_entry(slot, self._parse(slot))

    def remove_version(self, record: Record) -> None:
        """Remove the copy if it is still this one, and nobody is at work on it."""
        with self.writing_if_free(record.info.key) as free:
            if free and self._parse(self.slot(record.info.key)) == record:
                self.remove(record.info.key)

    def doubt(self, key: str) -> None:
        """Have the copy checked before it is served again. The caller holds the key's lock."""
        self._doubt(self.slot(key))

    def _doubt(self, slot: Slot) -> None:
        record = self._parse(slot)
        if record is not None and not record.doubtful:
            self._replace_record(slot, record, replace(record, generation=new_generation(), doubtful=True))

    def confirm(self, record: Record) -> None:
        """The backend still has this version: a doubt is settled, unless somebody is at work on the entry."""
        if not record.doubtful:
            return
        slot = self.slot(record.info.key)
        with self.writing_if_free(record.info.key) as free:
            if free and self._parse(slot) == record:
                confirmed = replace(record, generation=new_generation(), doubtful=False, validated=time.time())
                self._replace_record(slot, record, confirmed)

    def _replace_record(self, slot: Slot, old: Record, new: Record) -> None:
        # A new generation, so that no process goes on with the record it remembers.
        try:
            os.rename(slot.content(old.generation), slot.content(new.generation))
        except FileNotFoundError:
            self._unlink_entry(slot, old)
            return
        durable.write_file(slot.record, new.to_json())

    def revoke_fill(self, key: str) -> None:
        """Keep a fill of the key that is running from being published: it may have read the old version."""
        slot = self.slot(key)
        with contextlib.suppress(FileNotFoundError):
            durable.remove(slot.fill_record(slot.fill.stat().st_ino))
            durable.remove(slot.fill)

    def _unlink_entry(self, slot: Slot, record: Record | None) -> bool:
        there = durable.remove(slot.record)
        self._unlink_content(slot, record)
        if there and record is not None:
            self.usage.add(-1, -record.info.size)
        return there

    @staticmethod
    def _unlink_content(slot: Slot, record: Record | None) -> None:
        if record is not None:
            durable.remove(slot.content(record.generation))

    def evict(self, digest: str) -> bool:
        """Remove the copy of the key with this SHA-512 unless somebody is at work on it; whether it was removed."""
        slot = self._slot_of_digest(digest)
        with self.locks.hold_if_free(digest) as lease:
            return lease is not None and self._unlink_entry(slot, self._parse(slot))

    # Recovery and invariants

    def recover_locks(self) -> int:
        """Doubt the entries whose writers died, and clear their locks away; how many there were."""
        found = 0
        for digest in self.locks.names():
            slot = self._slot_of_digest(digest)
            with self.locks.hold_if_free(digest) as lease:
                if lease is not None and lease.orphaned:
                    self._heal(slot, lease)
                    found += 1
        return found

    def entries(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Every file below the 256 folders, in no order, with the digest that its name starts with."""
        for folder in FOLDERS:
            with contextlib.suppress(FileNotFoundError), os.scandir(self.directory / folder) as files:
                for file in files:
                    yield file.name.partition(".")[0], file

    def sweep(self) -> int:
        """Remove what a crash left: part files that nobody holds, contents without a record, and the reverse.

        Safe while others work. It corrects :attr:`usage` by what it saw.

        :returns: how many files were removed.
        """
        self.recover_locks()
        before = Usage(*self.usage.read())
        removed = sum(durable.remove_if_unlocked(path) for path in self.spool_directory.iterdir())
        files = size = 0
        for digest, file in self.entries():
            if file.name.endswith((PART, FILL)):
                removed += durable.remove_if_unlocked(Path(file.path))
            elif is_fill_record(file.name):
                removed += self._remove_lonely_fill_record(digest, Path(file.path))
            elif self._is_orphan(digest, file):
                removed += self._remove_orphan(digest, Path(file.path))
            elif file.name.endswith(CONTENT):
                files, size = files + 1, size + _size(file)
        self.usage.add(files - before.files, size - before.size)
        return removed

    def _is_orphan(self, digest: str, file: os.DirEntry[str]) -> bool:
        record = self._parse(self._slot_of_digest(digest))
        if file.name.endswith(RECORD):
            return record is None or not self._slot_of_digest(digest).content(record.generation).exists()
        return record is None or self._slot_of_digest(digest).content(record.generation).name != file.name

    def _remove_orphan(self, digest: str, path: Path) -> int:
        # Looked at again under the lock: a writer is between two renames more often than dead.
        with self.locks.hold_if_free(digest) as lease:
            if lease is None:
                return 0
            for entry in os.scandir(path.parent):
                if entry.name == path.name and self._is_orphan(digest, entry):
                    return int(durable.remove(path))
        return 0

    def _remove_lonely_fill_record(self, digest: str, path: Path) -> int:
        slot = self._slot_of_digest(digest)
        with contextlib.suppress(FileNotFoundError):
            if slot.fill_record(slot.fill.stat().st_ino) == path:
                return 0
        return int(durable.remove(path))

    def check(self) -> list[str]:
        """What is wrong with the directory while nobody is at work on it; empty when all is well.

        Nothing partial or temporary is there, every record can be read, has its content, of its size, under its own
        key's name, every content has its record, nobody holds a lock, and :attr:`usage` is right.
        """
        wrong = [f"a lock is left: {name}" for name in self.locks.names()]
        wrong += [f"a spool file is left: {path.name}" for path in self.spool_directory.iterdir()]
        files = size = 0
        for digest, file in self.entries():
            if file.name.endswith((PART, FILL)) or is_fill_record(file.name):
                wrong.append(f"a temporary file is left: {file.name}")
            elif file.name.endswith(RECORD):
                wrong += self._check_record(digest)
            elif self._is_orphan(digest, file):
                wrong.append(f"no record names this file: {file.name}")
            else:
                files, size = files + 1, size + _size(file)
        if (files, size) != tuple(self.usage.read()):
            wrong.append(f"usage says {self.usage.read()}, but there are {files} files, {size} bytes")
        return wrong

    def _check_record(self, digest: str) -> list[str]:
        slot = self._slot_of_digest(digest)
        record = self._parse(slot)
        if record is None:
            return [f"a record cannot be read: {digest}"]
        if self.slot(record.info.key) != slot:
            return [f"a record is under another key's name: {record.info.key!r}"]
        try:
            size = slot.content(record.generation).stat().st_size
        except FileNotFoundError:
            return [f"a record has no content: {record.info.key!r}"]
        if size != record.info.size:
            return [f"the content of {record.info.key!r} has {size} bytes, its record says {record.info.size}"]
        return []


def new_generation() -> str:
    """A name for a content file that no other one has."""
    return secrets.token_hex(8)


def is_fill_record(name: str) -> bool:
    """Whether a file of this name says what a part file is going to be."""
    return FILL + "." in name


def _size(file: os.DirEntry[str]) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
