# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks between the processes of one server, which tell the next holder when a holder has died.

A lock is a name in a folder: a hard link to a *marker*, a file of the holder's process that is locked (``flock``) for
as long as that process lives. Taking a lock makes the link, which fails if there is one; releasing it unlinks the
name. The marker is reused for the next lock. So there are never more names than locks in use.

A name whose file is not locked was left by a holder that died. :meth:`KeyLocks.hold` tells the next holder so
(:attr:`Lease.orphaned`), since it is unknown how far the dead one had come. See docs/locking.md.

A new file for each lock would cost too much: ext4 does not reuse the inode of a deleted file for minutes, and
searches past all such inodes for each new file. At a few hundred uploads a second that took half of the processor.
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
MAX_FREE_MARKERS = 64  # that a process keeps for its next locks
PROBE_NAME = hashlib.sha512().hexdigest()  # of a lock that no key has: the digest of an empty key
POLL_INTERVAL = 0.01  # seconds between two tries; portalocker's default of 0.25 would delay each waiting request


@dataclass(frozen=True, slots=True)
class Lease:
    """A lock that is held."""

    path: Path
    orphaned: bool  # whether the previous holder died while it held the lock
    release: Callable[[], None]


class KeyLocks:
    """One exclusive lock per name, for all threads and processes that use one directory.

    :param directory: the folder of the names, on a local file system with hard links. The markers' folder is beside
        it.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._markers = _Markers(directory.with_name(MARKERS))
        self._turns = _Turns()
        durable.make_directory(directory)

    def try_acquire(self, name: str) -> Lease | None:
        """Take the lock if it is free now; None: it is not. The caller releases it.

        :raises InsufficientStorage: the disk is full.
        """
        path = self.directory / name
        while True:
            if (marker := self._mark(path)) is not None:
                return Lease(path, orphaned=False, release=partial(self._release, path, marker))
            if (left := durable.NewFile.take_over(path)) is not None:
                return Lease(path, orphaned=True, release=left.discard)
            if self.is_present(name):  # else it has been released since
                return None

    def _mark(self, path: Path) -> durable.NewFile | None:
        """Link one of this process's markers to the path; None: the path exists."""
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
            if durable.is_file_at(marker.fileno(), path):  # else an operator removed it, and another holder has it
                durable.remove(path)
        finally:
            self._markers.put(marker)

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[Lease]:
        """Hold the lock during the block.

        :param timeout: seconds to wait for it.
        :raises WriteConflict: other threads or processes held it all that time.
        :raises Overloaded: too many requests of this process wait already.
        :raises InsufficientStorage: the disk is full.
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
        """Hold the lock during the block if it is free now; else the block's value is None."""
        lease = self.try_acquire(name)
        try:
            yield lease
        finally:
            if lease is not None:
                lease.release()

    def check_usable(self) -> None:
        """Take and release a lock that no key uses, to find out whether locks work in this folder.

        :raises OSError: no file can be created here, or the file system has no hard links.
        """
        with contextlib.suppress(InsufficientStorage), self.hold_if_free(PROBE_NAME):  # a full disk may recover
            pass

    def is_present(self, name: str) -> bool:
        """Whether the lock is held, or was left by a dead holder. It costs one system call."""
        return (self.directory / name).exists()

    def waiting(self, name: str) -> int:
        """How many threads of this process wait for the lock."""
        return self._turns.length(name)

    def names(self) -> list[str]:
        """The locks that are held, or were left by dead holders."""
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(self.directory)
        return []

    def orphans(self) -> Iterator[str]:
        """The names of the locks that dead holders left.

        Each lock is held until the next name is asked for, and is removed then; if the caller fails before, it stays.
        No marker is needed, so this works on a full disk, too.
        """
        for name in self.names():
            if (left := durable.NewFile.take_over(self.directory / name)) is not None:
                with contextlib.closing(left):
                    yield name
                    left.discard()

    def sync(self) -> None:
        """Flush the folder, so that the locks held now survive a loss of power."""
        durable.sync_directory(self.directory)

    def sweep(self) -> int:
        """Remove the markers of dead processes; how many. The locks that these left stay."""
        return self._markers.sweep()


class _Turns:
    """The queues of one process's waiting threads: of those that wait for one lock, only the first polls it."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[threading.Event]] = {}
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def take(self, name: str, timeout: float) -> Iterator[None]:
        """Wait to be the first in the queue, for ``timeout`` seconds at most; the block runs in either case."""
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
        """How many threads wait for a lock."""
        with self._mutex:
            return len(self._queues.get(name, ()))


class _Markers:
    """The marker files of one process, to which its locks are links.

    :param directory: the folder of the markers, which all processes share.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._pid = os.getpid()
        self._free: list[durable.NewFile] = []
        weakref.finalize(self, _discard_all, self._free, self._pid)

    def take(self) -> durable.NewFile:
        """A marker without a lock.

        :raises InsufficientStorage: the disk is full.
        """
        if self._pid != os.getpid():  # after a fork, these are the parent's; here they would survive it
            _discard_all(self._free, self._pid)
            self._pid = os.getpid()
        try:
            return self._free.pop()
        except IndexError:
            return durable.NewFile.unnamed(self._directory)

    def put(self, marker: durable.NewFile) -> None:
        """Return a marker whose lock was released."""
        if len(self._free) < MAX_FREE_MARKERS:
            self._free.append(marker)
        else:
            marker.discard()

    def sweep(self) -> int:
        """Remove the markers of dead processes, except those that still have a lock; how many."""
        with contextlib.suppress(FileNotFoundError):
            return sum(_remove_marker(self._directory / name) for name in os.listdir(self._directory))
        return 0


def _remove_marker(path: Path) -> bool:
    with durable.abandoned(path) as status:
        return status is not None and status.st_nlink == 1 and durable.remove(path)


def _discard_all(markers: list[durable.NewFile], pid: int) -> None:
    """Discard markers; in a fork of process ``pid``, to which they belong, only close them."""
    while markers:
        marker = markers.pop()
        marker.discard() if os.getpid() == pid else marker.close()
