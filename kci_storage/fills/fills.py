# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fills of one process, and who may join them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kci_storage.cache.directory import Cache
from kci_storage.drivers.base import Driver, ObjectInfo
from kci_storage.errors import StorageError
from kci_storage.events import Events
from kci_storage.fills.claim import Claim, open_claim
from kci_storage.fills.fill import AlreadyCached, Fill, FillLost
from kci_storage.fills.filler import Filler, FillerParts
from kci_storage.fills.turns import Turns
from kci_storage.net.threads import give_back_memory

log = logging.getLogger(__name__)

WATCH_INTERVAL = 0.005  # seconds between two looks at a part that another process fills
THREADS = 1000  # of one process, for fills that it runs, watches, or has waiting
STOP_SECONDS = 5.0  # for which a process waits for its fills to end


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
        events: Events,
        make_room: Callable[[int], bool],
        *,
        at_once: int,
        queue_size: int,
    ):
        self._parts = FillerParts(driver, cache, events, make_room, Turns(at_once, queue_size))
        self._running: dict[str, Fill] = {}
        # Kept, since to start a thread costs a small file more than to fetch it. A fill that waits has one, too.
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
                fill = Fill(key, self._parts.cache.location(key))
                self._start(fill)
                self._running[key] = fill
            self._parts.turns.check_join(fill)
            fill.join()
            return fill

    def progress(self, key: str) -> tuple[ObjectInfo, int] | None:
        """What any process fetches of a key now, and how many bytes of it are here; None: nothing."""
        location = self._parts.cache.location(key)
        with contextlib.suppress(FileNotFoundError), open_claim(location) as claim:
            info, part = claim.read_living() or (None, location.fill)
            if info is not None and claim.is_current():
                return info, part.stat().st_size
        return None

    def stop(self) -> None:
        """Have the fills end before the process does; a few seconds are enough, unless the backend is silent."""
        self._parts.stopping.set()
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
            give_back_memory(fill.info.size if fill.info is not None else 0)

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
        with Claim.at(fill.location) as claim:
            fill.claim = claim
            if not claim.try_lock() and not self._watch(fill, claim):
                return True
            if claim.is_current():
                Filler(self._parts, fill, claim).run()
                return True
            if fill.info is not None:
                raise FillLost("the object could not be fetched")
            return False

    def _watch(self, fill: Fill, claim: Claim) -> bool:
        """Follow what another process fills; True as soon as that one is gone, and the lock is ours."""
        while not self._parts.stopping.is_set():
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
