# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many slow readers of one file: none is cut, and hits are served beside them."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.harness import Server
from tests.support.wire import SECONDS, Wire, new_folder, put, request, wait_until_tidy

KIB, MIB = 1024, 1024 * 1024
READERS = 1500
SEGMENT = 1448  # bytes, as on Ethernet, so that the kernel's buffers are as small as for remote clients
ROUNDS = 5
PIECE = 4 * KIB  # bytes that each reads in a round


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Raise the limit of descriptors to what the readers need; the test is skipped if the system has fewer."""
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * READERS
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"only {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Reader:
    """A client that reads a piece from time to time.

    :param content: the whole body, to compare.
    """

    def __init__(self, sock: socket.socket, content: bytes):
        self._sock = sock
        self._content = content
        self._taken = 0  # bytes

    def take_head(self) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._some(KIB)
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        self._check(body)

    def take(self, size: int) -> None:
        while size:
            data = self._some(size)
            self._check(data)
            size -= len(data)

    def _some(self, size: int) -> bytes:
        data = self._sock.recv(size)
        assert data, f"it was cut after {self._taken} bytes"
        return data

    def _check(self, data: bytes) -> None:
        assert data == self._content[self._taken : self._taken + len(data)]
        self._taken += len(data)


@contextmanager
def reader(server: Server, key: str, content: bytes) -> Iterator[Reader]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * KIB)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        sock.settimeout(SECONDS)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(request("GET", f"/{key}"))
        yield Reader(sock, content)


def test_none_of_many_slow_readers_is_cut(start_server: Callable[..., Server], descriptors: None):
    """The readers are more than could once be served, and all of them are served at the same time."""
    server = start_server(server={"workers": 2})
    folder, content = new_folder(), os.urandom(8 * MIB)
    assert put(server, f"{folder}/large", content).status_code == 201
    assert put(server, f"{folder}/small", b"small").status_code == 201

    def hit() -> None:
        with Wire(server) as wire:
            wire.send(request("GET", f"/{folder}/small"))
            assert wire.answer().body == b"small"

    with ExitStack() as stack:
        readers = [stack.enter_context(reader(server, f"{folder}/large", content)) for _ in range(READERS)]
        for slow in readers:
            slow.take_head()
        for _ in range(ROUNDS):
            hit()
            for slow in readers:
                slow.take(PIECE)
        hit()
        readers[0].take(2 * MIB)  # one of them reads quickly now
    wait_until_tidy(server)
