# SPDX-License-Identifier: LGPL-2.1-or-later
"""Accepting connections. No error of accept(2) ends a worker."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.1  # without accepting, after the system had no resources for another connection
LOG_SECONDS = 1.0  # between two lines of the log
NO_CONNECTION = frozenset({errno.EAGAIN, errno.EINTR})
# Errors of one connection or its network (accept(2)): the next connection may succeed.
OF_CONNECTION = frozenset(
    {
        errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
        errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.ETIMEDOUT,
    }
)  # fmt: skip


class Acceptor:
    """Accepts connections.

    :param make_room: called when the system has no resources for another connection, such as descriptors or memory.
    """

    def __init__(self, make_room: Callable[[], object]):
        self._make_room = make_room
        self._log_at = 0.0  # on the monotonic clock
        self._failed = 0  # calls since the last line of the log
        self.paused_until = 0.0  # on the monotonic clock

    def accept(self, listener: Any) -> tuple[socket.socket, Any] | None:
        """Accept a connection.

        :param listener: a non-blocking socket.
        :returns: the connection and its client's address; None: there is none, or it could not be accepted.
        """
        try:
            accepted: tuple[socket.socket, Any] = listener.accept()
        except OSError as exc:
            if exc.errno not in NO_CONNECTION:
                self._failed_with(exc)
            return None
        return accepted

    def _failed_with(self, error: OSError) -> None:
        now = time.monotonic()
        self._failed += 1
        if now >= self._log_at:
            reason = errno.errorcode.get(error.errno or 0, str(error))
            log.error("event=accept_failed error=%s times=%d", reason, self._failed)
            self._log_at, self._failed = now + LOG_SECONDS, 0
        if error.errno not in OF_CONNECTION:
            self.paused_until = now + PAUSE_SECONDS
            self._make_room()
