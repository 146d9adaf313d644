# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker is killed in the middle of all kinds of transfers, while another worker goes on with its own.

What the dead one left is gone soon after the next worker has started, and the other one's transfers are complete.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from kci_storage.archives.staging import MIN_STAGED_SIZE
from kci_storage.cache.housekeeping import LEADER_LOCK, WORKERS
from kci_storage.files import durable
from kci_storage.files.locks import MARKERS
from tests.archives.test_staging import sending
from tests.support.cold import Bench, only
from tests.support.faultproxy import Rule, Stall
from tests.support.harness import START_SECONDS, Server, wait_until
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Answer,
    Wire,
    form,
    get,
    new_folder,
    part,
    put,
    request,
    temporary_files,
    wait_until_tidy,
)

MIB = 1 << 20
CONTENT = random.Random(1).randbytes(6 * MIB)
OLD = b"the content before"
NAMES = ("put", "first", "last", "large")  # of files: a PUT's, two forms', and the one of an archive that is staged

pytestmark = pytest.mark.expected_errors("was sent SIGKILL")


class Half:
    """A request of which the server has the first half.

    :param data: the whole of it.
    """

    def __init__(self, server: Server, data: bytes):
        self._wire = Wire(server)
        self._rest = data[len(data) // 2 :]
        self._wire.send(data[: len(data) // 2])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._wire.close()

    def finish(self) -> Answer:
        """Send the second half; the answer."""
        self._wire.send(self._rest)
        return self._wire.answer()


class Transfers:
    """Transfers of all kinds, each half-way, of clients that are connected to one worker.

    :param stack: ends them.
    """

    def __init__(self, server: Server, stack: ExitStack):
        self.folder = new_folder()
        self._server = server
        for name in NAMES:
            assert put(server, f"{self.folder}/{name}", OLD).status_code == 201
        before = set(temporary_files(server))
        content = {"large": CONTENT[:MIN_STAGED_SIZE]}
        halves = [
            Half(server, request("PUT", f"/{self.folder}/put", server.headers(), CONTENT)),
            Half(server, self._form(part("path", self.folder.encode()), part("file0", CONTENT, "first"))),
            Half(server, self._form(part("file0", CONTENT, "last"), part("path", self.folder.encode()))),
        ]
        self._uploads = [stack.enter_context(half) for half in halves]
        self._archive = stack.enter_context(sending(server, self.folder, content))
        wait_until(lambda: self._are_under_way(before), SECONDS, "all of them to have begun")
        self.files = set(temporary_files(server)) - before

    def _form(self, *parts: bytes) -> bytes:
        return request("POST", "/upload", {**self._server.headers(), **FORM_TYPE}, form(*parts))

    def _are_under_way(self, before: set[Path]) -> bool:
        """Two locks; two spool files; three parts, of which one has the archive's file."""
        new = set(temporary_files(self._server)) - before
        sizes = [path.stat().st_size for path in new]
        return len(new) == 7 and MIN_STAGED_SIZE in sizes

    def assert_complete(self) -> None:
        """Let the clients send the rest, and see that everything is stored."""
        answers = [upload.finish() for upload in (*self._uploads, self._archive)]
        assert [answer.status for answer in answers] == [200] * 4
        for name in NAMES:
            expected = CONTENT[:MIN_STAGED_SIZE] if name == "large" else CONTENT
            assert get(self._server, f"{self.folder}/{name}").content == expected

    def assert_nothing_is_stored(self) -> None:
        """The previous versions are served."""
        for name in NAMES:
            assert get(self._server, f"{self.folder}/{name}").content == OLD


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.mark.parametrize("leads", [True, False], ids=["the one that sweeps", "another one"])
class TestAKilledWorker:
    def test_local(self, start_server: Callable[..., Server], stack: ExitStack, leads: bool) -> None:
        check_uploads(start_server(), stack, leads)

    def test_azure(self, start_server: Callable[..., Server], stack: ExitStack, leads: bool) -> None:
        check_uploads(start_server("azure"), stack, leads)

    def test_fills(self, new_bench: Callable[..., Bench], stack: ExitStack, leads: bool) -> None:
        bench = new_bench(server={"workers": 2})
        victim, other = victim_and_other(bench.server, leads)
        with only(bench.server, victim):
            doomed = Fill(bench, stack)
        with only(bench.server, other):
            living = Fill(bench, stack)
        kill(bench.server, victim)
        wait_until(lambda: not doomed.files & set(temporary_files(bench.server)), SECONDS, "its files to be gone")
        assert living.files <= set(temporary_files(bench.server))
        living.assert_complete()
        doomed.rule.end()
        wait_until_tidy(bench.server)
        assert get(bench.server, doomed.key).content == CONTENT


class Fill:
    """A download of a cold object, of which the first half has come."""

    def __init__(self, bench: Bench, stack: ExitStack):
        self.key = bench.store(CONTENT)
        before = set(temporary_files(bench.server))
        self.rule: Rule = bench.proxy.inject(Stall(len(CONTENT) // 2), key=self.key)
        self._wire = stack.enter_context(Wire(bench.server))
        self._wire.send(request("GET", f"/{self.key}"))
        bench.wait_for(self.key, len(CONTENT) // 2)
        self.files = set(temporary_files(bench.server)) - before
        assert len(self.files) == 2  # the claim and the part

    def assert_complete(self) -> None:
        """Let the rest come."""
        self.rule.end()
        assert self._wire.answer().body == CONTENT


def check_uploads(server: Server, stack: ExitStack, leads: bool) -> None:
    """Have two workers busy, kill one, and look at what is there then."""
    victim, other = victim_and_other(server, leads)
    with only(server, victim):
        doomed = Transfers(server, stack)
    with only(server, other):
        living = Transfers(server, stack)
    kill(server, victim)
    wait_until(lambda: not doomed.files & set(temporary_files(server)), SECONDS, "its files to be gone")
    assert set(temporary_files(server)) == living.files
    wait_until(lambda: not of_the_dead(server), SECONDS, "its marks to be gone")
    doomed.assert_nothing_is_stored()
    living.assert_complete()
    wait_until_tidy(server)


def victim_and_other(server: Server, leads: bool) -> tuple[int, int]:
    """The worker that is to be killed, and the one that stays, when the server's first sweep is over.

    :param leads: whether the first one is that which does the housekeeping.
    """
    server.wait_until_swept()
    [leader] = wait_until(lambda: server.holders(server.cache_directory / LEADER_LOCK), SECONDS, "a leader")
    [follower] = set(server.worker_pids()) - {leader}
    return (leader, follower) if leads else (follower, leader)


def of_the_dead(server: Server) -> list[Path]:
    """Markers, and files that show a worker's presence, whose process is gone."""
    return [
        path
        for name in (MARKERS, WORKERS)
        for path in (server.cache_directory / name).iterdir()
        if not durable.is_locked(path)
    ]


def kill(server: Server, pid: int) -> None:
    """Kill a worker, and wait for the next one."""
    count = len(server.worker_pids())
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: pid not in (pids := server.worker_pids()) and len(pids) == count, START_SECONDS, "the next worker"
    )
