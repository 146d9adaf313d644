"""The directory that holds copies of backend objects.

For a key whose SHA-512 is ``abcd…``, in the folder ``ab``:

===========================  ===========================================================================
``abcd….json``               the record: the object's properties, and the name of its content file
``abcd….<generation>.data``  the content; never modified once it has this name
``abcd….<generation>.part``  a content on its way in, locked by its writer
``abcd….fill``               who fetches a cold object, and the record that it is to have (:class:`.fill.Claim`)
===========================  ===========================================================================

The rename of the record is the commit. Each version has a generation, hence a content file, of its own, and before a
new record takes its place the old content is unlinked: so a record that a process remembers is right for as long as
the content file that it names can be opened. That makes a hit two system calls, without a lock, and an overwrite
through one worker visible to the very next request on every other one.

Whoever changes an entry holds the key's lock (:meth:`Cache.writing`). A writer that dies leaves its lock behind;
whoever takes that lock next makes the entry *doubtful*, so that it is checked against the backend before it is served
again, keeps a running fill from being published, and clears the writer's files away.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from kci_storage.drivers.base import ObjectInfo
from kci_storage.errors import InsufficientStorage
from kci_storage.files import durable
from kci_storage.files.locks import KeyLocks, Lease

RECORD, CONTENT, PART, FILL = ".json", ".data", ".part", ".fill"
LOCKS, SPOOL = "locks", "spool"
TOUCH_INTERVAL = 300  # seconds; a hit renews a content file's access time at most this often
REMEMBERED_RECORDS = 20_000  # per process; about 1 KiB each
FOLDERS = tuple(f"{number:02x}" for number in range(256))
DIGEST = re.compile(r"[0-9a-f]{128}")
OURS = re.compile(r"[0-9a-f]{128}\.")  # how the names of the cache's own files start


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
        """The path of the claim of who fetches the object."""
        return Path(self.stem + FILL)

    def content(self, generation: str) -> Path:
        """The path of one generation's content."""
        return Path(f"{self.stem}.{generation}{CONTENT}")

    def part(self, generation: str) -> Path:
        """Its path while it is on its way in."""
        return Path(f"{self.stem}.{generation}{PART}")


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
    changes: int = 0  # how often it has changed


class _Own(threading.local):
    """How often this thread has changed the usage."""

    changes = 0


class Cache:
    """The cache directory, as one process sees it.

    :param directory: made where it is missing.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.spool_directory = directory / SPOOL
        self.locks = KeyLocks(directory / LOCKS)
        self.usage = durable.SharedCounters(directory / "usage", len(Usage._fields))
        self._own = _Own()
        self._remembered: dict[str, tuple[Record, str]] = {}  # with the content's path, by key
        durable.make_directory(self.spool_directory)

    def slot(self, key: str) -> Slot:
        """Where the key's files lie."""
        return self._slot_of_digest(hashlib.sha512(key.encode()).hexdigest())

    def _slot_of_digest(self, digest: str) -> Slot:
        return Slot(digest, f"{self.directory}/{digest[:2]}/{digest}")

    # Reading: no lock, and nobody is asked

    def has_copy(self, key: str) -> bool:
        """Whether there is a copy of the object, as far as one look at the directory can tell."""
        return self.slot(key).record.exists()

    def lookup(self, key: str) -> Entry | None:
        """The copy of the object, opened, or None.

        An entry that turns out broken (unreadable, of the wrong size, content gone) is removed and counts as none.
        """
        remembered = self._remembered.get(key)
        if remembered is not None:
            entry = self._open(*remembered)
            if entry is not None:
                return entry
        return self._lookup_afresh(self.slot(key), key)

    def _lookup_afresh(self, slot: Slot, key: str) -> Entry | None:
        while True:
            self._remembered.pop(key, None)
            record = self._read_record(slot)
            if record is None:
                return None
            if record.info.key != key:
                self._remove_broken(slot, record)
                return None
            entry = self._open(record, f"{slot.stem}.{record.generation}{CONTENT}")
            if entry is not None:
                self._remember(key, entry)
                return entry
            # Overwritten between the two looks, then the next look finds another record; or broken.
            if self._read_record(slot) == record:
                self._remove_broken(slot, record)
                return None

    def _remember(self, key: str, entry: Entry) -> None:
        if len(self._remembered) >= REMEMBERED_RECORDS:
            self._remembered.clear()
        self._remembered[key] = entry.record, entry.path

    def _read_record(self, slot: Slot) -> Record | None:
        try:
            with open(f"{slot.stem}{RECORD}", "rb", 0) as file:  # most often it is not there: no detour by a Path
                data = file.readall()
        except FileNotFoundError:
            return None
        try:
            return Record.from_json(data)
        except ValueError:
            self._remove_broken(slot, None)
            return None

    def _open(self, record: Record, path: str) -> Entry | None:
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
            durable.set_access_time(fd, status, now)

    def _remove_broken(self, slot: Slot, record: Record | None) -> None:
        """Remove an entry that cannot be served, unless somebody is at work on it or has replaced it.

        :param record: what was read; None: what could not be read.
        """
        with contextlib.suppress(InsufficientStorage), self._writing_if_free(slot) as free:
            if free and self._parse(slot) == record:
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

    def writing_if_free(self, key: str) -> contextlib.AbstractContextManager[bool]:
        """Hold the key's lock during the block if it is free now; the block gets whether it is."""
        return self._writing_if_free(self.slot(key))

    @contextlib.contextmanager
    def _writing_if_free(self, slot: Slot) -> Iterator[bool]:
        with self.locks.hold_if_free(slot.digest) as lease:
            if lease is not None:
                self._heal(slot, lease)
            yield lease is not None

    def _heal(self, slot: Slot, lease: Lease) -> None:
        """See to what a writer has left that died with the lock."""
        if lease.orphaned:
            self._doubt(slot)
            self._clear(slot)

    def is_being_written(self, key: str) -> bool:
        """Whether an upload or deletion of the key is running. One that died is cleared away."""
        slot = self.slot(key)
        if not self.locks.is_present(slot.digest):
            return False
        with self._writing_if_free(slot) as free:
            return not free

    def new_part(self, key: str, generation: str | None = None) -> durable.NewFile:
        """A file for a new version's content.

        :param generation: which it will be; None: nobody knows yet.
        :raises InsufficientStorage: the disk is full.
        """
        return durable.NewFile(self.slot(key).part(generation or new_generation()))

    def new_spool(self) -> durable.NewFile:
        """A file for a form part whose key is not known yet.

        :raises InsufficientStorage: the disk is full.
        """
        return durable.NewFile(self.spool_directory / f"{new_generation()}{PART}")

    def announce_commit(self, key: str) -> None:
        """Before the backend commits a new version: see that a copy of the old one is doubted if we never return.

        The caller holds the key's lock, whose file is the announcement; here it is made to outlive a loss of power.
        """
        if self.has_copy(key):
            self.locks.sync()

    def publish(self, part: durable.NewFile, info: ObjectInfo) -> None:
        """Make the part file the object's copy, in place of the one there was. The caller holds the key's lock.

        :raises InsufficientStorage: the disk is full. The old copy is gone then, and the part is to be discarded.
        """
        slot, new = self.slot(info.key), new_record(info)
        with self._replacing(slot, new) as old, self._new_record(slot, new) as file:
            self._put_in_place(part, file, old, new)

    def publish_filled(self, part: durable.NewFile, record: Record, file: durable.NewFile) -> None:
        """The same with a record that there is already.

        :param file: the record, written, under a temporary name, which the caller closes.
        """
        with self._replacing(self.slot(record.info.key), record) as old:
            self._put_in_place(part, file, old, record)

    @contextlib.contextmanager
    def _replacing(self, slot: Slot, new: Record) -> Iterator[Record | None]:
        """The record that is to be replaced during the block. If that fails, there is no copy any more."""
        old = self._parse(slot)
        try:
            yield old
        except BaseException:
            self._unlink_content(slot, new)
            self._unlink_entry(slot, old)
            raise

    def _put_in_place(self, part: durable.NewFile, file: durable.NewFile, old: Record | None, new: Record) -> None:
        """Give a new version's content and its record their names.

        The disk is waited for twice: for content and record, and then for both their names. If it has but one of
        these when the power fails, no copy is found; what a record names is whole.
        """
        slot = self.slot(new.info.key)
        durable.flush_together(part, file)  # what follows cannot fail for want of room
        part.take_name(slot.content(new.generation))
        self._count(1, new.info.size)
        self._unlink_old_content(slot, old, keep=new)
        file.take_name(slot.record)
        durable.sync_directory(slot.record.parent)
        part.close()

    @staticmethod
    def _new_record(slot: Slot, record: Record) -> durable.NewFile:
        """A record, but for its name; it is not flushed."""
        file = durable.NewFile(Path(f"{slot.stem}.{record.generation}{RECORD}{PART}"))
        try:
            file.write(record.to_json())
        except BaseException:
            file.discard()
            raise
        return file

    def remove(self, key: str) -> bool:
        """Remove the copy, for good; whether there was one. The caller holds the key's lock."""
        slot = self.slot(key)
        there = self._unlink_entry(slot, self._parse(slot))
        if there:
            with contextlib.suppress(InsufficientStorage):  # it is removed, until a loss of power at least
                durable.sync_directory(slot.record.parent)
        return there

    def remove_version(self, record: Record) -> None:
        """Remove the copy if it is still this one, and nobody is at work on it."""
        self._remove_broken(self.slot(record.info.key), record)

    def doubt(self, key: str) -> None:
        """Nobody knows what the backend has. The caller holds the key's lock.

        The copy is checked before it is served again (with a full disk, removed), and no running fill is published.
        """
        self._doubt(self.slot(key))

    def _doubt(self, slot: Slot) -> None:
        self._revoke_fill(slot)
        record = self._parse(slot)
        if record is None or record.doubtful:
            return
        try:
            self._replace_record(slot, record, replace(record, generation=new_generation(), doubtful=True))
        except InsufficientStorage:
            self._unlink_entry(slot, record)

    def confirm(self, record: Record) -> None:
        """The backend still has this version: a doubt is settled, unless somebody is at work on the entry."""
        if not record.doubtful:
            return
        slot = self.slot(record.info.key)
        with contextlib.suppress(InsufficientStorage), self._writing_if_free(slot) as free:
            if free and self._parse(slot) == record:
                confirmed = replace(record, generation=new_generation(), doubtful=False, validated=time.time())
                self._replace_record(slot, record, confirmed)

    def _replace_record(self, slot: Slot, old: Record, new: Record) -> None:
        """Put another record in place of one of the same content. Cut off in between, it leaves a broken entry.

        :raises InsufficientStorage: the disk is full.
        """
        with self._new_record(slot, new) as record, contextlib.suppress(FileNotFoundError):  # a broken entry already
            record.flush()  # what follows cannot fail for want of room
            # A new generation, so that no process goes on with the record it remembers.
            durable.rename(slot.content(old.generation), slot.content(new.generation))
            record.publish(slot.record)

    def revoke_fill(self, key: str) -> None:
        """Keep a fill of the key that is running from being published: it may have read the old version."""
        self._revoke_fill(self.slot(key))

    @staticmethod
    def _revoke_fill(slot: Slot) -> None:
        durable.remove(slot.fill)

    def _unlink_entry(self, slot: Slot, record: Record | None) -> bool:
        """Remove the content and its record, in this order; whether there was a record.

        :param record: None: there is none, or none that can be read.
        """
        self._unlink_old_content(slot, record)
        return durable.remove(slot.record)

    def _unlink_old_content(self, slot: Slot, old: Record | None, keep: Record | None = None) -> None:
        """See that no process goes on with a record that it remembers.

        :param old: the present record; None: there is none, or none that can be read.
        :param keep: a record whose content is to stay.
        """
        if not self._unlink_content(slot, old) and slot.record.exists():  # a broken one: it names no content
            self._remove_strays(slot, keep)

    def _unlink_content(self, slot: Slot, record: Record | None) -> bool:
        there = record is not None and durable.remove(slot.content(record.generation))
        if record is not None and there:
            self._count(-1, -record.info.size)
        return there

    def _count(self, files: int, size: int) -> None:
        self._own.changes += 1
        with contextlib.suppress(InsufficientStorage):  # the next walk corrects it
            self.usage.add(files, size, 1)

    def _clear(self, slot: Slot) -> int:
        """Remove the files of a key that no record names and nobody holds; how many. The caller holds its lock."""
        record = self._parse(slot)
        parts = [Path(file.path) for file in self._files(slot) if file.name.endswith(PART)]
        removed = sum(map(durable.remove_if_unlocked, parts)) + self._remove_strays(slot, record)
        if record is None or not slot.content(record.generation).exists():
            removed += durable.remove(slot.record)
        return removed

    def _remove_strays(self, slot: Slot, keep: Record | None) -> int:
        kept = slot.content(keep.generation).name if keep else None
        strays = [file for file in self._files(slot) if file.name.endswith(CONTENT) and file.name != kept]
        for file in strays:
            size = file.stat().st_size
            durable.remove(Path(file.path))
            self._count(-1, -size)
        return len(strays)

    def _files(self, slot: Slot) -> list[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(slot.record.parent) as files:
            return [file for file in files if file.name.startswith(slot.digest)]
        return []

    def evict(self, content: Path, used: float) -> bool:
        """Remove a copy, unless somebody is at work on it or has used it meanwhile; whether it was removed.

        :param content: its content file.
        :param used: seconds since the epoch; when that was used last as far as the caller knows.
        """
        slot = self._slot_of_digest(digest_of(content.name))
        with self._writing_if_free(slot) as free:
            status = _status(content)
            if not free or status is None or last_use(status) != used:
                return False
            record = self._parse(slot)
            if record is not None and slot.content(record.generation) == content:
                return self._unlink_entry(slot, record)
            return self._clear(slot) > 0

    # Recovery and invariants

    def recover_locks(self) -> None:
        """See to what writers have left that died, and clear their locks away."""
        for name in self.locks.names():
            with self._writing_if_free(self._slot_of_digest(name)):
                pass
        self.locks.sweep()

    def contents(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        """The content files and their status, in no order."""
        return itertools.chain.from_iterable(map(self._contents_in, FOLDERS))

    def _contents_in(self, folder: str) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        return _looked_at(file for file in self._scan(folder) if file.name.endswith(CONTENT))

    def _scan(self, folder: str) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory / folder) as files:
            yield from (file for file in files if OURS.match(file.name))

    def sweep(self) -> int:
        """Remove what a crash left: temporary files that nobody holds, contents without a record, and the reverse.

        Safe while others work. It corrects :attr:`usage` by what it saw.

        :returns: how many files were removed.
        """
        return sum(self.sweeping())

    def sweeping(self) -> Iterator[int]:
        """The same in steps, one for each folder; how many files each has removed."""
        self.recover_locks()
        before, files, size, own = Usage(*self.usage.read()), 0, 0, self._own.changes
        yield sum(durable.remove_if_unlocked(path) for path in self._spools())
        for folder in FOLDERS:
            found = list(self._scan(folder))
            for _, status in _looked_at(file for file in found if file.name.endswith(CONTENT)):
                files, size = files + 1, size + status.st_size
            yield self._sweep_folder(found)
        self.correct_usage(before, Usage(files, size, self._own.changes - own))

    def correct_usage(self, before: Usage, seen: Usage) -> None:
        """Have :attr:`usage` say what a walk saw, unless what others have changed meanwhile may be the difference.

        :param before: what it said before the walk.
        :param seen: what the walk saw, and how many changes after that are its own: those are right already.
        """
        # Whoever holds a key's lock may have made a change, but not counted it yet. (A lock for room is no such one.)
        writers = sum(DIGEST.fullmatch(name) is not None for name in self.locks.names())
        others = writers + self.usage.read()[2] - before.changes - seen.changes
        files, size = seen.files - before.files, seen.size - before.size
        if (files or size) and (abs(files) > others or not others):
            self._count(files, size)

    def _spools(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return list(self.spool_directory.iterdir())
        return []

    def _sweep_folder(self, files: list[os.DirEntry[str]]) -> int:
        removed = 0
        for digest, group in _by_digest(files).items():
            if not _is_entry(group):
                # What cannot be removed, or locked on a full disk, must not keep the rest from being so.
                with contextlib.suppress(OSError, InsufficientStorage):
                    removed += self._sweep_slot(self._slot_of_digest(digest), group)
        return removed

    def _sweep_slot(self, slot: Slot, names: list[str]) -> int:
        claims = [slot.record.with_name(name) for name in names if name.endswith(FILL)]
        removed = sum(map(durable.remove_if_unlocked, claims))
        record = self._parse(slot)
        rest = {name for name in names if not name.endswith(FILL)}
        if rest and (record is None or rest != {slot.record.name, slot.content(record.generation).name}):
            with self._writing_if_free(slot) as free:  # a writer is between two renames more often than dead
                removed += self._clear(slot) if free else 0
        return removed

    def check(self) -> list[str]:
        """What is wrong with the directory while nobody is at work on it; empty when all is well.

        Nothing partial or temporary is there, every record can be read, has its content, of its size, under its own
        key's name, every content has its record, nobody holds a lock, and :attr:`usage` is right.
        """
        wrong = [f"a lock is left: {name}" for name in self.locks.names()]
        wrong += [f"a spool file is left: {path.name}" for path in self._spools()]
        files = size = 0
        for digest, group in _by_digest(itertools.chain.from_iterable(map(self._scan, FOLDERS))).items():
            wrong += self._check_slot(self._slot_of_digest(digest), group)
        for _, status in self.contents():
            files, size = files + 1, size + status.st_size
        if (files, size) != self.usage.read()[:2]:
            wrong.append(f"usage says {self.usage.read()[:2]}, but there are {files} files, {size} bytes")
        return wrong

    def _check_slot(self, slot: Slot, names: list[str]) -> list[str]:
        record = self._parse(slot)
        content = slot.content(record.generation).name if record else None
        wrong = []
        for name in names:
            if name.endswith((PART, FILL)):
                wrong.append(f"a temporary file is left: {name}")
            elif name == slot.record.name:
                wrong += self._check_record(slot, record)
            elif name != content:
                wrong.append(f"no record names this file: {name}")
        return wrong

    def _check_record(self, slot: Slot, record: Record | None) -> list[str]:
        if record is None:
            return [f"a record cannot be read: {slot.digest}"]
        if self.slot(record.info.key) != slot:
            return [f"a record is under another key's name: {record.info.key!r}"]
        try:
            size = slot.content(record.generation).stat().st_size
        except FileNotFoundError:
            return [f"a record has no content: {record.info.key!r}"]
        if size != record.info.size:
            return [f"the content of {record.info.key!r} has {size} bytes, its record says {record.info.size}"]
        return []


def new_record(info: ObjectInfo) -> Record:
    """The record of a version that the backend has now."""
    return Record(info, new_generation(), validated=time.time())


def new_generation() -> str:
    """A name for a content file that no other one has."""
    return secrets.token_hex(8)


def digest_of(name: str) -> str:
    """The SHA-512 of the key that a file is of, by the file's name."""
    return name.partition(".")[0]


def last_use(status: os.stat_result) -> float:
    """When a content file was written or, to within :data:`TOUCH_INTERVAL`, read; seconds since the epoch."""
    return max(status.st_atime, status.st_mtime)


def _status(file: Path | os.DirEntry[str]) -> os.stat_result | None:
    """A file's status; None when it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return file.stat()
    return None


def _looked_at(files: Iterable[os.DirEntry[str]]) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    """The files and their status, but for those that are gone by now."""
    for file in files:
        if (status := _status(file)) is not None:
            yield file, status


def _by_digest(files: Iterable[os.DirEntry[str]]) -> dict[str, list[str]]:
    """The names of the files that each key has."""
    names: dict[str, list[str]] = defaultdict(list)
    for file in files:
        names[digest_of(file.name)].append(file.name)
    return names


def _is_entry(names: list[str]) -> bool:
    """Whether a key has a record, a content, and nothing else.

    That they belong together is not looked at, which would take ten times as long: whoever looks the entry up, or
    evicts it, does. A crash that leaves them so leaves a third file, too.
    """
    if len(names) != 2:
        return False
    record, content = names if names[0].endswith(RECORD) else reversed(names)
    return record.endswith(RECORD) and content.endswith(CONTENT)
