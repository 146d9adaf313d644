"""The places of the threads that answer requests, and how who waits gives his away, or lets others go ahead.

A worker has only so many places. A request that waits for an upload of its key, or for the next bytes of an object
that is being fetched, does nothing with its own: were it to keep it, one upload or one fetch that stands still, and
enough requests for its key, would hold up all others.

And a thread may have requests of other clients behind the one that it answers (:mod:`kci_storage.net.lane`), as long
as each takes no longer than a hit. Before a request does, it says so: :func:`take_time`.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Protocol

MOST_ASIDE = 256  # requests of a worker that may wait for uploads: each costs a thread, and some look around


class Place(Protocol):
    """That of one thread."""

    def step_aside(self, bounded: bool) -> contextlib.AbstractContextManager[None]:
        """Another thread may have it during the block.

        :param bounded: whether it is one of those of whom there may be only :data:`MOST_ASIDE`.
        :raises Overloaded: so many of these are aside.
        """
        ...


class Row(Protocol):
    """Requests that one thread answers."""

    def leave(self) -> None:
        """Leave the calling thread alone with the request that it answers now, if it is not yet."""
        ...


class _Here(threading.local):
    place: Place | None = None
    row: Row | None = None
    took_time = False


_here = _Here()


def take(place: Place) -> None:
    """The calling thread has a place from now on."""
    _here.place = place


def aside(bounded: bool = True) -> contextlib.AbstractContextManager[None]:
    """The calling thread does nothing but wait for others during the block. It need not have a place.

    :param bounded: False for who cannot be refused any more.
    :raises Overloaded: too many wait already.
    """
    take_time()
    return contextlib.nullcontext() if _here.place is None else _here.place.step_aside(bounded)


def serve(row: Row | None) -> None:
    """The calling thread answers the requests of a row from now on; None: no longer."""
    _here.row = row


def begin() -> None:
    """The calling thread begins to answer a request."""
    _here.took_time = False


def take_time() -> None:
    """What the request needs next may take a while, such as an answer of the backend: nobody is to wait behind it."""
    _here.took_time = True
    if _here.row is not None:
        _here.row.leave()


def took_time() -> bool:
    """Whether the request that the calling thread has begun last may have taken a while."""
    return _here.took_time
