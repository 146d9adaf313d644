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

import contextlib
import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kci_storage.cache.directory import Cache, Record, Slot, new_record
from kci_storage.drivers.base import Driver, ObjectInfo, ObjectReader
from kci_storage.errors import CorruptObject, InsufficientStorage, Overloaded, StorageError
from kci_storage.files import durable
from kci_storage.fills.resuming import LARGE_BUFFER_SIZE, resumed, verified
from kci_storage.net import memory, slots

if TYPE_CHECKING:
    from kci_storage.monitoring.metrics import Metrics

log = logging.getLogger(__name__)

READ_SIZE = 256 * 1024  # bytes read from a part at a time
LARGE_OBJECT = 4 * 1024 * 1024  # bytes, for which room is reserved; of a small one that costs more than it saves
WATCH_INTERVAL = 0.005  # seconds between two looks at a part that another process fills
THREADS = 1000  # of one process, for fills that it runs, watches, or has waiting
STOP_SECONDS = 5.0  # for which a process waits for its fills to end
MOMENT = 0.05  # seconds for which a follower waits at its place: to give that away and take it back costs something
SLOT_INTERVAL = 1.0  # seconds between two looks whether anybody still waits for a fill that may not begin yet


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


class Claim:
    """The file whose lock says who fetches an object. Closed at the end of its block, and thereby unlocked.

    :param fd: the file, opened; closed with the claim.
    """

    def __init__(self, slot: Slot, fd: int):
        self._slot = slot
        self._fd = fd
        self._status = os.fstat(fd)

    @classmethod
    def at(cls, slot: Slot) -> Claim:
        """The claim that is there, or a new one.

        :raises InsufficientStorage: it cannot be made.
        """
        return cls(slot, durable.open_lock_file(slot.fill))

    def try_lock(self) -> bool:
        """Lock it if it is free now; whether that worked."""
        return durable.try_lock(self._fd)

    def is_current(self) -> bool:
        """Whether newcomers still find it."""
        try:
            return os.path.samestat(self._status, os.stat(self._slot.fill))
        except FileNotFoundError:
            return False

    def read(self) -> Record | None:
        """What is fetched; None when nobody knows yet."""
        with contextlib.suppress(ValueError):
            return Record.from_json(os.pread(self._fd, os.fstat(self._fd).st_size, 0))
        return None

    def write(self, record: Record) -> None:
        """Tell the others what is fetched.

        :raises InsufficientStorage: the disk is full.
        """
        durable.write_lock_file(self._fd, record.to_json())

    def file(self) -> durable.NewFile:
        """What was written, to become the cache's record. It is closed with the claim."""
        return durable.NewFile(self._slot.fill, self._fd)

    def part(self, record: Record) -> Path:
        """The path of the part file."""
        return self._slot.part(record.generation)

    def read_living(self) -> tuple[ObjectInfo, Path] | None:
        """What is fetched, and where to; None also when that was written by a filler that died."""
        record = self.read()
        if record is None or not durable.is_locked(self.part(record)):
            return None
        return record.info, self.part(record)

    def withdraw(self) -> None:
        """Take it from its path. The caller holds its lock."""
        if self.is_current():
            durable.remove(self._slot.fill)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._fd)


class Fill:
    """An object on its way in as the threads of one process see it, whichever process fetches it.

    Whoever joins it leaves it (:meth:`leave`).
    """

    def __init__(self, key: str, slot: Slot):
        self.key = key
        self.slot = slot
        self.claim: Claim | None = None
        self.info: ObjectInfo | None = None  # None until the backend has answered
        self.available = 0  # bytes
        self.followers = 0
        self.queued = False  # whether it waits until it may begin
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
        """Wait for a change; after a moment, without the thread's place. The caller holds the mutex."""
        if timeout is not None and timeout <= MOMENT:
            self._changed.wait_for(condition, timeout)
        elif not self._changed.wait_for(condition, MOMENT):
            with slots.released(bounded=False):
                self._changed.wait_for(condition, timeout and timeout - MOMENT)

    def _why(self) -> BaseException | None:
        return copy.copy(self._error)  # each thread gets one of its own, since raising it changes it

    def is_revoked(self) -> bool:
        """Whether what it brings may be older than what a newcomer must get."""
        return self.claim is not None and not self.claim.is_current()


class Fills:
    """The fills that the threads of one process take part in.

    :param make_room: called with a number of bytes before a fill; it evicts, and says whether they fit.
    :param at_once: how many fills this process may run; further ones wait.
    :param queue_size: how many requests may wait for those; further ones are refused at once.
    """

    def __init__(
        self,
        driver: Driver,
        cache: Cache,
        metrics: Metrics,
        make_room: Callable[[int], bool],
        *,
        at_once: int,
        queue_size: int,
    ):
        self.driver = driver
        self.cache = cache
        self.metrics = metrics
        self.make_room = make_room
        self._slots = threading.BoundedSemaphore(at_once)
        self._queue_size = queue_size
        self.stopping = False
        self._running: dict[str, Fill] = {}
        # Kept, since to start a thread costs a small file more than to fetch it. Who waits for his turn has one, too.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="fill")
        self._at_work: set[Future[None]] = set()
        self._mutex = threading.Lock()

    def join(self, key: str) -> Fill:
        """The fill of a key, begun if there is none; the caller leaves it.

        :raises Overloaded: too many wait for one to begin.
        """
        with self._mutex:
            fill = self._running.get(key)
            if fill is None or fill.is_revoked():
                fill = Fill(key, self.cache.slot(key))
                self._start(fill)
                self._running[key] = fill
            if fill.queued and self._waiting() >= self._queue_size:
                raise _overloaded()
            fill.join()
            return fill

    def progress(self, key: str) -> tuple[ObjectInfo, int] | None:
        """What any process fetches of a key now, and how many bytes of it are here; None: nothing."""
        slot = self.cache.slot(key)
        with contextlib.suppress(FileNotFoundError), _opened(slot) as claim:
            info, part = claim.read_living() or (None, slot.fill)
            if info is not None and claim.is_current():
                return info, part.stat().st_size
        return None

    def stop(self) -> None:
        """Have the fills end before the process does; a few seconds are enough, unless the backend is silent."""
        self.stopping = True
        wait(tuple(self._at_work), STOP_SECONDS)

    def _start(self, fill: Fill) -> None:
        work = self._threads.submit(self._run, fill)
        self._at_work.add(work)
        work.add_done_callback(self._at_work.discard)

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
            memory.give_back(fill.info.size if fill.info is not None else 0)

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
        """Fill, or watch another process fill; False when that ended before anybody here knew what it was."""
        with Claim.at(fill.slot) as claim:
            fill.claim = claim
            if not claim.try_lock() and not self._watch(fill, claim):
                return True
            if claim.is_current():
                Filler(self, fill, claim).run()
                return True
            if fill.info is not None:
                raise FillLost("the object could not be fetched")
            return False

    def _watch(self, fill: Fill, claim: Claim) -> bool:
        """Follow what another process fills; True as soon as that one is gone, and the lock is ours."""
        while not self.stopping:
            self._look(fill, claim)
            if fill.complete or self._forget_if_unfollowed(fill):
                return False
            if claim.try_lock():
                self._look(fill, claim)  # at what its filler did between the look and its end
                return not fill.complete
            time.sleep(WATCH_INTERVAL)
        return False

    @staticmethod
    def _look(fill: Fill, claim: Claim) -> None:
        if fill.info is None:
            living = claim.read_living()
            if living is None:
                return
            info, part = living
            try:
                fill.open(part)
            except FileNotFoundError:  # it has just ended, well or not
                return
            fill.begin(info)
        fill.look()

    @contextlib.contextmanager
    def slot(self, fill: Fill) -> Iterator[None]:
        """One of the fills that may run at once, as soon as there is one.

        :raises Overloaded: too many wait, or nobody any more.
        """
        if not self._slots.acquire(blocking=False):
            self._queue(fill)
        try:
            yield
        finally:
            self._slots.release()

    def _queue(self, fill: Fill) -> None:
        with self._mutex:
            fill.queued = True
            if self._waiting() > self._queue_size:
                raise _overloaded()
        while not self._slots.acquire(timeout=SLOT_INTERVAL):
            if fill.followers == 0:
                raise _overloaded()
        fill.queued = False

    def _waiting(self) -> int:
        return sum(fill.followers for fill in self._running.values() if fill.queued)


def _opened(slot: Slot) -> Claim:
    """The claim that is there, to be read.

    :raises FileNotFoundError: there is none.
    """
    return Claim(slot, os.open(slot.fill, os.O_RDONLY | os.O_CLOEXEC))


def _overloaded() -> Overloaded:
    return Overloaded("too many files are being fetched; try later", retry_after=5)


class Filler:
    """The one who fetches: made by the thread that holds the claim's lock."""

    def __init__(self, fills: Fills, fill: Fill, claim: Claim):
        self._fills = fills
        self._driver, self._cache = fills.driver, fills.cache
        self._fill = fill
        self._claim = claim

    def run(self) -> None:
        """Fetch the object and publish it.

        :raises StorageError: it cannot be had, or cannot be kept.
        :raises AlreadyCached: there is a copy.
        """
        try:
            with self._fills.slot(self._fill):
                if self._fill.info is None:
                    self._look_again()
                with self._fills.metrics.filling():
                    self._fetch()
        finally:
            self._claim.withdraw()

    def _fetch(self) -> None:
        if self._fill.info is None:
            self._begin()
        else:
            self._carry_on()

    def _look_again(self) -> None:
        entry = self._cache.lookup(self._fill.key)
        if entry is not None:
            os.close(entry.fd)
            if not entry.record.doubtful:
                raise AlreadyCached

    def _begin(self) -> None:
        """Fetch from the beginning; also where a filler died that nobody here has followed.

        What that one has left may be from long ago, or from before a loss of power.
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
        if not self._fills.make_room(record.info.size):
            raise InsufficientStorage("the object does not fit into the cache")
        return self._cache.new_part(record.info.key, record.generation)

    def _carry_on(self) -> None:
        """Take up what this process has followed until its filler died."""
        record = self._claim.read()
        part = durable.NewFile.take_over(self._claim.part(record)) if record is not None else None
        if record is None or part is None:
            raise FillLost("the object could not be fetched")
        with part:
            if not self._fill.follows(part):  # somebody else began anew meanwhile, and died as well
                raise FillLost("the object could not be fetched")
            self._fill.look()
            self._complete(part, record, None)

    def _complete(self, part: durable.NewFile, record: Record, reader: ObjectReader | None) -> None:
        """Bring the part to its full length, through interruptions, and publish it."""
        info, begun = record.info, part.size > 0
        pieces = resumed(self._driver, info, part.size, info.size, reader, begun, LARGE_BUFFER_SIZE)
        try:
            for data in verified(info, pieces, before=self._fill.read(0, part.size)):
                self._append(part, data, info.size)
        except CorruptObject:
            part.truncate()
            raise
        self._publish(part, record)

    def _append(self, part: durable.NewFile, data: memoryview, size: int) -> None:
        if self._fills.stopping:
            raise FillLost("the server is stopping")
        before = part.size
        try:
            part.write(data)
        except InsufficientStorage:
            if not self._fills.make_room(size - part.size):
                raise
            part.write(data[part.size - before :])
        self._fill.advance(part.size)
        if before == 0 and size >= LARGE_OBJECT:  # now, since the first bytes wait for nothing
            part.reserve(size)

    def _publish(self, part: durable.NewFile, record: Record) -> None:
        """Make the part the cache's copy, unless a writer is at work on the key or came in between."""
        with self._cache.writing_if_free(record.info.key) as free:
            if free and self._claim.is_current():
                self._cache.publish_filled(part, record, self._claim.file())
