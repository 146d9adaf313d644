# SPDX-License-Identifier: LGPL-2.1-or-later
"""No error of accept(2) leaves the acceptor (kci_storage/net/acceptor.py)."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from kci_storage.net import acceptor
from kci_storage.net.acceptor import Acceptor

EXHAUSTED = ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EINVAL"]
OF_CONNECTION = [
    "ECONNABORTED", "EPROTO", "EPERM", "ENETDOWN", "ENOPROTOOPT", "EHOSTDOWN", "ENONET", "EHOSTUNREACH", "EOPNOTSUPP",
    "ENETUNREACH", "ETIMEDOUT",
]  # fmt: skip


class Failing:
    """A listener whose ``accept`` fails."""

    def __init__(self, name: str):
        self._errno = getattr(errno, name)

    def accept(self) -> tuple[socket.socket, object]:
        raise OSError(self._errno, os.strerror(self._errno))


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Capture the log, whatever was configured before."""
    logger = logging.getLogger(acceptor.__name__)
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", [*EXHAUSTED, *OF_CONNECTION])
def test_an_error_is_logged_once_a_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    accepting = Acceptor(lambda: None)
    for _ in range(1000):
        assert accepting.accept(Failing(name)) is None
    now += acceptor.LOG_SECONDS
    assert accepting.accept(Failing(name)) is None
    lines = [record.getMessage() for record in caplog.records if record.name == acceptor.__name__]
    reason = errno.errorcode[getattr(errno, name)]  # some errors have two names
    assert list(dict.fromkeys(lines)) == [f"event=accept_failed error={reason} times={times}" for times in (1, 1000)]


@pytest.mark.parametrize("name", EXHAUSTED)
def test_without_resources_the_acceptor_makes_room_and_pauses(name: str):
    made: list[bool] = []
    accepting = Acceptor(lambda: made.append(True))
    before = time.monotonic()
    accepting.accept(Failing(name))
    assert made == [True] and accepting.paused_until >= before + acceptor.PAUSE_SECONDS


@pytest.mark.parametrize("name", OF_CONNECTION)
def test_after_a_broken_connection_the_next_one_is_accepted_at_once(name: str):
    accepting = Acceptor(lambda: pytest.fail("there is room"))
    accepting.accept(Failing(name))
    assert accepting.paused_until == 0


def test_a_connection_is_accepted(caplog: pytest.LogCaptureFixture):
    accepting = Acceptor(lambda: pytest.fail("there is room"))
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        assert accepting.accept(listener) is None
        with closing(socket.create_connection(listener.getsockname())) as client:
            accepted = accepting.accept(listener)
            assert accepted is not None
            with closing(accepted[0]):
                assert accepted[1] == client.getsockname()
    assert accepting.paused_until == 0 and not caplog.records
