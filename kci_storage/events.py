# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events that services report.

Services know this protocol, not Prometheus: :class:`kci_storage.monitoring.metrics.Metrics` implements it.
"""

from __future__ import annotations

import enum
from contextlib import AbstractContextManager
from typing import Protocol


class CacheStatus(enum.Enum):
    """Where an object's content came from; the value is that of ``X-Cache``."""

    HIT = "hit"
    MISS = "miss"
    STALE = "stale"  # a copy that is due for revalidation, while the backend does not answer


class Events(Protocol):
    """What happens to objects and their copies."""

    def served(self, status: CacheStatus) -> None:
        """An object was opened."""

    def uncached(self) -> None:
        """The rest of a download comes straight from the backend, since its fill ended early."""

    def wrong_digest(self) -> None:
        """An object was fetched whose content does not have the digest that another program stored with it."""

    def revalidated(self, result: str) -> None:
        """A copy was revalidated with the backend.

        :param result: ``fresh``, ``changed``, ``deleted`` or ``failed``.
        """

    def filling(self) -> AbstractContextManager[None]:
        """A cold object is fetched into the cache during the block."""
        ...

    def evicted(self, files: int, size: int) -> None:
        """Copies were evicted.

        :param files: how many.
        :param size: bytes in them.
        """

    def uploading(self) -> AbstractContextManager[None]:
        """An upload request is answered during the block; its files are counted as they are stored."""
        ...

    def uploaded(self) -> None:
        """A file was stored."""

    def waiting_for(self, lock: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """Hold a key's lock during the block, and measure how long it took to get it.

        :raises WriteConflict: other writers held it for too long.
        """
        ...
