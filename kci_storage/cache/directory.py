# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory that holds copies of backend objects.

For a key whose SHA-512 is ``abcd…``, in the folder ``ab``:

===========================  ===========================================================================
``abcd….json``               the record: the object's properties, and the name of its content file
``abcd….<generation>.data``  the content; never modified once it has this name
``abcd….<generation>.part``  a content that is being written, locked by its writer
``abcd….fill``               the claim of a running fill, with the record that the copy will get (:class:`.Claim`)
``abcd….doubt``              the changes of the object whose answer was lost (:class:`.Doubt`)
===========================  ===========================================================================

The rename of the record is the commit. Each version has its own generation, hence its own content file, and the old
content is unlinked before a new record replaces the old one: so a record that a process remembers is right for as
long as the content file that it names can be opened. Thus a hit takes two system calls and no lock, and an overwrite
through one worker is visible to the very next request on every other worker.

A thread that changes an entry holds the key's lock (:meth:`Cache.writing`). A writer that dies leaves its lock
behind. The next thread that takes this lock *doubts* the key (:meth:`Cache.doubt`), and removes the dead writer's
files. While a key is in doubt, every reader asks the backend before it gets the copy (:mod:`.settling`).
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

from kci_storage.cache.doubt import ABSENT, ANY, LANDING_SECONDS, Doubt
from kci_storage.cache.entry import Entry, Record, Usage, last_use, new_record
from kci_storage.cache.names import (
    CACHE_FILE,
    CONTENT,
    DIGEST,
    DOUBT,
    FILL,
    FOLDERS,
    LOCKS,
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

TOUCH_INTERVAL = 300  # seconds; a hit updates a content file's access time at most this often
MAX_REMEMBERED_RECORDS = 20_000  # per process; about 1 KiB each


class _ThreadChanges(threading.local):
    """How often this thread has changed the usage."""

    count = 0


class Cache:
    """The cache directory, for one process.

    :param directory: its path; created if it is missing.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.spool_directory = directory / SPOOL
        self.locks = KeyLocks(directory / LOCKS)
        self.usage = counters.SharedCounters(directory / "usage", len(Usage._fields))
        self._own_changes = _ThreadChanges()
        self._remembered: dict[str, tuple[Record, str]] = {}  # by key: the record, and the content's path
        durable.make_directory(self.spool_directory)

    def location(self, key: str) -> Location:
        """The paths of the key's files."""
        return self._location_of_digest(hashlib.sha512(key.encode()).hexdigest())

    def _location_of_digest(self, digest: str) -> Location:
        return Location(digest, f"{self.directory}/{digest[:2]}/{digest}")

    # Reading: without a lock, and without asking the backend

    def has_copy(self, key: str) -> bool:
        """Whether the object has a record, which one system call tells. The copy may still turn out broken."""
        return self.location(key).record.exists()

    def lookup(self, key: str) -> Entry | None:
        """The copy of the object, opened; None: there is none.

        A broken entry (unreadable, of the wrong size, without content) is removed and counts as none.
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
            # Either the entry was overwritten meanwhile, and the next round finds the new record; or it is broken.
            if self._read_record(location) == record:
                self._remove_broken(location, record)
                return None

    def _remember(self, key: str, entry: Entry) -> None:
        if len(self._remembered) >= MAX_REMEMBERED_RECORDS:
            self._remembered.clear()
        self._remembered[key] = entry.record, entry.path

    def _read_record(self, location: Location) -> Record | None:
        try:
            with open(f"{location.stem}{RECORD}", "rb", 0) as file:  # the hot path of a miss: no Path is made
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
        # The access time decides the order of eviction. It is set here, since file systems are mounted noatime.
        now = time.time()
        if now - status.st_atime > TOUCH_INTERVAL:
            durable.set_access_time(fd, status, now)

    def _remove_broken(self, location: Location, record: Record | None) -> None:
        """Remove an entry that cannot be served, unless its key is locked or it has been replaced.

        :param record: the entry's record; None: the record could not be read.
        """
        with contextlib.suppress(InsufficientStorage), self._writing_if_free(location) as free:
            if free and self._parse(location) == record:
                self._unlink_entry(location, record)

    @staticmethod
    def _parse(location: Location) -> Record | None:
        """The record; None: there is none, or it cannot be read."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return Record.from_json(location.record.read_bytes())
        return None

    # Writing

    @contextlib.contextmanager
    def writing(self, key: str, timeout: float) -> Iterator[None]:
        """Hold the key's lock during the block, for an upload or a deletion.

        :param timeout: seconds to wait for the lock.
        :raises WriteConflict: other writers held it all that time.
        :raises Overloaded: too many requests of this process wait already.
        :raises InsufficientStorage: the disk is full.
        """
        location = self.location(key)
        with self.locks.hold(location.digest, timeout) as lease:
            self._heal(location, lease)
            yield

    def writing_if_free(self, key: str) -> contextlib.AbstractContextManager[bool]:
        """Hold the key's lock during the block if it is free now; the block's value says whether it is held."""
        return self._writing_if_free(self.location(key))

    @contextlib.contextmanager
    def _writing_if_free(self, location: Location) -> Iterator[bool]:
        with self.locks.hold_if_free(location.digest) as lease:
            if lease is not None:
                self._heal(location, lease)
            yield lease is not None

    def _heal(self, location: Location, lease: Lease) -> None:
        """Repair the entry if the lock's last holder died."""
        if lease.orphaned:
            self._repair(location)

    def _repair(self, location: Location) -> None:
        self._doubt(location, ANY, time.time() + LANDING_SECONDS)
        self._clear(location)

    def is_being_written(self, key: str) -> bool:
        """Whether an upload or deletion of the key is running. What a dead writer left is removed."""
        location = self.location(key)
        if not self.locks.is_present(location.digest):
            return False
        with self._writing_if_free(location) as free:
            return not free

    def new_part(self, key: str, generation: str | None = None) -> durable.NewFile:
        """A file for a new version's content.

        :param generation: the version's; None: a new one.
        :raises InsufficientStorage: the disk is full.
        """
        return durable.NewFile(self.location(key).part(generation or new_generation()))

    def new_spool(self) -> durable.NewFile:
        """A file for a form part whose key is not known yet.

        :raises InsufficientStorage: the disk is full.
        """
        return durable.NewFile(self.spool_directory / f"{new_generation()}{PART}")

    def announce_commit(self, key: str) -> None:
        """Before the backend commits a new version: make sure that the old copy is doubtful if this process dies.

        The caller holds the key's lock, whose file is the announcement. It is flushed to disk here, so that it
        survives a loss of power.
        """
        if self.has_copy(key):
            self.locks.sync()

    def known_version(self, key: str) -> str | None:
        """The ETag of the copy's version; None: there is no copy. The caller holds the key's lock."""
        record = self._parse(self.location(key))
        return record.info.etag if record is not None else None

    def publish(self, part: durable.NewFile, info: ObjectInfo, *, replaced: bool = False) -> None:
        """Make the part file the object's copy, in place of the old one.

        The backend has acknowledged this version, and the caller holds the key's lock.

        :param replaced: whether there was an object before. If it has no record, it may have lost it by hand, and
            other workers may remember its content, which is removed.
        :raises InsufficientStorage: the disk is full. The old copy is removed then; the caller discards the part.
        """
        location, new = self.location(info.key), new_record(info)
        with self._replacing(location, new) as old, self._new_record(location, new) as file:
            if replaced and old is None:
                self._remove_strays(location, None)
            self._put_in_place(part, file, old, new)
        self._end_doubt(location)

    def publish_filled(self, part: durable.NewFile, record: Record, file: durable.NewFile) -> None:
        """As :meth:`publish`, with a record that is written already.

        :param file: the record's file, under a temporary name; the caller closes it.
        """
        with self._replacing(self.location(record.info.key), record) as old:
            self._put_in_place(part, file, old, record)

    @contextlib.contextmanager
    def _replacing(self, location: Location, new: Record) -> Iterator[Record | None]:
        """Replace a record during the block, whose value is the old one. If the block fails, no copy is left."""
        old = self._parse(location)
        try:
            yield old
        except BaseException:
            self._unlink_content(location, new)
            self._unlink_entry(location, old)
            raise

    def _put_in_place(self, part: durable.NewFile, file: durable.NewFile, old: Record | None, new: Record) -> None:
        """Give a new version's content and its record their final names.

        There are two flushes: one of content and record, then one of both names. After a loss of power between
        them, no copy is found; the content that a record names is always complete.
        """
        location = self.location(new.info.key)
        durable.flush_together(part, file)  # the rest cannot fail for lack of space
        part.take_name(location.content(new.generation))
        self._count(1, new.info.size)
        self._unlink_old_content(location, old, keep=new)
        file.take_name(location.record)
        durable.sync_directory(location.record.parent)
        part.close()

    @staticmethod
    def _new_record(location: Location, record: Record) -> durable.NewFile:
        """A record's file under a temporary name, not flushed."""
        file = durable.NewFile(Path(f"{location.stem}.{record.generation}{RECORD}{PART}"))
        try:
            file.write(record.to_json())
        except BaseException:
            file.discard()
            raise
        return file

    def remove(self, key: str) -> bool:
        """Remove the copy, durably; whether there was one. The caller holds the key's lock.

        Contents without a record, which workers may remember all the same, are removed too.
        """
        location = self.location(key)
        removed = self._unlink_entry(location, self._parse(location))
        if self._remove_strays(location, None) or removed:
            with contextlib.suppress(InsufficientStorage):  # it is removed, at least until a loss of power
                durable.sync_directory(location.record.parent)
        return removed

    def acknowledge(self, key: str) -> None:
        """The backend has acknowledged a version of which there is no copy: remove the old one.

        The caller holds the key's lock.
        """
        self.remove(key)
        self._end_doubt(self.location(key))

    def remove_version(self, record: Record) -> None:
        """Remove the copy if it still has this record, and its key is not locked."""
        self._remove_broken(self.location(record.info.key), record)

    # Doubt

    def doubt(self, key: str, replaces: str | None, until: float) -> None:
        """A change of the object may have been carried out, or may still be. The caller holds the key's lock.

        From now on each reader asks the backend before it gets the copy, until the doubt is settled. (On a full disk,
        the copy is removed.) No running fill is published.

        :param replaces: the ETag of the version that the change requires; None: it requires that there is none.
        :param until: when the change cannot be carried out any more, in seconds since the epoch.
        """
        self._doubt(self.location(key), ABSENT if replaces is None else replaces, until)

    def _doubt(self, location: Location, named: str, until: float) -> None:
        self._revoke_fill(location)
        record = self._parse(location)
        try:
            if until > time.time():
                self._write_doubt(location, self._read_doubt(location).with_change(named, until))
            if record is not None:
                # Each doubt has a generation of its own, so that no worker trusts an answer from before it.
                self._replace_record(location, record, replace(record, generation=new_generation(), doubtful=True))
        except InsufficientStorage:
            self._unlink_entry(location, record)

    @staticmethod
    def _write_doubt(location: Location, doubt: Doubt) -> None:
        with durable.NewFile(Path(f"{location.stem}.{new_generation()}{DOUBT}{PART}")) as file:
            file.write(doubt.to_json())
            file.publish(location.doubt)

    def doubt_of(self, key: str) -> Doubt:
        """The changes of the object that may still be carried out."""
        return self._read_doubt(self.location(key))

    @staticmethod
    def _read_doubt(location: Location) -> Doubt:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return Doubt.from_json(location.doubt.read_bytes())
        return Doubt()

    def _end_doubt(self, location: Location) -> None:
        """The versions that lost changes name are gone. A lost creation may still be carried out after a deletion."""
        with contextlib.suppress(FileNotFoundError, ValueError, InsufficientStorage):
            left = Doubt.from_json(location.doubt.read_bytes()).of_creations()
            if not left.is_over(time.time()):
                self._write_doubt(location, left)
                return
        durable.remove(location.doubt)

    def settle(self, found: ObjectInfo, renewed: ObjectInfo, asked: float) -> None:
        """End the doubt about a version: no lost change can replace it any more. The caller holds the key's lock.

        :param found: the version that the backend has.
        :param renewed: the same with the ETag that it has got since; the copy, if it is of this version, gets it too.
        :param asked: when the backend was asked, in seconds since the epoch.
        """
        location = self.location(found.key)
        record = self._parse(location)
        if record is None or record.info.etag != found.etag:
            self._unlink_entry(location, record)
        elif record.doubtful or renewed.etag != found.etag:
            info = replace(record.info, etag=renewed.etag, last_modified=renewed.last_modified)
            settled = Record(info, new_generation(), validated=asked)
            with contextlib.suppress(InsufficientStorage):  # then the next reader asks again
                self._replace_record(location, record, settled)
        if renewed.etag != found.etag:
            self._revoke_fill(location)
        self._end_doubt(location)

    def forget(self, key: str) -> None:
        """The backend has no such object: remove the copy. The caller holds the key's lock."""
        location = self.location(key)
        self.remove(key)
        self._revoke_fill(location)
        self._end_doubt(location)

    # Replacing and removing

    def _replace_record(self, location: Location, old: Record, new: Record) -> None:
        """Replace a record by another one for the same content. A crash in between leaves a broken entry.

        :raises InsufficientStorage: the disk is full.
        """
        with (
            self._new_record(location, new) as record,
            contextlib.suppress(FileNotFoundError),
        ):  # a broken entry already
            record.flush()  # the rest cannot fail for lack of space
            # A new generation, so that no process keeps using the record that it remembers.
            durable.rename(location.content(old.generation), location.content(new.generation))
            record.publish(location.record)

    def revoke_fill(self, key: str) -> None:
        """Keep a running fill of the key from being published: it may have read the old version."""
        self._revoke_fill(self.location(key))

    @staticmethod
    def _revoke_fill(location: Location) -> None:
        durable.remove(location.fill)

    def _unlink_entry(self, location: Location, record: Record | None) -> bool:
        """Remove the content and its record, in this order; whether there was a record.

        :param record: None: there is no record, or it cannot be read.
        """
        self._unlink_old_content(location, record)
        return durable.remove(location.record)

    def _unlink_old_content(self, location: Location, old: Record | None, keep: Record | None = None) -> None:
        """Unlink the old content, so that no process keeps using a record that it remembers.

        :param old: the present record; None: there is no record, or it cannot be read.
        :param keep: the record whose content stays.
        """
        if not self._unlink_content(location, old) and location.record.exists():  # broken: it names no content
            self._remove_strays(location, keep)

    def _unlink_content(self, location: Location, record: Record | None) -> bool:
        removed = record is not None and durable.remove(location.content(record.generation))
        if record is not None and removed:
            self._count(-1, -record.info.size)
        return removed

    def _count(self, files: int, size: int) -> None:
        self._own_changes.count += 1
        with contextlib.suppress(InsufficientStorage):  # the next scan corrects the usage
            self.usage.add(files, size, 1)

    def _clear(self, location: Location) -> int:
        """Remove a key's files that no record names and no writer has locked; how many. The caller holds its lock."""
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
        """Remove a copy, unless its key is locked or it was used meanwhile; whether it was removed.

        :param content: its content file.
        :param used: the last use of that file that the caller knows of, in seconds since the epoch.
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
        """Repair the entries whose writers died, and remove these writers' locks."""
        for name in self.locks.orphans():
            self._repair(self._location_of_digest(name))
        self.locks.sweep()

    def contents(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        """The content files and their status, in no order."""
        return itertools.chain.from_iterable(map(self._contents_in, FOLDERS))

    def _contents_in(self, folder: str) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        return _with_status(file for file in self._scan(folder) if file.name.endswith(CONTENT))

    def _scan(self, folder: str) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory / folder) as files:
            yield from (file for file in files if CACHE_FILE.match(file.name))

    def sweep(self) -> int:
        """Remove what a crash left: unlocked temporary files, contents without a record, records without a content.

        It may run while the server does. It corrects :attr:`usage` as well.

        :returns: how many files were removed.
        """
        return sum(self.sweeping())

    def sweeping(self) -> Iterator[int]:
        """As :meth:`sweep`, in steps of one folder each; yields how many files each step has removed."""
        self.recover_locks()
        before, files, size, own = Usage(*self.usage.read()), 0, 0, self._own_changes.count
        yield sum(durable.remove_if_unlocked(path) for path in self._spools())
        for folder in FOLDERS:
            found = list(self._scan(folder))
            for _, status in _with_status(file for file in found if file.name.endswith(CONTENT)):
                files, size = files + 1, size + status.st_size
            yield self._sweep_folder(found)
        self.correct_usage(before, Usage(files, size, self._own_changes.count - own))

    def correct_usage(self, before: Usage, seen: Usage) -> None:
        """Correct :attr:`usage` by what a scan found, unless concurrent changes may explain the difference.

        :param before: the usage before the scan.
        :param seen: what the scan found; its ``changes`` are those that the scan itself made and counted.
        """
        # A thread that holds a key's lock may have made a change and not counted it yet. (Other locks are not keys'.)
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
                # An entry that cannot be removed, or not locked on a full disk, must not end the sweep.
                with contextlib.suppress(OSError, InsufficientStorage):
                    removed += self._sweep_location(self._location_of_digest(digest), group)
        return removed

    def _sweep_location(self, location: Location, names: list[str]) -> int:
        claims = [location.record.with_name(name) for name in names if name.endswith(FILL)]
        removed = sum(map(durable.remove_if_unlocked, claims))
        removed += self._remove_outdated_doubt(location)
        record = self._parse(location)
        rest = {name for name in names if not name.endswith((FILL, DOUBT))}
        if rest and (record is None or rest != {location.record.name, location.content(record.generation).name}):
            with self._writing_if_free(location) as free:  # a writer is between two renames more often than dead
                removed += self._clear(location) if free else 0
        return removed

    def _remove_outdated_doubt(self, location: Location) -> bool:
        """A doubtful copy stays so without it: the next reader asks once more, and that is enough."""
        return self._read_doubt(location).is_over(time.time()) and durable.remove(location.doubt)

    def check(self) -> list[str]:
        """Check the directory's invariants, while no other thread or process uses it.

        There is no temporary file and no lock; every record can be read, is under its own key's name, and has its
        content, of the right size; every content has its record; and :attr:`usage` is right.

        :returns: what is wrong, one line each; empty when nothing is.
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
            elif name not in (content, location.doubt.name):
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
    """A file's status; None: the file is gone."""
    with contextlib.suppress(FileNotFoundError):
        return file.stat()
    return None


def _with_status(files: Iterable[os.DirEntry[str]]) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    """The files and their status, without those that are gone by now."""
    for file in files:
        if (status := _status(file)) is not None:
            yield file, status


def _by_digest(files: Iterable[os.DirEntry[str]]) -> dict[str, list[str]]:
    """The names of each key's files, by the key's digest."""
    names: dict[str, list[str]] = defaultdict(list)
    for file in files:
        names[digest_of(file.name)].append(file.name)
    return names


def _is_entry(names: list[str]) -> bool:
    """Whether a key has a record, a content, and nothing else.

    Whether the two belong together is not checked here, which would take ten times as long; a lookup and an eviction
    check it. A crash that leaves a record with another one's content also leaves a third file.
    """
    if len(names) != 2:
        return False
    record, content = names if names[0].endswith(RECORD) else reversed(names)
    return record.endswith(RECORD) and content.endswith(CONTENT)
