# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading one version of an object from the backend: through its failures, and checked against its digests."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator

from kci_storage.drivers.base import Driver, ObjectInfo, ObjectReader
from kci_storage.errors import BackendError, CorruptObject, ObjectChanged
from kci_storage.net import slots

log = logging.getLogger(__name__)

BUFFER_SIZE = 512 * 1024  # bytes that are read at a time for one client
LARGE_BUFFER_SIZE = 2 * 1024 * 1024  # bytes, for many: what comes wakes them all, so it had better be much
RESUME_FOR = 60  # seconds without a byte after which a read is given up
FIRST_BACKOFF, LONGEST_BACKOFF = 0.2, 5.0  # seconds between two tries


def resumed(
    driver: Driver,
    info: ObjectInfo,
    start: int,
    stop: int,
    reader: ObjectReader | None = None,
    begun: bool = False,
    buffer_size: int = BUFFER_SIZE,
) -> Iterator[memoryview]:
    """The bytes from ``start`` up to ``stop`` of one version, taken up where a read broke off.

    :param reader: what reads them at first; None: one is opened. It is closed.
    :param begun: whether a client has bytes of the object already. To one that has none an error is of more use than
        patience.
    :param buffer_size: bytes that a piece has at most.
    :returns: pieces, each to be used before the next one is asked for, which takes its place in memory.
    :raises ObjectChanged: the version is gone.
    :raises CorruptObject: there is more or less than that.
    :raises BackendError: nothing has come for :data:`RESUME_FOR` seconds, or at all.
    """
    patience = Patience()
    buffer = memoryview(bytearray(min(stop - start, buffer_size)))
    while start < stop:
        try:
            with reader or driver.read(info.key, start, stop, info.etag) as reader:  # noqa: PLR1704  (for this round)
                if reader.info.size != info.size:
                    raise CorruptObject("the backend sent a damaged object", detail=f"{reader.info.size} B")
                while size := reader.readinto(buffer):
                    start += size
                    if start > stop:
                        raise CorruptObject("the backend sent too much", detail=f"{info.key!r}: {start} of {stop} B")
                    patience.renew()
                    begun = True
                    yield buffer[:size]
            if start < stop:
                raise BackendError("the backend sent too little", detail=f"{info.key!r}: {start} of {stop} B")
        except (ObjectChanged, CorruptObject):
            raise
        except BackendError as exc:
            if not begun:
                raise
            log.warning("event=read_interrupted position=%d error=%s", start, type(exc).__name__)
            patience.lose(exc)
        reader = None


class Patience:
    """How long to go on with a backend that fails."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """It has sent something."""
        self._backoff = FIRST_BACKOFF
        self._ends = time.monotonic() + RESUME_FOR

    def lose(self, error: BackendError) -> None:
        """It has failed: wait, longer each time.

        :raises BackendError: the given one, when that has been so for too long.
        """
        if time.monotonic() + self._backoff > self._ends:
            raise error
        with slots.waiting(bounded=False):
            time.sleep(self._backoff)
        self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)


def verified(info: ObjectInfo, pieces: Iterable[memoryview], before: Iterable[bytes] = ()) -> Iterator[memoryview]:
    """The pieces that end an object, the last of them only if the whole is what the backend's digests say.

    :param before: what comes before them, and is not given again.
    :raises CorruptObject: it is not.
    """
    digests, missing = ContentDigests(info), info.size
    for piece in before:
        digests.update(piece)
        missing -= len(piece)
    for data in pieces:
        missing -= len(data)
        if missing:
            yield data  # somebody waits for it
            digests.update(data)
        else:
            digests.update(data)
            digests.check()
            yield data


class ContentDigests:
    """Those of a content that the backend knows.

    They are computed by the thread that fetches, piece by piece while these are in the processor's cache. It still
    keeps up with any line, and to hand the pieces to another thread costs more than it saves.
    """

    def __init__(self, info: ObjectInfo):
        self._key = info.key
        self._expected = _digest(info)
        self._hash = hashlib.new(self._expected[0], usedforsecurity=False) if self._expected else None

    def update(self, data: bytes | memoryview) -> None:
        """Take the next piece in."""
        if self._hash is not None:
            self._hash.update(data)

    def check(self) -> None:
        """Compare, at the end.

        :raises CorruptObject: the content is wrong.
        """
        if self._hash is not None and self._expected != (self._hash.name, self._hash.digest()):
            raise CorruptObject("the backend sent a damaged object", detail=f"{self._hash.name} of {self._key!r}")


def _digest(info: ObjectInfo) -> tuple[str, bytes] | None:
    """A digest of a content that the backend knows, and its name."""
    if info.sha256 is not None:  # MD5 is half as fast, and says nothing that this does not
        return "sha256", bytes.fromhex(info.sha256)
    return ("md5", info.md5) if info.md5 is not None else None
