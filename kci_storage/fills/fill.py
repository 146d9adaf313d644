# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fill: a cold object is fetched into the cache, while all requests for it read what has arrived.

Over all workers, one thread fetches: the *filler*. It holds the lock of the key's *claim*, a small file that says
what the object is and which *part* file it goes to. All other threads, in any process, are *followers* of the growing
part. The claim's content is the future record: in the end the claim gets the record's name, and the part that of the
content.

The state of a fill can be read from its claim and its part:

- The part is as long as the object: complete, and verified. The last piece is only written if the digests match.
- The claim is locked: the filler is alive.
- The claim is not locked, but at its path: the filler died. The next thread that locks the claim resumes the fill.
- The claim is neither locked nor at its path: the fill has ended early. A follower may read the
  rest from the backend.
- The part is shorter than before: its content is wrong. A follower that has sent a piece must abort its response.

An upload or deletion that is committed meanwhile unlinks the claim (:meth:`.Cache.revoke_fill`). The fill's followers
still get the version that they began with, but it is never published, and no further request joins the fill.
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
    """The object was published after this request had missed it: the caller looks into the cache again."""


class FillLost(StorageError):
    """A fill has ended early in another process; the reason is not known in this one."""


class Region(NamedTuple):
    """Bytes of an open file, which can be sent without a copy in this process's memory (``sendfile``)."""

    fd: int
    start: int  # bytes
    stop: int  # bytes; the first one that is not part of it

    def read(self) -> Iterator[bytes]:
        """The bytes, for a caller that cannot use ``sendfile``.

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
    """A fill, for the threads of one process; its filler may be in another process.

    A thread that joins it (:meth:`join`) leaves it in the end (:meth:`leave`).
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

    # For the thread that fetches, or that watches another process fetch

    def begin(self, info: ObjectInfo) -> None:
        """The backend has answered."""
        with self._changed:
            self.info = info
            self._changed.notify_all()

    def open(self, part: Path) -> None:
        """Open the part file for the followers.

        :raises FileNotFoundError: it is gone.
        """
        self._fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)

    def follows(self, part: durable.NewFile) -> bool:
        """Whether this is the file that the followers read."""
        return os.path.samestat(os.fstat(self._fd), os.fstat(part.fileno()))

    def update(self) -> None:
        """Look how long the part is now, and tell the followers.

        :raises CorruptObject: it is shorter than before: the filler has found its content to be wrong.
        """
        available = os.fstat(self._fd).st_size
        if available < self.available:
            raise CorruptObject("the backend sent a damaged object")
        self.advance(available)

    def advance(self, available: int) -> None:
        """The part has ``available`` bytes now: tell the followers."""
        if available != self.available:
            with self._changed:
                self.available = available
                self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """The fill has ended.

        :param error: why, if it has ended early.
        """
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()
            self._close_if_unused()

    @property
    def complete(self) -> bool:
        """Whether the whole object is available, and verified."""
        return self.info is not None and self.available == self.info.size

    # For the followers

    def join(self) -> None:
        """Count one more follower."""
        with self._changed:
            self.followers += 1

    def leave(self) -> None:
        """Count one follower less; the last one closes the part once the fill has ended."""
        with self._changed:
            self.followers -= 1
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._ended and self.followers == 0 and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def wait_for_info(self, timeout: float) -> ObjectInfo:
        """Wait for the object's properties, which the backend's answer brings.

        :param timeout: seconds.
        :raises StorageError: the fill ended before that; the error says why.
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
        """The bytes from ``start`` up to, not including, ``stop``, as they arrive.

        :raises StorageError: the fill ended before ``stop``; the error says why.
        """
        while start < stop:
            available = min(self._wait_beyond(start), stop)
            yield Region(self._fd, start, available)
            start = available

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """As :meth:`regions`, as bytes."""
        for region in self.regions(start, stop):
            yield from region.read()

    def _wait_beyond(self, position: int) -> int:
        """Wait until more than ``position`` bytes are available; how many there are."""
        with self._changed:
            self._wait(lambda: self.available > position or self._ended)
            if self.available > position and not isinstance(self._error, CorruptObject):
                return self.available
            raise self._why() or FillLost("the object could not be fetched")

    def _wait(self, condition: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait until the condition holds. The caller holds the mutex.

        :param timeout: seconds; None: for ever.
        """
        if not condition():
            with slots.waiting(bounded=False):
                self._changed.wait_for(condition, timeout)

    def _why(self) -> BaseException | None:
        return copy.copy(self._error)  # one for each thread, since raising it changes it

    def is_revoked(self) -> bool:
        """Whether a change was committed since the fill began: new requests must not join it."""
        return self.claim is not None and not self.claim.is_current()
