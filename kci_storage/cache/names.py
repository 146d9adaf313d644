# SPDX-License-Identifier: LGPL-2.1-or-later
"""The paths and names of a key's files in the cache directory."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import NamedTuple

RECORD, CONTENT, PART, FILL, DOUBT = ".json", ".data", ".part", ".fill", ".doubt"
LOCKS, SPOOL = "locks", "spool"
FOLDERS = tuple(f"{number:02x}" for number in range(256))
DIGEST = re.compile(r"[0-9a-f]{128}")
CACHE_FILE = re.compile(r"[0-9a-f]{128}\.")  # the beginning of the names of the cache's own files


class Location(NamedTuple):
    """The paths of a key's files."""

    digest: str  # the key's SHA-512, in hexadecimal digits
    stem: str  # the common beginning of the paths

    @property
    def record(self) -> Path:
        """The path of the record."""
        return Path(self.stem + RECORD)

    @property
    def fill(self) -> Path:
        """The path of the claim, which the thread that fetches the object has locked."""
        return Path(self.stem + FILL)

    @property
    def doubt(self) -> Path:
        """The path of the file that says until when a lost change of the object may be carried out."""
        return Path(self.stem + DOUBT)

    def content(self, generation: str) -> Path:
        """The path of one generation's content."""
        return Path(f"{self.stem}.{generation}{CONTENT}")

    def part(self, generation: str) -> Path:
        """The path of one generation's content while it is being written."""
        return Path(f"{self.stem}.{generation}{PART}")


def new_generation() -> str:
    """A unique name for a version's content file."""
    return secrets.token_hex(8)


def digest_of(name: str) -> str:
    """The SHA-512 of the key to which a cache file belongs.

    :param name: the file's name.
    """
    return name.partition(".")[0]
