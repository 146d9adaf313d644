# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading one version of an object from the backend: resumed after failures, and checked against its digests."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator

from kci_storage.drivers.base import Driver, ObjectInfo, ObjectReader
from kci_storage.errors import BackendError, CorruptObject, ObjectChanged
from kci_storage.events import Events
from kci_storage.net import slots

log = logging.getLogger(__name__)

BUFFER_SIZE = 512 * 1024  # bytes that are read at a time for one client
LARGE_BUFFER_SIZE = 2 * 1024 * 1024  # bytes at a time for a fill, since each piece wakes all of its followers
RESUME_TIMEOUT = 60  # seconds without a byte after which a read is not resumed any more
MIN_BACKOFF, MAX_BACKOFF = 0.2, 5.0  # seconds between two tries


def resumed(
    driver: Driver,
    info: ObjectInfo,
    start: int,
    stop: int,
    reader: ObjectReader | None = None,
    begun: bool = False,
    buffer_size: int = BUFFER_SIZE,
) -> Iterator[memoryview]:
    """The bytes from ``start`` up to, not including, ``stop`` of one version; an interrupted read is resumed.

    :param reader: an open read of these bytes, which is closed; None: one is opened.
    :param begun: whether a client has bytes of the object already. For a client that has none, an error at once is
        better than a long wait.
    :param buffer_size: the largest size of a piece, in bytes.
    :returns: pieces, each valid until the next one is asked for.
    :raises ObjectChanged: the version is gone.
    :raises CorruptObject: the backend sends more bytes, or says that the object has another size.
    :raises BackendError: nothing was received for :data:`RESUME_TIMEOUT` seconds, or at all.
    """
    retries = ReadRetries()
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
                    retries.reset()
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
            retries.wait(exc)
        reader = None


class ReadRetries:
    """The waits between the tries of one read (exponential backoff)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The backend has sent something: start from the shortest wait again."""
        self._backoff = MIN_BACKOFF
        self._deadline = time.monotonic() + RESUME_TIMEOUT

    def wait(self, error: BackendError) -> None:
        """The backend has failed: wait, twice as long as the last time.

        :raises BackendError: ``error``, when nothing was received for :data:`RESUME_TIMEOUT` seconds.
        """
        if time.monotonic() + self._backoff > self._deadline:
            raise error
        with slots.waiting(bounded=False):
            time.sleep(self._backoff)
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)


def verified(
    info: ObjectInfo, pieces: Iterable[memoryview], events: Events, before: Iterable[bytes] = ()
) -> Iterator[memoryview]:
    """Pass on the pieces up to an object's end, the last one only if the whole object matches the backend's digest.

    :param events: told of a digest of another program that does not match, which is no error.
    :param before: the object's bytes before these pieces; they are digested, and not passed on.
    :raises CorruptObject: it does not match.
    """
    digests, missing = ContentDigests(info, events), info.size
    for piece in before:
        digests.update(piece)
        missing -= len(piece)
    for data in pieces:
        missing -= len(data)
        if missing:
            yield data  # before it is digested, since clients wait for it
            digests.update(data)
        else:
            digests.update(data)
            digests.check()
            yield data


class ContentDigests:
    """Compares a content with the digest that the backend has of it, if any.

    It is computed in the thread that fetches, while each piece is in the processor's cache. This is faster than
    network links are, and handing the pieces to another thread would cost more than it saves.
    """

    def __init__(self, info: ObjectInfo, events: Events):
        self._key = info.key
        self._events = events
        self._binds = info.sha256 is not None or info.md5 is not None
        self._expected = _digest(info)
        self._hash = hashlib.new(self._expected[0], usedforsecurity=False) if self._expected else None

    def update(self, data: bytes | memoryview) -> None:
        """Digest the next piece."""
        if self._hash is not None:
            self._hash.update(data)

    def check(self) -> None:
        """Compare, after the last piece.

        :raises CorruptObject: the digest differs, and is not just another program's word.
        """
        if self._hash is None or self._expected == (self._hash.name, self._hash.digest()):
            return
        if self._binds:
            raise CorruptObject("the backend sent a damaged object", detail=f"{self._hash.name} of {self._key!r}")
        self._events.wrong_digest()
        log.warning("event=wrong_digest key=%r algorithm=%s", self._key, self._hash.name)


def _digest(info: ObjectInfo) -> tuple[str, bytes] | None:
    """hashlib's name of a digest that the backend has of the content, and its value; None: there is none."""
    if info.sha256 is not None:  # MD5 takes twice as long, and proves nothing more
        return "sha256", bytes.fromhex(info.sha256)
    if info.md5 is not None:
        return "md5", info.md5
    return _claimed(info.claimed_digest) if info.claimed_digest is not None else None


def _claimed(digest: tuple[str, str]) -> tuple[str, bytes]:
    name, value = digest
    return name, bytes.fromhex(value)
