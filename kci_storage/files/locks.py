# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks between the processes of one server, and what a lock that nobody holds any more means.

A lock is a name in a folder: a hard link to a *marker*, a file of its holder's process that stays locked by ``flock``
for as long as that lives. To take a lock is to make the link, which fails where there is one; to let go is to unlink
it. The marker serves for the next lock. So there are never more names than locks in use.

A name whose file is not locked was left by a writer that died. :meth:`KeyLocks.hold` tells its next holder so
(:attr:`Lease.orphaned`), since nobody knows how far that writer had got. See docs/locking.md.

A new file for each lock is what it was once. ext4 lets the inode of a deleted file rest for minutes, and searches
past all that rest for each new file: at some hundred uploads a second that took half of the processor.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kci_storage.errors import InsufficientStorage, WriteConflict
from kci_storage.files import durable
from kci_storage.net import slots

MARKERS = "markers"  # the folder of the markers, beside that of the locks
KEPT = 64  # markers that a process keeps for its next locks
NOBODYS = hashlib.sha512().hexdigest()  # the name that an empty key would have
POLL_INTERVAL = 0.01  # seconds between two tries; portalocker's own default of 0.25 would be felt by every waiter


@dataclass(frozen=True, slots=True)
class Lease:
    """A lock that is held."""

    path: Path
    orphaned: bool  # whether its last holder died with it
    release: Callable[[], None]  # remove the name, then let go


class KeyLocks:
    """One exclusive lock per name, over all threads and processes that use one directory.

    :param directory: where the names are; on a local file system with hard links. The markers are in a folder beside
        it.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._markers = _Markers(directory.with_name(MARKERS))
        self._turns = _Turns()
        durable.make_directory(directory)

    def try_acquire(self, name: str) -> Lease | None:
        """The lock if it is free now, else None. The caller releases it.

        :raises InsufficientStorage: the disk is full.
        """
        path = self.directory / name
        while True:
            if (marker := self._mark(path)) is not None:
                return Lease(path, orphaned=False, release=partial(self._release, path, marker))
            if (left := durable.NewFile.take_over(path)) is not None:
                return Lease(path, orphaned=True, release=left.discard)
            if self.is_present(name):  # else it has been let go of since
                return None

    def _mark(self, path: Path) -> durable.NewFile | None:
        """Give one of our markers that name; None: there is one."""
        while True:
            marker = self._markers.take()
            try:
                if durable.link(marker.path, path):
                    return marker
            except FileNotFoundError:  # an operator emptied the folders
                marker.discard()
                durable.make_directory(self.directory)
                continue
            except BaseException:
                self._markers.put(marker)
                raise
            self._markers.put(marker)
            return None

    def _release(self, path: Path, marker: durable.NewFile) -> None:
        try:
            if durable.is_file_at(marker.fileno(), path):  # else an operator removed it, and it is another's
                durable.remove(path)
        finally:
            self._markers.put(marker)

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[Lease]:
        """Hold the lock during the block.

        :param timeout: seconds to wait for it.
        :raises WriteConflict: it was held by others all that time.
        :raises Overloaded: too many requests of this process wait already.
        """
        lease = self.try_acquire(name) or self._wait(name, timeout)
        try:
            yield lease
        finally:
            lease.release()

    def _wait(self, name: str, timeout: float) -> Lease:
        deadline = time.monotonic() + timeout
        with slots.waiting(), self._turns.take(name, timeout):
            while (lease := self.try_acquire(name)) is None:
                if time.monotonic() >= deadline:
                    raise WriteConflict(
                        f"another upload of this file has been running for {timeout:g} seconds; try later"
                    )
                time.sleep(POLL_INTERVAL)
        return lease

    @contextlib.contextmanager
    def hold_if_free(self, name: str) -> Iterator[Lease | None]:
        """Hold the lock during the block if it is free now; the block gets None if it is not."""
        lease = self.try_acquire(name)
        try:
            yield lease
        finally:
            if lease is not None:
                lease.release()

    def prove(self) -> None:
        """Take a lock that nobody else wants, and let go of it.

        :raises OSError: no file can be made here, or the file system knows no hard links.
        """
        with contextlib.suppress(InsufficientStorage), self.hold_if_free(NOBODYS):  # a full disk is no wrong one
            pass

    def is_present(self, name: str) -> bool:
        """Whether somebody holds the lock, or died with it. Costs one look at the directory."""
        return (self.directory / name).exists()

    def waiting(self, name: str) -> int:
        """How many threads of this process wait for the lock."""
        return self._turns.length(name)

    def names(self) -> list[str]:
        """The locks that are held or were left by the dead."""
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(self.directory)
        return []

    def sync(self) -> None:
        """Make sure that the locks held now are found after a loss of power."""
        durable.sync_directory(self.directory)

    def sweep(self) -> int:
        """Remove the markers of processes that died; how many. The locks that they left stay."""
        return self._markers.sweep()


class _Turns:
    """Who waits for a lock in one process: of those that wait for the same one, only the first looks at it."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[threading.Event]] = {}
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def take(self, name: str, timeout: float) -> Iterator[None]:
        """Be the first during the block, or have waited for that as long as one may."""
        turn = threading.Event()
        with self._mutex:
            queue = self._queues.setdefault(name, deque())
            queue.append(turn)
            queue[0].set()
        try:
            turn.wait(timeout)
            yield
        finally:
            with self._mutex:
                queue.remove(turn)
                if queue:
                    queue[0].set()
                else:
                    del self._queues[name]

    def length(self, name: str) -> int:
        """How many wait."""
        with self._mutex:
            return len(self._queues.get(name, ()))


class _Markers:
    """The files that the locks of one process are links to.

    :param directory: where they lie, those of other processes too.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._pid = os.getpid()
        self._free: list[durable.NewFile] = []
        weakref.finalize(self, _give_up, self._free, self._pid)

    def take(self) -> durable.NewFile:
        """A marker without a lock.

        :raises InsufficientStorage: the disk is full.
        """
        if self._pid != os.getpid():  # a fork: those are the parent's, and would outlive it here
            _give_up(self._free, self._pid)
            self._pid = os.getpid()
        try:
            return self._free.pop()
        except IndexError:
            return durable.NewFile.unnamed(self._directory)

    def put(self, marker: durable.NewFile) -> None:
        """It has no lock any more."""
        if len(self._free) < KEPT:
            self._free.append(marker)
        else:
            marker.discard()

    def sweep(self) -> int:
        """Remove those of the dead, but for the ones to which locks lead that nobody has seen to yet; how many."""
        with contextlib.suppress(FileNotFoundError):
            return sum(_remove_marker(self._directory / name) for name in os.listdir(self._directory))
        return 0


def _remove_marker(path: Path) -> bool:
    with durable.abandoned(path) as status:
        return status is not None and status.st_nlink == 1 and durable.remove(path)


def _give_up(markers: list[durable.NewFile], pid: int) -> None:
    """Let go of markers; in a fork of the process whose they are, of no more than the descriptors."""
    while markers:
        marker = markers.pop()
        marker.discard() if os.getpid() == pid else marker.close()
