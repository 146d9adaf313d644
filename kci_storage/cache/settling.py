# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending the doubt about a key: which version the backend has after a change whose answer was lost.

Such a change may have been carried out, or the backend may still do so. Until that is impossible, no earlier answer
of the backend counts: each reader asks. It becomes impossible when the version that the change would replace is
gone: by the next acknowledged change, or by a fence (:meth:`.Driver.fence`). Else it has to be outwaited.
"""

from __future__ import annotations

import contextlib
import logging
import time

from kci_storage import logfmt
from kci_storage.cache.directory import Cache
from kci_storage.drivers.base import Driver, ObjectInfo
from kci_storage.errors import InsufficientStorage, ObjectNotFound, StorageError

log = logging.getLogger(__name__)


class Settler:
    """Ends the doubts about the keys of one cache."""

    def __init__(self, driver: Driver, cache: Cache):
        self._driver = driver
        self._cache = cache

    def settle(self, key: str) -> ObjectInfo:
        """Ask which version the backend has now, and end the doubt if possible.

        A copy of another version is removed. While a writer holds the key's lock, the doubt stays.

        :raises ObjectNotFound: the backend has no such object.
        :raises StorageError: the backend did not say.
        """
        with contextlib.ExitStack() as stack:
            free = False
            with contextlib.suppress(InsufficientStorage):  # there is no room for a lock: then nothing is recorded
                free = stack.enter_context(self._cache.writing_if_free(key))
            asked = time.time()
            try:
                found = self._driver.stat(key)
            except ObjectNotFound:
                if free:
                    self._cache.forget(key)
                raise
            if not free:
                return found
            renewed = self._fence(found) if self._cache.doubt_of(key).concerns(found.etag, asked) else found
            if renewed is None:
                return found
            self._cache.settle(found, renewed, asked)
            return renewed

    def _fence(self, found: ObjectInfo) -> ObjectInfo | None:
        """The version with its new ETag; None: it could not be fenced."""
        with contextlib.suppress(StorageError):  # the backend's answer to the question is good all the same
            renewed = self._driver.fence(found.key, found.etag)
            if renewed is not None:
                log.info(logfmt.line(event="fenced", key=found.key, etag=renewed.etag))
            return renewed
        return None
