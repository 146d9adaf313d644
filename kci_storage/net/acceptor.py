# SPDX-License-Identifier: LGPL-2.1-or-later
"""Accepting connections, whatever accept(2) says: no error of it ends a worker."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.1  # in which nobody is accepted, after the system had no means for one more connection
LOG_SECONDS = 1.0  # between two lines of the log
NOBODY = frozenset({errno.EAGAIN, errno.EINTR})
# Errors of the connection that was to be accepted, or of the network that it came by (accept(2)): the next one may be
# all right.
OF_CONNECTION = frozenset(
    {
        errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
        errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.ETIMEDOUT,
    }
)  # fmt: skip


class Acceptor:
    """Accepts connections.

    :param make_room: called when the system has no means for one more connection, such as descriptors or memory.
    """

    def __init__(self, make_room: Callable[[], object]):
        self._make_room = make_room
        self._log_at = 0.0  # on the monotonic clock
        self._failed = 0  # calls since the last line of the log
        self.paused_until = 0.0  # on the monotonic clock

    def accept(self, listener: Any) -> tuple[socket.socket, Any] | None:
        """The next connection and its client's address; None: there is none, or it could not be accepted.

        :param listener: a socket that does not block.
        """
        try:
            accepted: tuple[socket.socket, Any] = listener.accept()
        except OSError as exc:
            if exc.errno not in NOBODY:
                self._not_accepted(exc)
            return None
        return accepted

    def _not_accepted(self, error: OSError) -> None:
        now = time.monotonic()
        self._failed += 1
        if now >= self._log_at:
            reason = errno.errorcode.get(error.errno or 0, str(error))
            log.error("event=accept_failed error=%s times=%d", reason, self._failed)
            self._log_at, self._failed = now + LOG_SECONDS, 0
        if error.errno not in OF_CONNECTION:
            self.paused_until = now + PAUSE_SECONDS
            self._make_room()
