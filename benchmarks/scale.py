# SPDX-License-Identifier: LGPL-2.1-or-later
"""The size of a run."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1024, 1024**2, 1024**3


@dataclass(frozen=True)
class Scale:
    """The sizes of one run. Sizes of objects are in bytes, times in seconds."""

    name: str
    rounds: int  # how many turns each system has
    seconds: int  # for which wrk loads a system in each turn
    large: int  # the file that is downloaded, whole and in ranges, and uploaded
    medium: int  # uploads to Azurite, and cold objects
    crowded: int  # the cold object that a crowd requests at once
    followed: int  # the cold object that a crowd follows while memory is measured
    small_files: int  # of 4 KiB; hits are spread over them
    mebibyte_files: int
    cold_files: int  # of 16 KiB, each fetched once
    trees: int  # device trees in an archive
    readers: tuple[int, ...]  # how many slow readers there are at the same time

    @property
    def disk(self) -> int:
        """Bytes of disk that a run needs at most: files, uploads, copies in caches, and Azurite's data."""
        trees = (3 * self.rounds + 2) * self.trees * 64 * KIB
        return 6 * self.large + 3 * self.followed + (2 * self.rounds + 4) * self.medium + trees + 256 * MIB


SCALES = {
    scale.name: scale
    for scale in (
        Scale("full", 5, 5, GIB, 256 * MIB, 32 * MIB, GIB, 400, 32, 500, 2000, (1000, 3000, 10_000)),
        Scale("quick", 3, 1, 256 * MIB, 64 * MIB, 16 * MIB, 256 * MIB, 200, 16, 200, 500, (300,)),
        Scale("tiny", 1, 1, 4 * MIB, 2 * MIB, MIB, 2 * MIB, 8, 2, 16, 8, (20,)),
    )
}


def size_text(size: int) -> str:
    """A size in its largest whole unit.

    >>> size_text(4096), size_text(256 * MIB), size_text(GIB)
    ('4 KiB', '256 MiB', '1 GiB')
    """
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"
