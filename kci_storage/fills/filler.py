# SPDX-License-Identifier: LGPL-2.1-or-later
"""The filler: the one thread, over all workers, that fetches an object and publishes it in the cache."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import Record, new_record
from kci_storage.drivers.base import Driver, ObjectReader
from kci_storage.errors import CorruptObject, InsufficientStorage
from kci_storage.events import Events
from kci_storage.files import durable
from kci_storage.fills.claim import Claim
from kci_storage.fills.fill import AlreadyCached, Fill, FillLost
from kci_storage.fills.resuming import LARGE_BUFFER_SIZE, resumed, verified
from kci_storage.fills.turns import Turns

LARGE_OBJECT = 4 * 1024 * 1024  # bytes from which on disk space is reserved; for less that costs more than it saves


@dataclass(frozen=True)
class FillerParts:
    """What the fillers of one process share.

    :param make_room: called with an object's size in bytes; evicts if need be, and returns whether the object fits.
    :param stopping: set when the process stops.
    """

    driver: Driver
    cache: Cache
    events: Events
    make_room: Callable[[int], bool]
    turns: Turns
    stopping: threading.Event = field(default_factory=threading.Event)


class Filler:
    """Fetches an object, in the thread that holds the claim's lock."""

    def __init__(self, parts: FillerParts, fill: Fill, claim: Claim):
        self._parts = parts
        self._driver, self._cache = parts.driver, parts.cache
        self._fill = fill
        self._claim = claim

    def run(self) -> None:
        """Fetch the object and publish it.

        :raises StorageError: it cannot be fetched, or cannot be stored in the cache.
        :raises AlreadyCached: there is a copy.
        """
        try:
            with self._parts.turns.take(self._fill):
                if self._fill.info is None:
                    self._check_not_cached()
                with self._parts.events.filling():
                    self._fetch()
        finally:
            self._claim.withdraw()

    def _fetch(self) -> None:
        if self._fill.info is None:
            self._begin()
        else:
            self._resume()

    def _check_not_cached(self) -> None:
        entry = self._cache.lookup(self._fill.key)
        if entry is not None:
            os.close(entry.fd)
            if not entry.record.doubtful:
                raise AlreadyCached

    def _begin(self) -> None:
        """Fetch from the beginning, even if a dead filler left a part that this process has not followed.

        Such a part may be from long ago, or from before a loss of power.
        """
        self._remove_leftover()
        with self._driver.read(self._fill.key) as reader:
            self._fill.begin(reader.info)
            record = new_record(reader.info)
            with self._new_part(record) as part:
                self._fill.open(part.path)
                self._claim.write(record)
                self._complete(part, record, reader)

    def _remove_leftover(self) -> None:
        record = self._claim.read()
        if record is not None:
            durable.remove_if_unlocked(self._claim.part(record))

    def _new_part(self, record: Record) -> durable.NewFile:
        if not self._parts.make_room(record.info.size):
            raise InsufficientStorage("the object does not fit into the cache")
        return self._cache.new_part(record.info.key, record.generation)

    def _resume(self) -> None:
        """Resume a fill that this process has followed until its filler died."""
        record = self._claim.read()
        part = durable.NewFile.take_over(self._claim.part(record)) if record is not None else None
        if record is None or part is None:
            raise FillLost("the object could not be fetched")
        with part:
            if not self._fill.follows(part):  # another filler began again meanwhile, and died too
                raise FillLost("the object could not be fetched")
            self._fill.update()
            self._complete(part, record, None)

    def _complete(self, part: durable.NewFile, record: Record, reader: ObjectReader | None) -> None:
        """Fetch what the part still lacks, through interruptions, and publish it."""
        info, begun = record.info, part.size > 0
        pieces = resumed(self._driver, info, part.size, info.size, reader, begun, LARGE_BUFFER_SIZE)
        try:
            for data in verified(info, pieces, self._parts.events, before=self._fill.read(0, part.size)):
                self._append(part, data, info.size)
        except CorruptObject:
            part.truncate()
            raise
        self._publish(part, record)

    def _append(self, part: durable.NewFile, data: memoryview, size: int) -> None:
        if self._parts.stopping.is_set():
            raise FillLost("the server is stopping")
        before = part.size
        try:
            part.write(data)
        except InsufficientStorage:
            if not self._parts.make_room(size - part.size):
                raise
            part.write(data[part.size - before :])
        self._fill.advance(part.size)
        if before == 0 and size >= LARGE_OBJECT:  # after the first bytes, which followers wait for
            part.reserve(size)

    def _publish(self, part: durable.NewFile, record: Record) -> None:
        """Make the part the cache's copy, unless the key is locked, was changed meanwhile, or is in doubt."""
        key, etag = record.info.key, record.info.etag
        with self._cache.writing_if_free(key) as free:
            if free and self._claim.is_current() and not self._cache.doubt_of(key).concerns(etag, time.time()):
                self._cache.publish_filled(part, record, self._claim.file())
