# SPDX-License-Identifier: LGPL-2.1-or-later
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
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from kci_storage.cache.entry import Entry, Record, Usage, last_use, new_record
from kci_storage.cache.names import (
    CONTENT,
    DIGEST,
    FILL,
    FOLDERS,
    LOCKS,
    OURS,
    PART,
    RECORD,
    SPOOL,
    Location,
    digest_of,
    new_generation,
)
from kci_storage.drivers.base import ObjectInfo
from kci_storage.errors import InsufficientStorage
from kci_storage.files import counters, durable
from kci_storage.files.locks import KeyLocks, Lease

TOUCH_INTERVAL = 300  # seconds; a hit renews a content file's access time at most this often
REMEMBERED_RECORDS = 20_000  # per process; about 1 KiB each


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
        self.usage = counters.SharedCounters(directory / "usage", len(Usage._fields))
        self._own = _Own()
        self._remembered: dict[str, tuple[Record, str]] = {}  # with the content's path, by key
        durable.make_directory(self.spool_directory)

    def location(self, key: str) -> Location:
        """Where the key's files lie."""
        return self._location_of_digest(hashlib.sha512(key.encode()).hexdigest())

    def _location_of_digest(self, digest: str) -> Location:
        return Location(digest, f"{self.directory}/{digest[:2]}/{digest}")

    # Reading: no lock, and nobody is asked

    def has_copy(self, key: str) -> bool:
        """Whether there is a copy of the object, as far as one look at the directory can tell."""
        return self.location(key).record.exists()

    def lookup(self, key: str) -> Entry | None:
        """The copy of the object, opened, or None.

        An entry that turns out broken (unreadable, of the wrong size, content gone) is removed and counts as none.
        """
        remembered = self._remembered.get(key)
        if remembered is not None:
            entry = self._open(*remembered)
            if entry is not None:
                return entry
        return self._lookup_afresh(self.location(key), key)

    def _lookup_afresh(self, location: Location, key: str) -> Entry | None:
        while True:
            self._remembered.pop(key, None)
            record = self._read_record(location)
            if record is None:
                return None
            if record.info.key != key:
                self._remove_broken(location, record)
                return None
            entry = self._open(record, f"{location.stem}.{record.generation}{CONTENT}")
            if entry is not None:
                self._remember(key, entry)
                return entry
            # Overwritten between the two looks, then the next look finds another record; or broken.
            if self._read_record(location) == record:
                self._remove_broken(location, record)
                return None

    def _remember(self, key: str, entry: Entry) -> None:
        if len(self._remembered) >= REMEMBERED_RECORDS:
            self._remembered.clear()
        self._remembered[key] = entry.record, entry.path

    def _read_record(self, location: Location) -> Record | None:
        try:
            with open(f"{location.stem}{RECORD}", "rb", 0) as file:  # most often it is not there: no detour by a Path
                data = file.readall()
        except FileNotFoundError:
            return None
        try:
            return Record.from_json(data)
        except ValueError:
            self._remove_broken(location, None)
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

    def _remove_broken(self, location: Location, record: Record | None) -> None:
        """Remove an entry that cannot be served, unless somebody is at work on it or has replaced it.

        :param record: what was read; None: what could not be read.
        """
        with contextlib.suppress(InsufficientStorage), self._writing_if_free(location) as free:
            if free and self._parse(location) == record:
                self._unlink_entry(location, record)

    @staticmethod
    def _parse(location: Location) -> Record | None:
        """The record, or None when there is none that can be read."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return Record.from_json(location.record.read_bytes())
        return None

    # Writing

    @contextlib.contextmanager
    def writing(self, key: str, timeout: float) -> Iterator[None]:
        """Hold the key's lock during the block: for uploads and deletions.

        :param timeout: seconds to wait for it.
        :raises WriteConflict: it was held by others all that time.
        """
        location = self.location(key)
        with self.locks.hold(location.digest, timeout) as lease:
            self._heal(location, lease)
            yield

    def writing_if_free(self, key: str) -> contextlib.AbstractContextManager[bool]:
        """Hold the key's lock during the block if it is free now; the block gets whether it is."""
        return self._writing_if_free(self.location(key))

    @contextlib.contextmanager
    def _writing_if_free(self, location: Location) -> Iterator[bool]:
        with self.locks.hold_if_free(location.digest) as lease:
            if lease is not None:
                self._heal(location, lease)
            yield lease is not None

    def _heal(self, location: Location, lease: Lease) -> None:
        """See to what a writer has left that died with the lock."""
        if lease.orphaned:
            self._doubt(location)
            self._clear(location)

    def is_being_written(self, key: str) -> bool:
        """Whether an upload or deletion of the key is running. One that died is cleared away."""
        location = self.location(key)
        if not self.locks.is_present(location.digest):
            return False
        with self._writing_if_free(location) as free:
            return not free

    def new_part(self, key: str, generation: str | None = None) -> durable.NewFile:
        """A file for a new version's content.

        :param generation: which it will be; None: nobody knows yet.
        :raises InsufficientStorage: the disk is full.
        """
        return durable.NewFile(self.location(key).part(generation or new_generation()))

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
        location, new = self.location(info.key), new_record(info)
        with self._replacing(location, new) as old, self._new_record(location, new) as file:
            self._put_in_place(part, file, old, new)

    def publish_filled(self, part: durable.NewFile, record: Record, file: durable.NewFile) -> None:
        """The same with a record that there is already.

        :param file: the record, written, under a temporary name, which the caller closes.
        """
        with self._replacing(self.location(record.info.key), record) as old:
            self._put_in_place(part, file, old, record)

    @contextlib.contextmanager
    def _replacing(self, location: Location, new: Record) -> Iterator[Record | None]:
        """The record that is to be replaced during the block. If that fails, there is no copy any more."""
        old = self._parse(location)
        try:
            yield old
        except BaseException:
            self._unlink_content(location, new)
            self._unlink_entry(location, old)
            raise

    def _put_in_place(self, part: durable.NewFile, file: durable.NewFile, old: Record | None, new: Record) -> None:
        """Give a new version's content and its record their names.

        The disk is waited for twice: for content and record, and then for both their names. If it has but one of
        these when the power fails, no copy is found; what a record names is whole.
        """
        location = self.location(new.info.key)
        durable.flush_together(part, file)  # what follows cannot fail for want of room
        part.take_name(location.content(new.generation))
        self._count(1, new.info.size)
        self._unlink_old_content(location, old, keep=new)
        file.take_name(location.record)
        durable.sync_directory(location.record.parent)
        part.close()

    @staticmethod
    def _new_record(location: Location, record: Record) -> durable.NewFile:
        """A record, but for its name; it is not flushed."""
        file = durable.NewFile(Path(f"{location.stem}.{record.generation}{RECORD}{PART}"))
        try:
            file.write(record.to_json())
        except BaseException:
            file.discard()
            raise
        return file

    def remove(self, key: str) -> bool:
        """Remove the copy, for good; whether there was one. The caller holds the key's lock."""
        location = self.location(key)
        there = self._unlink_entry(location, self._parse(location))
        if there:
            with contextlib.suppress(InsufficientStorage):  # it is removed, until a loss of power at least
                durable.sync_directory(location.record.parent)
        return there

    def remove_version(self, record: Record) -> None:
        """Remove the copy if it is still this one, and nobody is at work on it."""
        self._remove_broken(self.location(record.info.key), record)

    def doubt(self, key: str) -> None:
        """Nobody knows what the backend has. The caller holds the key's lock.

        The copy is checked before it is served again (with a full disk, removed), and no running fill is published.
        """
        self._doubt(self.location(key))

    def _doubt(self, location: Location) -> None:
        self._revoke_fill(location)
        record = self._parse(location)
        if record is None or record.doubtful:
            return
        try:
            self._replace_record(location, record, replace(record, generation=new_generation(), doubtful=True))
        except InsufficientStorage:
            self._unlink_entry(location, record)

    def confirm(self, record: Record) -> None:
        """The backend still has this version: a doubt is settled, unless somebody is at work on the entry."""
        if not record.doubtful:
            return
        location = self.location(record.info.key)
        with contextlib.suppress(InsufficientStorage), self._writing_if_free(location) as free:
            if free and self._parse(location) == record:
                confirmed = replace(record, generation=new_generation(), doubtful=False, validated=time.time())
                self._replace_record(location, record, confirmed)

    def _replace_record(self, location: Location, old: Record, new: Record) -> None:
        """Put another record in place of one of the same content. Cut off in between, it leaves a broken entry.

        :raises InsufficientStorage: the disk is full.
        """
        with (
            self._new_record(location, new) as record,
            contextlib.suppress(FileNotFoundError),
        ):  # a broken entry already
            record.flush()  # what follows cannot fail for want of room
            # A new generation, so that no process goes on with the record it remembers.
            durable.rename(location.content(old.generation), location.content(new.generation))
            record.publish(location.record)

    def revoke_fill(self, key: str) -> None:
        """Keep a fill of the key that is running from being published: it may have read the old version."""
        self._revoke_fill(self.location(key))

    @staticmethod
    def _revoke_fill(location: Location) -> None:
        durable.remove(location.fill)

    def _unlink_entry(self, location: Location, record: Record | None) -> bool:
        """Remove the content and its record, in this order; whether there was a record.

        :param record: None: there is none, or none that can be read.
        """
        self._unlink_old_content(location, record)
        return durable.remove(location.record)

    def _unlink_old_content(self, location: Location, old: Record | None, keep: Record | None = None) -> None:
        """See that no process goes on with a record that it remembers.

        :param old: the present record; None: there is none, or none that can be read.
        :param keep: a record whose content is to stay.
        """
        if not self._unlink_content(location, old) and location.record.exists():  # a broken one: it names no content
            self._remove_strays(location, keep)

    def _unlink_content(self, location: Location, record: Record | None) -> bool:
        there = record is not None and durable.remove(location.content(record.generation))
        if record is not None and there:
            self._count(-1, -record.info.size)
        return there

    def _count(self, files: int, size: int) -> None:
        self._own.changes += 1
        with contextlib.suppress(InsufficientStorage):  # the next walk corrects it
            self.usage.add(files, size, 1)

    def _clear(self, location: Location) -> int:
        """Remove the files of a key that no record names and nobody holds; how many. The caller holds its lock."""
        record = self._parse(location)
        parts = [Path(file.path) for file in self._files(location) if file.name.endswith(PART)]
        removed = sum(map(durable.remove_if_unlocked, parts)) + self._remove_strays(location, record)
        if record is None or not location.content(record.generation).exists():
            removed += durable.remove(location.record)
        return removed

    def _remove_strays(self, location: Location, keep: Record | None) -> int:
        kept = location.content(keep.generation).name if keep else None
        strays = [file for file in self._files(location) if file.name.endswith(CONTENT) and file.name != kept]
        for file in strays:
            size = file.stat().st_size
            durable.remove(Path(file.path))
            self._count(-1, -size)
        return len(strays)

    def _files(self, location: Location) -> list[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(location.record.parent) as files:
            return [file for file in files if file.name.startswith(location.digest)]
        return []

    def evict(self, content: Path, used: float) -> bool:
        """Remove a copy, unless somebody is at work on it or has used it meanwhile; whether it was removed.

        :param content: its content file.
        :param used: seconds since the epoch; when that was used last as far as the caller knows.
        """
        location = self._location_of_digest(digest_of(content.name))
        with self._writing_if_free(location) as free:
            status = _status(content)
            if not free or status is None or last_use(status) != used:
                return False
            record = self._parse(location)
            if record is not None and location.content(record.generation) == content:
                return self._unlink_entry(location, record)
            return self._clear(location) > 0

    # Recovery and invariants

    def recover_locks(self) -> None:
        """See to what writers have left that died, and clear their locks away."""
        for name in self.locks.names():
            with self._writing_if_free(self._location_of_digest(name)):
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
                    removed += self._sweep_location(self._location_of_digest(digest), group)
        return removed

    def _sweep_location(self, location: Location, names: list[str]) -> int:
        claims = [location.record.with_name(name) for name in names if name.endswith(FILL)]
        removed = sum(map(durable.remove_if_unlocked, claims))
        record = self._parse(location)
        rest = {name for name in names if not name.endswith(FILL)}
        if rest and (record is None or rest != {location.record.name, location.content(record.generation).name}):
            with self._writing_if_free(location) as free:  # a writer is between two renames more often than dead
                removed += self._clear(location) if free else 0
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
            wrong += self._check_location(self._location_of_digest(digest), group)
        for _, status in self.contents():
            files, size = files + 1, size + status.st_size
        if (files, size) != self.usage.read()[:2]:
            wrong.append(f"usage says {self.usage.read()[:2]}, but there are {files} files, {size} bytes")
        return wrong

    def _check_location(self, location: Location, names: list[str]) -> list[str]:
        record = self._parse(location)
        content = location.content(record.generation).name if record else None
        wrong = []
        for name in names:
            if name.endswith((PART, FILL)):
                wrong.append(f"a temporary file is left: {name}")
            elif name == location.record.name:
                wrong += self._check_record(location, record)
            elif name != content:
                wrong.append(f"no record names this file: {name}")
        return wrong

    def _check_record(self, location: Location, record: Record | None) -> list[str]:
        if record is None:
            return [f"a record cannot be read: {location.digest}"]
        if self.location(record.info.key) != location:
            return [f"a record is under another key's name: {record.info.key!r}"]
        try:
            size = location.content(record.generation).stat().st_size
        except FileNotFoundError:
            return [f"a record has no content: {record.info.key!r}"]
        if size != record.info.size:
            return [f"the content of {record.info.key!r} has {size} bytes, its record says {record.info.size}"]
        return []


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
