"""Giving memory back to the system.

Pieces of large transfers pass through many threads, and glibc keeps for each thread what it has freed. So a worker
would stay as large as its busiest moment was.
"""

from __future__ import annotations

import ctypes

LARGE_TRANSFER = 16 * 1024 * 1024  # bytes; what is smaller leaves little

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep less


def give_back(transferred: int) -> None:
    """After a transfer of so many bytes: return to the system what it has left (malloc_trim(3))."""
    if _trim is not None and transferred >= LARGE_TRANSFER:
        _trim(0)
