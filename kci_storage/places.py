"""The places of the threads that answer requests, and how who waits for another request gives his away meanwhile.

A worker has only so many places. A request that waits for another one's end, such as an upload of the same key, does
nothing with its own: were it to keep it, one upload that stands still, and enough requests for its key, would hold up
all others.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Protocol

MOST_ASIDE = 256  # requests of a worker that may wait so: each costs a thread's memory, and looks around now and then


class Place(Protocol):
    """That of one thread."""

    def step_aside(self) -> contextlib.AbstractContextManager[None]:
        """Another thread may have it during the block.

        :raises Overloaded: :data:`MOST_ASIDE` others are aside.
        """
        ...


class _Here(threading.local):
    place: Place | None = None


_here = _Here()


def take(place: Place) -> None:
    """The calling thread has a place from now on."""
    _here.place = place


def aside() -> contextlib.AbstractContextManager[None]:
    """The calling thread does nothing but wait for other requests during the block. It need not have a place.

    :raises Overloaded: too many wait already.
    """
    return contextlib.nullcontext() if _here.place is None else _here.place.step_aside()
