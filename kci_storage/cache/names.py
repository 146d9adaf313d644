# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the files of a key lie in the cache directory, and how they are called."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import NamedTuple

RECORD, CONTENT, PART, FILL = ".json", ".data", ".part", ".fill"
LOCKS, SPOOL = "locks", "spool"
FOLDERS = tuple(f"{number:02x}" for number in range(256))
DIGEST = re.compile(r"[0-9a-f]{128}")
OURS = re.compile(r"[0-9a-f]{128}\.")  # how the names of the cache's own files start


class Location(NamedTuple):
    """Where a key's files lie."""

    digest: str
    stem: str  # the path that all of the key's files start with

    @property
    def record(self) -> Path:
        """The path of the record."""
        return Path(self.stem + RECORD)

    @property
    def fill(self) -> Path:
        """The path of the claim of who fetches the object."""
        return Path(self.stem + FILL)

    def content(self, generation: str) -> Path:
        """The path of one generation's content."""
        return Path(f"{self.stem}.{generation}{CONTENT}")

    def part(self, generation: str) -> Path:
        """Its path while it is on its way in."""
        return Path(f"{self.stem}.{generation}{PART}")


def new_generation() -> str:
    """A name for a content file that no other one has."""
    return secrets.token_hex(8)


def digest_of(name: str) -> str:
    """The SHA-512 of the key that a file is of, by the file's name."""
    return name.partition(".")[0]
