# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deleting expired objects, for backends that do not do it themselves. It may run while the server does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from kci_storage.drivers.base import Driver, ObjectInfo
from kci_storage.errors import ObjectNotFound, PreconditionFailed, StorageError
from kci_storage.retention.tags import is_expired
from kci_storage.store.objects import Objects


@dataclass(frozen=True, slots=True)
class Expired:
    """An expired object that was deleted, or could not be."""

    info: ObjectInfo
    failure: str | None = None  # why it could not be deleted; None: it was


class Expiry:
    """Finds expired objects, and deletes them.

    An object expires when its last upload is longer ago than its retention tag says.

    :param tag_key: the name of that tag.
    """

    def __init__(self, driver: Driver, objects: Objects, tag_key: str):
        self._driver = driver
        self._objects = objects
        self._tag_key = tag_key
        self.seen = 0  # objects that were looked at

    def find(self) -> Iterator[ObjectInfo]:
        """The expired objects, in the order of the backend's listing.

        :raises BackendError: the objects cannot be listed.
        """
        marker = None
        while True:
            page = self._driver.list(marker=marker)
            for info in page.objects:
                self.seen += 1
                if self._is_expired(info):
                    yield info
            marker = page.next_marker
            if marker is None:
                return

    def run(self) -> Iterator[Expired]:
        """Delete the expired objects, one by one.

        :returns: the outcome for each, except for objects that were uploaded again or deleted meanwhile.
        :raises BackendError: the objects cannot be listed.
        """
        for info in self.find():
            if (outcome := self.delete(info)) is not None:
                yield outcome

    def delete(self, info: ObjectInfo) -> Expired | None:
        """Delete an expired object; None: it does not exist any more, or was uploaded again."""
        try:
            self._objects.delete(info.key, self._is_expired)
        except (ObjectNotFound, PreconditionFailed):
            return None
        except StorageError as exc:
            return Expired(info, exc.message)
        return Expired(info)

    def _is_expired(self, info: ObjectInfo) -> bool:
        return is_expired(info.tags, self._tag_key, info.last_modified, time.time())
