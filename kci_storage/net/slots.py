# SPDX-License-Identifier: LGPL-2.1-or-later
"""Thread slots: a request that waits releases its slot to another one.

A worker has only so many slots. A request that waits for the backend, or for another request, does nothing with its
own. If it kept it, a backend that hangs, or one stalled upload and enough requests for its key, would hold up all
others. So each such wait is a block of :func:`waiting`. Those for the backend are in one place, the wrapper around
every driver (:mod:`kci_storage.monitoring.measured_driver`).

A thread may also have other clients' requests queued behind the one that it answers (:mod:`.fast_loop`), as long as
each takes no longer than a hit. A request that may take longer says so first: :func:`may_block`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

MAX_WAITING = 256  # requests of a worker that may wait, of those that can be refused: each may cost a thread


class Slot(Protocol):
    """The slot of one thread."""

    def waiting(self, bounded: bool) -> contextlib.AbstractContextManager[None]:
        """Another thread may have the slot during the block.

        :param bounded: whether this is one of the waits of which there may be only :data:`MAX_WAITING`.
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
    may_be_refused = True
    is_waiting = False


_here = _Here()


def occupy(slot: Slot) -> None:
    """The calling thread has a slot from now on."""
    _here.slot = slot


@contextlib.contextmanager
def waiting(bounded: bool = True) -> Iterator[None]:
    """The calling thread only waits during the block: for the backend, or for another thread.

    It may have no slot, or wait already: a driver may wait for a lock.

    :param bounded: False for a wait that must not be refused, whatever the request.
    :raises Overloaded: too many requests wait already. Nothing of this one's body has been received, and nothing of
        its answer has been sent.
    """
    may_block()
    if _here.slot is None or _here.is_waiting:
        yield
        return
    with _here.slot.waiting(bounded and _here.may_be_refused):
        _here.is_waiting = True
        try:
            yield
        finally:
            _here.is_waiting = False


def serve(batch: Batch | None) -> None:
    """The calling thread answers the requests of a batch from now on; None: no longer."""
    _here.batch = batch


def begin_request() -> None:
    """The calling thread begins to answer a request."""
    _here.may_have_blocked = False
    _here.may_be_refused = True


def refuse_no_longer() -> None:
    """Called before anything of the body of the thread's request is received, and before its answer begins.

    From then on it may wait as often as it has to, however many others do.
    """
    _here.may_be_refused = False


def may_block() -> None:
    """Called before anything that may take a while, so that no other request waits behind it."""
    _here.may_have_blocked = True
    if _here.batch is not None:
        _here.batch.drop_out()


def may_have_blocked() -> bool:
    """Whether the request that the calling thread began last has called :func:`may_block`."""
    return _here.may_have_blocked
