# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bringing a cold object into the cache, while everybody who asked for it reads along.

Over all workers, one thread fetches: the *filler*. It holds the lock of the key's *claim*, a small file that says
what the object is and which *part* file it goes to. Everybody else, in whatever process, *follows* the growing part.
The claim is what the cache's record will be: in the end it gets that one's name, as the part gets the content's.

Claim and part say by themselves how a fill fares:

- The part is as long as the object: complete, and verified. Its last piece is only written if the digests are right.
- The claim is locked: somebody is at work on it.
- It is not locked, and its path still leads to it: its filler died. Whoever locks it now carries on.
- It is not locked, and not at its path: given up. Who has a piece of the object may read the rest from the backend.
- The part is shorter than it was: its content is wrong. Who has a piece of it must be cut.

An upload or deletion that is committed meanwhile unlinks the claim (:meth:`.Cache.revoke_fill`). Requests that follow
its part still get the version that they were promised, but it is never published, and no other request joins them.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kci_storage.cache.names import Location
from kci_storage.drivers.base import ObjectInfo
from kci_storage.errors import CorruptObject, Overloaded, StorageError
from kci_storage.files import durable
from kci_storage.fills.claim import Claim
from kci_storage.net import slots

READ_SIZE = 256 * 1024  # bytes read from a part at a time


class AlreadyCached(Exception):
    """The object was published between the look that missed it and the lock: look again."""


class FillLost(StorageError):
    """Another process gave a fill up, nobody here knows why."""


class Region(NamedTuple):
    """Bytes of an open file, to be sent without coming through this process's memory."""

    fd: int
    start: int
    stop: int

    def read(self) -> Iterator[bytes]:
        """The bytes, for who cannot do that.

        :raises CorruptObject: the file has become shorter.
        """
        position = self.start
        while position < self.stop:
            data = os.pread(self.fd, min(READ_SIZE, self.stop - position), position)
            if not data:
                raise CorruptObject("the backend sent a damaged object")
            position += len(data)
            yield data


class Fill:
    """An object on its way in as the threads of one process see it, whichever process fetches it.

    Whoever joins it leaves it (:meth:`leave`).
    """

    def __init__(self, key: str, location: Location):
        self.key = key
        self.location = location
        self.claim: Claim | None = None
        self.info: ObjectInfo | None = None  # None until the backend has answered
        self.available = 0  # bytes
        self.followers = 0
        self._error: BaseException | None = None  # why it ended early
        self._ended = False
        self._fd = -1  # the part
        self._changed = threading.Condition()

    # For the thread that fills or watches

    def begin(self, info: ObjectInfo) -> None:
        """The backend has answered."""
        with self._changed:
            self.info = info
            self._changed.notify_all()

    def open(self, part: Path) -> None:
        """Have the followers read this file.

        :raises FileNotFoundError: it is gone.
        """
        self._fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)

    def follows(self, part: durable.NewFile) -> bool:
        """Whether that is the file that the followers read."""
        return os.path.samestat(os.fstat(self._fd), os.fstat(part.fileno()))

    def look(self) -> None:
        """See how long the part is now.

        :raises CorruptObject: shorter than before, which is how a filler says that it was wrong.
        """
        available = os.fstat(self._fd).st_size
        if available < self.available:
            raise CorruptObject("the backend sent a damaged object")
        self.advance(available)

    def advance(self, available: int) -> None:
        """The part has so many bytes now."""
        if available != self.available:
            with self._changed:
                self.available = available
                self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()
            self._close_if_unused()

    @property
    def complete(self) -> bool:
        """Whether all of it is here, and verified."""
        return self.info is not None and self.available == self.info.size

    # For the followers

    def join(self) -> None:
        """Count one follower more."""
        with self._changed:
            self.followers += 1

    def leave(self) -> None:
        """Count one follower less; the last one closes the part."""
        with self._changed:
            self.followers -= 1
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._ended and self.followers == 0 and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def wait_for_info(self, timeout: float) -> ObjectInfo:
        """What the object is, as soon as the backend has said so.

        :param timeout: seconds.
        :raises StorageError: why the fill ended before that.
        :raises AlreadyCached: there is a copy now.
        :raises Overloaded: it took too long.
        """
        with self._changed:
            self._wait(lambda: self.info is not None or self._ended, timeout)
            if self.info is not None:
                return self.info
            if self._ended:
                raise self._why() or AlreadyCached
        raise Overloaded("too many files are being fetched, or the backend is slow; try later", retry_after=5)

    def regions(self, start: int, stop: int) -> Iterator[Region]:
        """The bytes from ``start`` up to ``stop``, as they arrive.

        :raises StorageError: why the fill ended before ``stop``.
        """
        while start < stop:
            available = min(self._wait_beyond(start), stop)
            yield Region(self._fd, start, available)
            start = available

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The same as bytes."""
        for region in self.regions(start, stop):
            yield from region.read()

    def _wait_beyond(self, position: int) -> int:
        """How many bytes there are, as soon as it is more than ``position``."""
        with self._changed:
            self._wait(lambda: self.available > position or self._ended)
            if self.available > position and not isinstance(self._error, CorruptObject):
                return self.available
            raise self._why() or FillLost("the object could not be fetched")

    def _wait(self, condition: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait for a change. The caller holds the mutex."""
        if not condition():
            with slots.waiting(bounded=False):
                self._changed.wait_for(condition, timeout)

    def _why(self) -> BaseException | None:
        return copy.copy(self._error)  # each thread gets one of its own, since raising it changes it

    def is_revoked(self) -> bool:
        """Whether what it brings may be older than what a newcomer must get."""
        return self.claim is not None and not self.claim.is_current()
