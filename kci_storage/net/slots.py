# SPDX-License-Identifier: LGPL-2.1-or-later
"""Thread slots: a request that waits releases its slot to another one.

A worker has a fixed number of slots. A request that waits for the backend or for another request does not need its
own. If it kept the slot, a backend that hangs, or one stalled upload and enough requests for its key, would block all
other requests. So each such wait is a block of :func:`waiting`. The waits for the backend are in one place, the
wrapper around every driver (:mod:`kci_storage.monitoring.measured_driver`).

A thread of the fast loop (:mod:`.fast_loop`) has other clients' requests queued behind the one that it answers. Code
that may take longer than a hit calls :func:`may_block` first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

MAX_WAITING = 256  # requests per worker in a wait that may be refused: each may cost a thread


class Slot(Protocol):
    """The slot of one thread."""

    def waiting(self, bounded: bool) -> contextlib.AbstractContextManager[None]:
        """Release the slot to another thread during the block.

        :param bounded: whether this wait counts against :data:`MAX_WAITING`.
        :raises Overloaded: that number is reached.
        """
        ...


class Batch(Protocol):
    """Requests that one thread answers in turn."""

    def drop_out(self) -> None:
        """Let the calling thread finish its request alone, and another thread take over the batch. Idempotent."""
        ...


class _Here(threading.local):
    slot: Slot | None = None
    batch: Batch | None = None
    may_have_blocked = False
    may_be_refused = True
    is_waiting = False


_here = _Here()


def occupy(slot: Slot) -> None:
    """Note that the calling thread has a slot from now on."""
    _here.slot = slot


@contextlib.contextmanager
def waiting(bounded: bool = True) -> Iterator[None]:
    """Release the calling thread's slot during the block, in which it only waits: for the backend or another thread.

    Waits may be nested, as when a driver waits for a lock; and the thread may have no slot. Then nothing happens.

    :param bounded: False: this wait must not be refused.
    :raises Overloaded: too many requests wait already. No byte of this request's body has been received by then, and
        no byte of its response has been sent.
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
    """Note that the calling thread answers the requests of a batch from now on; None: no longer."""
    _here.batch = batch


def begin_request() -> None:
    """Note that the calling thread begins to answer a request."""
    _here.may_have_blocked = False
    _here.may_be_refused = True


def refuse_no_longer() -> None:
    """Called before a request's body is received, and before its response begins: its waits are not refused any more.

    A refusal would waste the transfer, or come too late for a status.
    """
    _here.may_be_refused = False


def may_block() -> None:
    """Called before anything that may block, so that no other request of the fast loop has to wait for it."""
    _here.may_have_blocked = True
    if _here.batch is not None:
        _here.batch.drop_out()


def may_have_blocked() -> bool:
    """Whether the request that the calling thread began last has called :func:`may_block`."""
    return _here.may_have_blocked
