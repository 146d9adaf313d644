"""Locks between the processes of one server, and what a lock that nobody holds any more means.

A lock is a file that exists while it is held, locked by ``flock``: the kernel frees it when its
holder dies. Its holder removes it before letting go, so that there are never more of them than locks in use. That is
safe because whoever locks a file looks afterwards whether the path still leads to it, and else begins again.

So a lock file that is there and not locked was left by a writer that died. :meth:`KeyLocks.hold` tells its next
holder so (:attr:`Lease.orphaned`), since nobody knows how far that writer had got. See docs/locking.md.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kci_storage import durable
from kci_storage.errors import WriteConflict

POLL_INTERVAL = 0.01  # seconds between two tries; portalocker's own default of 0.25 would be felt by every waiter


@dataclass(frozen=True, slots=True)
class Lease:
    """A lock that is held."""

    fd: int
    path: Path
    orphaned: bool  # whether its last holder died with it

    def release(self) -> None:
        """Remove the file, then let go."""
        try:
            if durable.is_file_at(self.fd, self.path):  # else an operator emptied the folder, and it is another's
                durable.remove(self.path)
        finally:
            os.close(self.fd)


class KeyLocks:
    """One exclusive lock per name, over all threads and processes that use one directory.

    :param directory: where the lock files lie; on a local file system.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        durable.make_directory(directory)

    def try_acquire(self, name: str) -> Lease | None:
        """The lock if it is free now, else None. The caller releases it."""
        path = self.directory / name
        while True:
            fd, made = durable.open_or_make_lock_file(path)
            if not durable.try_lock(fd):
                os.close(fd)
                return None
            if durable.is_file_at(fd, path):
                return Lease(fd, path, orphaned=not made)
            os.close(fd)

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[Lease]:
        """Hold the lock during the block.

        :param timeout: seconds to wait for it.
        :raises WriteConflict: it was held by others all that time.
        """
        deadline = time.monotonic() + timeout
        while (lease := self.try_acquire(name)) is None:
            if time.monotonic() >= deadline:
                raise WriteConflict(
                    f"another upload of this file has been running for {timeout:g} seconds; try later"
                )
            time.sleep(POLL_INTERVAL)
        try:
            yield lease
        finally:
            lease.release()

    @contextlib.contextmanager
    def hold_if_free(self, name: str) -> Iterator[Lease | None]:
        """Hold the lock during the block if it is free now; the block gets None if it is not."""
        lease = self.try_acquire(name)
        try:
            yield lease
        finally:
            if lease is not None:
                lease.release()

    def is_present(self, name: str) -> bool:
        """Whether somebody holds the lock, or died with it. Costs one look at the directory."""
        return (self.directory / name).exists()

    def names(self) -> list[str]:
        """The locks that are held or were left by the dead."""
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(self.directory)
        return []

    def sync(self) -> None:
        """Make sure that the locks held now are found after a loss of power."""
        durable.sync_directory(self.directory)
