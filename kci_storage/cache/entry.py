# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of a cached copy, a hit, and the usage of the whole cache."""

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
    """The properties of a cached object, and which content file it has."""

    info: ObjectInfo
    generation: str  # part of the content file's name
    validated: float  # seconds since the epoch: when the backend was last known to have this version
    doubtful: bool = False  # a change of the object may have been made unnoticed: ask before serving

    def to_json(self) -> bytes:
        """The content of the record's file."""
        fields = {
            "info": self.info.to_fields(),
            "generation": self.generation,
            "validated": self.validated,
            "doubtful": self.doubtful,
        }
        return json.dumps(fields, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        """Parse the content of a record's file.

        :raises ValueError: it is not a record.
        """
        try:
            fields = json.loads(data)
            return cls(**{**fields, "info": ObjectInfo.from_fields(fields["info"])})
        except (TypeError, KeyError) as exc:
            raise ValueError(f"not a cache record: {exc}") from exc


class Entry(NamedTuple):
    """A cache hit: a record and its open content file. The caller closes ``fd``."""

    record: Record
    fd: int
    path: str


class Usage(NamedTuple):
    """How much the cache holds."""

    files: int  # content files
    size: int  # bytes in them
    changes: int = 0  # how often these numbers have changed


def new_record(info: ObjectInfo) -> Record:
    """A record, of a new generation, for a version that the backend has now."""
    return Record(info, new_generation(), validated=time.time())


def last_use(status: os.stat_result) -> float:
    """When a content file was last written or read, in seconds since the epoch.

    A read counts only :data:`.TOUCH_INTERVAL` seconds after the one before.
    """
    return max(status.st_atime, status.st_mtime)
