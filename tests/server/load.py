# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that use a server while a test does something else to it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Self

import requests

from tests.support.harness import Server, wait_until
from tests.support.wire import SECONDS, Wire, new_folder, put, request

MIB = 1 << 20


class Load:
    """Clients that send requests without a pause: some on a new connection for each request, some on one for all."""

    def __init__(self, url: str, content: bytes):
        self._url = url
        self._content = content
        self._done = threading.Event()
        self.answered = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(keep,)) for keep in (True, True, False, False)]

    def _run(self, keep: bool) -> None:
        with requests.Session() as session:
            get: Callable[..., requests.Response] = session.get if keep else requests.get
            while not self._done.is_set():
                try:
                    assert get(self._url, timeout=SECONDS).content == self._content
                    self.answered += 1
                except (requests.RequestException, AssertionError) as exc:
                    self.failures.append(repr(exc))

    def wait_for_more(self, count: int = 50) -> None:
        """Wait until the given number of further requests has been answered."""
        wanted = self.answered + count
        wait_until(lambda: self.answered >= wanted or self.failures, SECONDS, "answers")

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def slow_download(server: Server) -> Iterator[Callable[[], None]]:
    """Begin a download; the returned function reads the rest, and fails if it is incomplete."""
    content = os.urandom(MIB) * 16
    key = f"{new_folder()}/large"
    assert put(server, key, content).status_code == 201
    with Wire(server, receive_buffer=64 * 1024) as wire:
        wire.send(request("GET", f"/{key}"))
        wire.head()
        begun = wire.read(MIB)

        def finish() -> None:
            assert begun + wire.read(len(content) - MIB) == content

        yield finish
