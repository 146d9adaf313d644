# SPDX-License-Identifier: LGPL-2.1-or-later
"""The content of an object, open for reading: a local file, a running fill, or a read from the backend."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator

from kci_storage.drivers.base import Driver, ObjectInfo, ObjectReader
from kci_storage.errors import (
    BackendError,
    InsufficientStorage,
    ObjectChanged,
    ObjectNotFound,
    Overloaded,
    StorageError,
)
from kci_storage.events import CacheStatus, Events
from kci_storage.fills.fill import AlreadyCached, Fill, Region
from kci_storage.fills.fills import Fills
from kci_storage.fills.resuming import resumed, verified
from kci_storage.http.ranges import ByteRange

FOLLOW_AHEAD = 1024 * 1024  # bytes; a range that begins at most this far ahead of a running fill follows it


class Content(ABC):
    """One version of an object, open for reading. The caller closes it."""

    info: ObjectInfo
    status: CacheStatus

    @abstractmethod
    def segments(self, start: int, stop: int) -> Iterator[bytes | Region]:
        """The bytes from ``start`` up to, not including, ``stop``: regions of a file where possible, else bytes.

        :returns: all of them; a read that ends early raises.
        :raises ObjectChanged: the version is gone. Before the first byte: the caller opens the object again.
        :raises StorageError: they cannot be read.
        """

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """As :meth:`segments`, but everything as bytes."""
        for segment in self.segments(start, stop):
            if isinstance(segment, bytes):
                yield segment
            else:
                yield from segment.read()

    @abstractmethod
    def close(self) -> None:
        """Release files and connections. Idempotent."""


class FileContent(Content):
    """A complete file on this machine.

    :param fd: the open file; closed with the content.
    :param path: its path in the cache; None: an object of the local driver.
    """

    def __init__(self, info: ObjectInfo, status: CacheStatus, fd: int, path: str | None):
        self.info = info
        self.status = status
        self.fd = fd
        self.path = path

    def segments(self, start: int, stop: int) -> Iterator[Region]:
        yield Region(self.fd, start, stop)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FilledContent(Content):
    """An object that is being fetched into the cache.

    :param fill: joined by the caller; left when the content is closed.
    """

    status = CacheStatus.MISS

    def __init__(self, driver: Driver, info: ObjectInfo, fill: Fill, events: Events):
        self.info = info
        self._driver = driver
        self._events = events
        self._fill: Fill | None = fill

    def segments(self, start: int, stop: int) -> Iterator[bytes | Region]:
        assert self._fill is not None
        position = start
        try:
            for region in self._fill.regions(start, stop):
                position = region.stop
                yield region
        except (BackendError, ObjectNotFound):
            raise
        except StorageError:
            # A full disk or a filler that died ends the fill, but the download can go on from the backend.
            self._events.uncached()
            pieces = resumed(self._driver, self.info, position, stop, begun=position > start)
            whole = stop - start == self.info.size
            if whole:
                pieces = verified(self.info, pieces, self._events, self._fill.read(0, position))
            yield from map(bytes, pieces)

    def close(self) -> None:
        if self._fill is not None:
            self._fill.leave()
            self._fill = None


class RemoteContent(Content):
    """An object whose properties are known and whose bytes are in the backend; maybe only a range is needed.

    :param fills: None: the cache has no room for it.
    :param wait_timeout: seconds to wait for a fill to begin.
    :param begun: a range and the open read of it; closed with the content.
    """

    status = CacheStatus.MISS

    def __init__(
        self,
        driver: Driver,
        fills: Fills | None,
        info: ObjectInfo,
        events: Events,
        wait_timeout: float,
        begun: tuple[ByteRange, ObjectReader] | None = None,
    ):
        self.info = info
        self._begun = begun
        self._driver = driver
        self._events = events
        self._fills = fills
        self._wait_timeout = wait_timeout
        self._followed: list[FilledContent] = []

    def segments(self, start: int, stop: int) -> Iterator[bytes | Region]:
        if self._begun is not None and not self._wants_most(start, stop) and self._begun[0].start == start:
            return map(bytes, resumed(self._driver, self.info, start, stop, self._begun[1]))
        content = self._to_follow(self._fills, start, stop) if self._fills is not None else None
        if content is not None:
            self._followed.append(content)
            return content.segments(start, stop)
        pieces = resumed(self._driver, self.info, start, stop)
        return map(bytes, verified(self.info, pieces, self._events) if stop - start == self.info.size else pieces)

    def _wants_most(self, start: int, stop: int) -> bool:
        return 2 * (stop - start) >= self.info.size

    def _to_follow(self, fills: Fills, start: int, stop: int) -> FilledContent | None:
        """The running fill if it soon reaches ``start``, or a new one if most of the object is wanted; else None.

        A smaller range, such as that of a crawler that reads the end of every image, starts no fill.
        """
        wants_most = self._wants_most(start, stop)
        running, available = fills.progress(self.info.key) or (None, 0)
        if start > available + FOLLOW_AHEAD:
            if wants_most:
                with contextlib.suppress(Overloaded):
                    fills.join(self.info.key).leave()
            return None
        if wants_most or (running is not None and running.etag == self.info.etag):
            return self._follow(fills.join(self.info.key))
        return None

    def _follow(self, fill: Fill) -> FilledContent | None:
        try:
            if fill.wait_for_info(self._wait_timeout).etag == self.info.etag:
                return FilledContent(self._driver, self.info, fill, self._events)
        except AlreadyCached:
            fill.leave()
            raise ObjectChanged("the file has just been fetched") from None  # the caller looks again, and finds it
        except InsufficientStorage:
            self._events.uncached()
        except BaseException:
            fill.leave()
            raise
        fill.leave()
        return None

    def close(self) -> None:
        if self._begun is not None:
            self._begun[1].close()
        while self._followed:
            self._followed.pop().close()
