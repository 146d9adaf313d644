# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fills of one process: requests join a running one, or begin one."""

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
from kci_storage.net.threads import trim_memory

log = logging.getLogger(__name__)

WATCH_INTERVAL = 0.005  # seconds between two looks at a part that another process fills
MAX_THREADS = 1000  # of one process, for the fills that it runs or watches, and those that wait
STOP_TIMEOUT = 5.0  # seconds that a process waits for its fills to end


class Fills:
    """The fills that the threads of one process follow.

    :param make_room: called with an object's size in bytes; evicts if need be, and returns whether the object fits.
    :param at_once: how many fills this process may run at a time; further ones wait.
    :param queue_size: how many requests may wait for fills that have not begun; further ones are refused at once.
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
        # A pool, since starting a thread takes longer than fetching a small file. A waiting fill has a thread, too.
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="fill")
        self._submitted: set[Future[None]] = set()
        self._mutex = threading.Lock()

    def join(self, key: str) -> Fill:
        """Join the fill of a key, which is begun if there is none. The caller leaves it.

        :raises Overloaded: too many requests wait for fills that have not begun.
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
        """The object that a process of this server fetches now under a key, and how many bytes of it are available.

        :returns: None: no process does, or the backend has not answered yet.
        """
        location = self._parts.cache.location(key)
        with contextlib.suppress(FileNotFoundError), open_claim(location) as claim:
            info, part = claim.read_if_alive() or (None, location.fill)
            if info is not None and claim.is_current():
                return info, part.stat().st_size
        return None

    def stop(self) -> None:
        """End the fills, before the process ends; returns after :data:`STOP_TIMEOUT` seconds at most."""
        self._parts.stopping.set()
        wait(tuple(self._submitted), STOP_TIMEOUT)

    def _start(self, fill: Fill) -> None:
        work = self._threads.submit(self._run, fill)
        self._submitted.add(work)
        work.add_done_callback(self._submitted.discard)

    def _run(self, fill: Fill) -> None:
        error: BaseException | None = None
        try:
            while not self._fill_or_watch(fill):
                pass
        except (StorageError, AlreadyCached) as exc:
            error = exc
        except Exception as exc:
            log.exception("event=fill_crashed")
            error = StorageError("internal error", detail=repr(exc))
        finally:
            self._forget(fill)
            fill.end(error)
            trim_memory(fill.info.size if fill.info is not None else 0)

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

    def _fill_or_watch(self, fill: Fill) -> bool:
        """Fill, or watch another process fill; False: its fill ended before its object was known: try again."""
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
        """Watch another process fill; True: its filler died, and the claim is locked by this thread now."""
        while not self._parts.stopping.is_set():
            self._update(fill, claim)
            if fill.complete or self._forget_if_unfollowed(fill):
                return False
            if claim.try_lock():
                self._update(fill, claim)  # the filler may have written more before its end
                return not fill.complete
            time.sleep(WATCH_INTERVAL)
        return False

    @staticmethod
    def _update(fill: Fill, claim: Claim) -> None:
        if fill.info is None:
            fetched = claim.read_if_alive()
            if fetched is None:
                return
            info, part = fetched
            try:
                fill.open(part)
            except FileNotFoundError:  # the fill has just ended, successfully or not
                return
            fill.begin(info)
        fill.update()
