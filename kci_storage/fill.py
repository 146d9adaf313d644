"""Bringing a cold object into the cache, while everybody who asked for it reads along.

Over all workers, one thread fetches: the *filler*, whose process holds the lock of the key's part file. It appends
what the backend sends; everybody else, in whatever process, *follows* the growing file. What the object is stands in
a small record beside the part, published before the part's first byte.

A part says by itself how it fares, so that a follower needs nothing but the file it has open:

- its size is the object's: complete, and verified. The last piece is only written when the digests are right.
- it is locked: somebody is at work on it.
- it is not locked, and its path still leads to it: its filler died. Whoever locks it now carries on from its length.
- it is not locked, and not at its path: given up. Who has a part of it may read the rest from the backend.
- it is shorter than it was: its content is wrong. Who has a part of it must be cut.

An upload or deletion that is committed meanwhile unlinks the part (:meth:`~kci_storage.cache.Cache.revoke_fill`):
those who follow it still get the version they were promised, but it is never published.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kci_storage import durable
from kci_storage.cache import Cache, Slot
from kci_storage.drivers.base import Driver, ObjectInfo
from kci_storage.errors import (
    BackendError,
    InsufficientStorage,
    ObjectChanged,
    ObjectNotFound,
    Overloaded,
    StorageError,
)

if TYPE_CHECKING:
    from kci_storage.metrics import Metrics

log = logging.getLogger(__name__)

READ_SIZE = 256 * 1024  # bytes read from a part at a time
WATCH_INTERVAL = 0.005  # seconds between two looks at a part that another process fills
SLOT_INTERVAL = 1.0  # seconds between two looks whether anybody still waits for a fill that may not begin yet
RESUME_FOR = 60  # seconds without a byte after which a fill gives up
FIRST_BACKOFF, LONGEST_BACKOFF = 0.2, 5.0  # seconds between two tries of a fill


class CorruptObject(BackendError):
    """The backend's content is not what its own digest or length says."""


class AlreadyCached(Exception):
    """The object was published between the look that missed it and the lock: look again."""


class Fill:
    """A part file as the threads of one process see it, whoever fills it.

    Whoever joins it leaves it (:meth:`leave`).
    """

    def __init__(self, key: str, slot: Slot):
        self.key = key
        self.slot = slot
        self.info: ObjectInfo | None = None  # None until the backend has answered
        self.available = 0  # bytes
        self.followers = 0
        self._error: BaseException | None = None  # why it ended early
        self._ended = False
        self._fd = -1
        self._changed = threading.Condition()

    # For the thread that fills or watches

    def begin(self, info: ObjectInfo, fd: int) -> None:
        """The backend has answered: followers may start.

        :param fd: the part, which is read through a descriptor of the fill's own, without its lock.
        """
        reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        with self._changed:
            self.info, self._fd = info, reading
            self._changed.notify_all()

    def advance(self, available: int) -> None:
        """The part has so many bytes now.

        :raises CorruptObject: they are fewer than before, which is how a filler says that they were wrong.
        """
        if available < self.available:
            raise CorruptObject("the backend sent a damaged object")
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
            self._changed.wait_for(lambda: self.info is not None or self._ended, timeout)
            if self.info is not None:
                return self.info
            if self._ended:
                raise self._error or AlreadyCached
        raise Overloaded("the backend has not answered for a while; try later", retry_after=5)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop``, as they arrive.

        :raises StorageError: why the fill ended before ``stop``.
        """
        position = start
        while position < stop:
            available = min(self._wait_beyond(position), stop)
            while position < available:
                data = os.pread(self._fd, min(READ_SIZE, available - position), position)
                if not data:
                    raise CorruptObject("the backend sent a damaged object")
                position += len(data)
                yield data

    def _wait_beyond(self, position: int) -> int:
        """How many bytes there are, as soon as it is more than ``position``."""
        with self._changed:
            self._changed.wait_for(lambda: self.available > position or self._ended)
            if self.available > position and not isinstance(self._error, CorruptObject):
                return self.available
            raise self._error or BackendError("the object could not be fetched")

    def is_revoked(self) -> bool:
        """Whether the part is no longer what a newcomer should follow."""
        return self._ended or (self._fd >= 0 and not durable.is_file_at(self._fd, self.slot.fill))


class Fills:
    """The fills that the threads of one process take part in.

    :param make_room: called with a number of bytes before a fill; it evicts, and says whether they fit.
    :param at_once: how many fills this process may run; further ones wait.
    """

    def __init__(
        self, driver: Driver, cache: Cache, metrics: Metrics, make_room: Callable[[int], bool], at_once: int
    ):
        self.driver = driver
        self.cache = cache
        self.metrics = metrics
        self.make_room = make_room
        self.slots = threading.BoundedSemaphore(at_once)
        self._running: dict[str, Fill] = {}
        self._mutex = threading.Lock()

    def join(self, key: str) -> Fill:
        """The fill of a key, begun if there is none; the caller leaves it."""
        with self._mutex:
            fill = self._running.get(key)
            if fill is None or fill.is_revoked():
                fill = self._running[key] = Fill(key, self.cache.slot(key))
                threading.Thread(target=self._run, args=(fill,), name="fill", daemon=True).start()
            fill.join()
            return fill

    def join_running(self, key: str) -> Fill | None:
        """The fill of a key if this process takes part in one; the caller leaves it."""
        with self._mutex:
            fill = self._running.get(key)
            if fill is None or fill.is_revoked():
                return None
            fill.join()
            return fill

    def _run(self, fill: Fill) -> None:
        error: BaseException | None = None
        try:
            while not self._take_part(fill):
                pass
        except (StorageError, AlreadyCached) as exc:
            error = exc
        except Exception as exc:
            log.exception("event=fill_crashed")
            error = StorageError("internal error", detail=repr(exc))
        finally:
            self._forget(fill)
            fill.end(error)

    def _forget(self, fill: Fill) -> None:
        with self._mutex:
            if self._running.get(fill.key) is fill:
                del self._running[fill.key]

    def _forget_if_unfollowed(self, fill: Fill) -> bool:
        with self._mutex:
            if fill.followers:
                return False
            if self._running.get(fill.key) is fill:
                del self._running[fill.key]
            return True

    def _take_part(self, fill: Fill) -> bool:
        """Fill, or watch another process fill; False when the part is gone before anybody knew what it was."""
        fd = durable.open_lock_file(fill.slot.fill)
        try:
            if not durable.try_lock(fd) and not self._watch(fill, fd):
                return True
            if durable.is_file_at(fd, fill.slot.fill):
                Filler(self, fill, durable.NewFile(fill.slot.fill, os.dup(fd))).run()
                return True
            if fill.info is not None:
                raise BackendError("the object could not be fetched", detail="its filler gave up")
            return False
        finally:
            os.close(fd)

    def _watch(self, fill: Fill, fd: int) -> bool:
        """Follow a part that another process fills; True as soon as that one is gone, and the lock is ours."""
        while True:
            self._look(fill, fd)
            if fill.complete or self._forget_if_unfollowed(fill):
                return False
            if durable.try_lock(fd):
                self._look(fill, fd)  # at what its filler did between the look and its end
                return not fill.complete
            time.sleep(WATCH_INTERVAL)

    @staticmethod
    def _look(fill: Fill, fd: int) -> None:
        status = os.fstat(fd)
        if fill.info is None:
            info = read_fill_record(fill.slot, status.st_ino)
            if info is None:
                return
            fill.begin(info, fd)
        fill.advance(status.st_size)


class Filler:
    """The one who fetches: made by the thread that holds the part's lock.

    :param part: the part file, maybe with what a filler that died has left in it.
    """

    def __init__(self, fills: Fills, fill: Fill, part: durable.NewFile):
        self._driver, self._cache, self._metrics = fills.driver, fills.cache, fills.metrics
        self._make_room = fills.make_room
        self._slots = fills.slots
        self._fill = fill
        self._part = part
        self._record = fill.slot.fill_record(os.fstat(part.fileno()).st_ino)
        self._verifier: Verifier | None = None

    def run(self) -> None:
        """Fetch the object and publish it.

        :raises StorageError: it cannot be had.
        :raises AlreadyCached: there is a copy.
        """
        with self._part, self._slot(), self._metrics.filling():
            try:
                self._resume()
                self._fetch()
                self._publish()
            except CorruptObject:
                os.ftruncate(self._part.fileno(), 0)
                raise
            finally:
                durable.remove(self._record)  # before the part, so that its inode is never another part's by then

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One of the fills that may run at once; its followers give up waiting by themselves."""
        while not self._slots.acquire(timeout=SLOT_INTERVAL):
            if self._fill.followers == 0:
                raise Overloaded("too many files are being fetched; try later", retry_after=5)
        try:
            yield
        finally:
            self._slots.release()

    def _resume(self) -> None:
        """Take up what a filler that died has left."""
        info = read_fill_record(self._fill.slot, os.fstat(self._part.fileno()).st_ino)
        if self._part.size and info is None:
            raise BackendError("the object could not be fetched", detail="a part file without a record")
        if self._part.size and info is not None:
            self._verifier = Verifier(info)
            for start in range(0, self._part.size, READ_SIZE):
                self._verifier.update(os.pread(self._part.fileno(), READ_SIZE, start))
            if self._fill.info is None:
                self._fill.begin(info, self._part.fileno())
            self._fill.advance(self._part.size)

    def _fetch(self) -> None:
        """Bring the part to its full length, through interruptions."""
        gives_up_at, backoff = time.monotonic() + RESUME_FOR, FIRST_BACKOFF
        while not self._fill.complete:
            arrived = self._part.size
            try:
                self._fetch_rest()
            except (CorruptObject, ObjectChanged, ObjectNotFound):
                raise
            except BackendError as exc:
                if self._part.size > arrived:
                    gives_up_at, backoff = time.monotonic() + RESUME_FOR, FIRST_BACKOFF
                if self._fill.info is None or time.monotonic() + backoff > gives_up_at:
                    raise
                log.warning("event=fill_interrupted position=%d error=%s", self._part.size, type(exc).__name__)
                time.sleep(backoff)
                backoff = min(2 * backoff, LONGEST_BACKOFF)

    def _fetch_rest(self) -> None:
        if self._fill.info is None:
            self._look_again()
        etag = self._fill.info.etag if self._fill.info else None
        with self._driver.read(self._fill.key, start=self._part.size, etag=etag) as reader:
            if self._verifier is None:
                self._begin(reader.info)
            for data in reader:
                self._append(data, reader.info.size)

    def _look_again(self) -> None:
        entry = self._cache.lookup(self._fill.key)
        if entry is not None:
            os.close(entry.fd)
            if not entry.record.doubtful:
                raise AlreadyCached

    def _begin(self, info: ObjectInfo) -> None:
        self._verifier = Verifier(info)
        fits = self._make_room(info.size)
        if fits:
            durable.write_file(self._record, json.dumps(info.to_fields()).encode())
        self._fill.begin(info, self._part.fileno())
        if not fits:
            raise InsufficientStorage("the object does not fit into the cache")

    def _append(self, data: bytes, size: int) -> None:
        assert self._verifier is not None
        self._verifier.update(data)
        if self._part.size + len(data) == size:
            self._verifier.check()  # before anybody gets the last piece of something wrong
        self._part.write(data)
        self._fill.advance(self._part.size)

    def _publish(self) -> None:
        """Make the part the cache's copy, unless a writer is at work on the key or came in between."""
        assert self._fill.info is not None
        with self._cache.writing_if_free(self._fill.key) as free:
            if free and durable.is_file_at(self._part.fileno(), self._fill.slot.fill):
                self._cache.publish(self._part, self._fill.info)


class Verifier:
    """Checks a content against the digests that the backend has for it, as it passes."""

    def __init__(self, info: ObjectInfo):
        self._info = info
        self._sha256 = hashlib.sha256() if info.sha256 else None
        # MD5 is half as fast, and says nothing that SHA-256 does not.
        self._md5 = hashlib.md5(usedforsecurity=False) if info.md5 and not info.sha256 else None

    def update(self, data: bytes) -> None:
        """Take the next piece in."""
        for digest in (self._sha256, self._md5):
            if digest is not None:
                digest.update(data)

    def check(self) -> None:
        """Compare, at the end.

        :raises CorruptObject: the content is wrong.
        """
        if self._sha256 is not None and self._sha256.hexdigest() != self._info.sha256:
            raise CorruptObject("the backend sent a damaged object", detail=f"SHA-256 of {self._info.key!r}")
        if self._md5 is not None and self._md5.digest() != self._info.md5:
            raise CorruptObject("the backend sent a damaged object", detail=f"MD5 of {self._info.key!r}")


def read_fill_record(slot: Slot, inode: int) -> ObjectInfo | None:
    """What the part that is this inode is going to be; None when nobody knows yet."""
    with contextlib.suppress(FileNotFoundError):
        return ObjectInfo.from_fields(json.loads(slot.fill_record(inode).read_bytes()))
    return None
