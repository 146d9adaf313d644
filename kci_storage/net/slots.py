"""Thread slots: a request that blocks gives its slot to another one.

A worker has only so many slots. A request that waits for an upload of its key, or for the next bytes of an object
that is being fetched, does nothing with its own. If it kept it, one stalled upload or fetch, and enough requests for
its key, would hold up all others.

A thread may also have other clients' requests queued behind the one that it answers (:mod:`.fast_loop`), as long as
each takes no longer than a hit. A request that may take longer says so first: :func:`may_block`.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Protocol

MAX_RELEASED = 256  # requests of a worker that may wait for uploads: each costs a thread, and some poll the disk


class Slot(Protocol):
    """The slot of one thread."""

    def released(self, bounded: bool) -> contextlib.AbstractContextManager[None]:
        """Another thread may have the slot during the block.

        :param bounded: whether this is one of the waits of which there may be only :data:`MAX_RELEASED`.
        :raises Overloaded: there are that many already.
        """
        ...


class Batch(Protocol):
    """Requests that one thread answers in turn."""

    def drop_out(self) -> None:
        """Leave the calling thread alone with the request that it answers now; nothing happens if it is already."""
        ...


class _Here(threading.local):
    slot: Slot | None = None
    batch: Batch | None = None
    may_have_blocked = False


_here = _Here()


def occupy(slot: Slot) -> None:
    """The calling thread has a slot from now on."""
    _here.slot = slot


def released(bounded: bool = True) -> contextlib.AbstractContextManager[None]:
    """The calling thread only waits during the block. It need not have a slot.

    :param bounded: False for a wait that cannot be refused any more.
    :raises Overloaded: too many requests wait already.
    """
    may_block()
    return contextlib.nullcontext() if _here.slot is None else _here.slot.released(bounded)


def serve(batch: Batch | None) -> None:
    """The calling thread answers the requests of a batch from now on; None: no longer."""
    _here.batch = batch


def begin_request() -> None:
    """The calling thread begins to answer a request."""
    _here.may_have_blocked = False


def may_block() -> None:
    """Called before anything that may take a while, such as a backend's answer, so that nobody waits behind it."""
    _here.may_have_blocked = True
    if _here.batch is not None:
        _here.batch.drop_out()


def may_have_blocked() -> bool:
    """Whether the request that the calling thread began last has called :func:`may_block`."""
    return _here.may_have_blocked
