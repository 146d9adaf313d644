# SPDX-License-Identifier: LGPL-2.1-or-later
"""A change of an object by the driver, seen from the cache: when it fails, the key may be in doubt."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from kci_storage.cache.directory import Cache
from kci_storage.cache.doubt import LANDING_SECONDS
from kci_storage.errors import (
    BackendError,
    KeyConflict,
    ObjectNotFound,
    OutcomeUnknown,
    PreconditionFailed,
    WriteConflict,
)
from kci_storage.store.negative_cache import NegativeCache

UNCHANGED = PreconditionFailed, KeyConflict, WriteConflict, ObjectNotFound  # errors after which no reader need ask


@contextlib.contextmanager
def changing(cache: Cache, negative_cache: NegativeCache, key: str, expected: str | None) -> Iterator[None]:
    """The driver commits or deletes during the block. The caller holds the key's lock.

    If it may have done so although the block fails, the key is in doubt, for as long as it may still do so.

    :param expected: the ETag of the version that the change requires; None: it requires that there is none.
    """
    cache.announce_commit(key)
    try:
        yield
    except UNCHANGED:
        raise
    except BaseException as exc:
        cache.doubt(key, expected, _lands_until(exc))
        negative_cache.changed(key)
        raise


def _lands_until(exc: BaseException) -> float:
    """Until when the change may be carried out, in seconds since the epoch."""
    if isinstance(exc, OutcomeUnknown):
        return exc.lands_until
    if isinstance(exc, BackendError):
        return 0  # it failed; to be on the safe side, the next reader asks once
    return time.time() + LANDING_SECONDS
