# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests that wait for an upload of their key: they keep no thread slot, and their number is bounded.

With two thread slots and one worker, a waiting request that kept its slot would block other requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kci_storage.errors import WriteConflict
from kci_storage.files.locks import KeyLocks
from kci_storage.net import slots
from tests.store.crowds import (
    BEYOND,
    MANY,
    THREADS,
    answered,
    as_archive,
    as_delete,
    as_download,
    as_form,
    as_put,
    assert_refused,
)
from tests.support.azurite import Azurite
from tests.support.harness import START_SECONDS, Server, running, wait_until
from tests.support.wire import (
    SECONDS,
    Wire,
    exchange,
    get,
    new_folder,
    put,
    request,
)


@pytest.fixture(scope="module")
def server(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a cache and few threads."""
    document = {
        "driver": "azure",
        "azure": dataclasses.asdict(azurite.settings()),
        "server": {"workers": 1, "threads": THREADS, "lock_timeout": 10 * START_SECONDS},
    }
    with running(Server(tmp_path_factory.mktemp("waiting"), document)) as server:
        yield server


def keys() -> list[str]:
    """New keys: of a cached file, of one whose upload stalls, and of another one."""
    folder = new_folder()
    return [f"{folder}/{name}" for name in ("hit", "key", "other")]


@contextlib.contextmanager
def stalled(server: Server, key: str) -> Iterator[Wire]:
    """An upload that holds its key's lock and sends nothing more."""
    with Wire(server) as wire:
        wire.send(request("PUT", f"/{key}", {**server.headers(), "Content-Length": 5}), b"be")
        wait_until(lambda: server.is_writing(key), SECONDS, "the upload")
        yield wire


def threads(server: Server) -> int:
    """How many threads the worker has."""
    return psutil.Process(server.worker_pids()[0]).num_threads()


@pytest.mark.parametrize(
    ("ask", "statuses"),
    [
        (as_put, {200}),
        (as_delete, {204, 404}),
        (as_download, {200}),
        (as_form, {200}),
        (as_archive, {200}),
    ],
    ids=["put", "delete", "download", "form", "archive"],
)
def test_a_request_that_waits_for_an_upload_delays_no_other(
    server: Server, ask: Callable[[Server, str], bytes], statuses: set[int]
) -> None:
    hit, key, other = keys()
    assert put(server, hit, b"hit").status_code == 201
    with stalled(server, key) as upload, contextlib.ExitStack() as stack:
        before = threads(server)
        wires = [stack.enter_context(Wire(server)) for _ in range(MANY)]
        for wire in wires:
            wire.send(ask(server, key))
        wait_until(lambda: threads(server) >= before + MANY - THREADS, SECONDS, "all to wait")
        answer = get(server, hit)
        assert (answer.content, answer.headers["X-Cache"]) == (b"hit", "hit")
        assert put(server, other, b"").status_code == 201
        upload.send(b"gun")
        assert upload.answer().status == 201
        assert {wire.answer().status for wire in wires} <= statuses


def test_too_many_do_not_wait(server: Server) -> None:
    """Requests beyond the bound are refused at once, except those whose body has partly been received."""
    hit, key, other = keys()
    assert put(server, hit, b"hit").status_code == 201
    with stalled(server, key) as upload, contextlib.ExitStack() as stack:
        wires = {stack.enter_context(Wire(server)) for _ in range(slots.MAX_WAITING + BEYOND)}
        for wire in wires:
            wire.send(as_download(server, key))
        wait_until(lambda: len(answered(wires)) == BEYOND, SECONDS, "the requests beyond the bound to be refused")
        assert get(server, hit).content == b"hit"
        assert_refused(server, exchange(server, as_put(server, key)))
        assert put(server, other, b"").status_code == 201
        received = [stack.enter_context(Wire(server)) for _ in (as_form, as_archive)]
        for wire, ask in zip(received, (as_form, as_archive), strict=True):
            wire.send(ask(server, key))
        for wire in (refused := answered(wires)):
            assert_refused(server, wire.answer())
        upload.send(b"gun")
        assert {wire.answer().body for wire in wires - refused} <= {b"begun", b"later"}
        assert [wire.answer().status for wire in received] == [200, 200]


def test_threads_that_wait_for_one_lock_take_it_in_order_of_arrival(tmp_path: Path) -> None:
    """Within one process, where only the first of them polls the lock."""
    locks = KeyLocks(tmp_path / "locks")
    order: list[int] = []

    def wait(number: int) -> None:
        with locks.hold("name", SECONDS):
            order.append(number)

    crowd = [threading.Thread(target=wait, args=(number,)) for number in range(MANY)]
    with locks.hold("name", 0):
        for number, thread in enumerate(crowd, start=1):
            thread.start()
            wait_until(lambda number=number: locks.waiting("name") == number, SECONDS, "it to wait")
    for thread in crowd:
        thread.join()
    assert order == list(range(MANY))
    assert locks.waiting("name") == 0


def test_a_thread_that_times_out_lets_the_next_one_poll(tmp_path: Path) -> None:
    locks = KeyLocks(tmp_path / "locks")
    with locks.hold("name", 0), pytest.raises(WriteConflict), locks.hold("name", 0.05):
        pass
    assert locks.waiting("name") == 0
    with locks.hold("name", 0):
        pass
