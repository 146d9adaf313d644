# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the cache knows of a copy: its record, and how much all copies take."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import NamedTuple

from kci_storage.cache.names import new_generation
from kci_storage.drivers.base import ObjectInfo


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a cached object, and which file holds it."""

    info: ObjectInfo
    generation: str
    validated: float  # seconds since the epoch: when the backend was last known to have this version
    doubtful: bool = False  # a writer died, or failed in its commit: ask the backend before serving this

    def to_json(self) -> bytes:
        """The record as its file holds it."""
        fields = {
            "info": self.info.to_fields(),
            "generation": self.generation,
            "validated": self.validated,
            "doubtful": self.doubtful,
        }
        return json.dumps(fields, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        """Read a record.

        :raises ValueError: it is not one.
        """
        try:
            fields = json.loads(data)
            return cls(**{**fields, "info": ObjectInfo.from_fields(fields["info"])})
        except (TypeError, KeyError) as exc:
            raise ValueError(f"not a cache record: {exc}") from exc


class Entry(NamedTuple):
    """A hit: a record and its content, opened. The caller closes ``fd``."""

    record: Record
    fd: int
    path: str


class Usage(NamedTuple):
    """How much the cache holds."""

    files: int
    size: int  # bytes
    changes: int = 0  # how often it has changed


def new_record(info: ObjectInfo) -> Record:
    """The record of a version that the backend has now."""
    return Record(info, new_generation(), validated=time.time())


def last_use(status: os.stat_result) -> float:
    """When a content file was written or, to within :data:`TOUCH_INTERVAL`, read; seconds since the epoch."""
    return max(status.st_atime, status.st_mtime)
