# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many connections a worker has, and what it does when the system has no resources for another one."""

from __future__ import annotations

import errno
import re
import resource
import select
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from kci_storage.config.settings import CacheConfig, Config, ServerConfig
from kci_storage.server import settings
from kci_storage.server.settings import possible_connections, wanted_connections
from tests.support.harness import Server, wait_until
from tests.support.wire import SECONDS, Wire, new_folder, request

KIB = 1024
IDLE = 1300

# The server's settings, but accept() fails with the error that a file names, as long as that exists.
SETTINGS = """
import errno, os, pathlib
from kci_storage.server.hooks import *
from kci_storage.server.hooks import post_fork as begin

failing = pathlib.Path({folder!r}) / "failing"

class Listener:
    def __init__(self, listener):
        self._listener = listener

    def __getattr__(self, name):
        return getattr(self._listener, name)

    def accept(self):
        if failing.exists():
            code = getattr(errno, failing.read_text())
            raise OSError(code, os.strerror(code))
        return self._listener.accept()

def post_fork(server, worker):
    begin(server, worker)
    worker.listeners = [Listener(listener) for listener in worker.listeners]
"""


def config(connections: int = 0, workers: int = 2, threads: int = 64, fills: int = 64) -> Config:
    server = ServerConfig(connections=connections, workers=workers, threads=threads)
    return Config(path=Path(), server=server, cache=CacheConfig(max_fills=fills))


def test_there_are_enough_descriptors():
    """The descriptors suffice for a socket and a file per connection, and for the worker's other files."""
    assert wanted_connections(config().server) == settings.DEFAULT_CONNECTIONS
    assert wanted_connections(config(connections=17).server) == 17
    for descriptors in (1024, 4096, 65536):
        possible = possible_connections(config(), descriptors)
        beside = descriptors - settings.PER_CONNECTION * possible
        assert beside >= settings.OTHERS + 64 * settings.PER_THREAD + 32 * settings.PER_FILL
        assert possible >= descriptors // 4
    assert possible_connections(config(), 65536) > settings.DEFAULT_CONNECTIONS
    assert possible_connections(config(), 100) == settings.MIN_CONNECTIONS


def ask(server: Server, path: str = "/v1/health") -> None:
    """Check that a new client gets an answer."""
    with Wire(server) as wire:
        wire.send(request("GET", path))
        assert wire.answer().status == 200


def idle_clients(stack: ExitStack, server: Server, count: int) -> list[Wire]:
    return [stack.enter_context(Wire(server)) for _ in range(count)]


def is_readable(wire: Wire) -> bool:
    poll = select.poll()
    poll.register(wire.fileno(), select.POLLIN)
    return bool(poll.poll(0))


@pytest.mark.parametrize(
    ("workers", "connections", "level"), [(1, 2000, "warning"), (2, 0, "info")], ids=["configured", "default"]
)
def test_with_few_descriptors_there_are_fewer_connections(
    start_server: Callable[..., Server], workers: int, connections: int, level: str
):
    """With more idle clients than a worker has descriptors, new ones are answered, and nothing fails."""
    document = {"workers": workers, "connections": connections}
    server = start_server(server=document, wrapper=["prlimit", "--nofile=1024:1024"])
    [line] = re.findall(rf"level={level} event=connections_lowered .*", server.log())
    fields = dict(pair.split("=") for pair in line.split()[1:])
    assert (int(fields["wanted"]), fields["descriptors"]) == (connections or settings.DEFAULT_CONNECTIONS, "1024")
    pids = server.worker_pids()
    with ExitStack() as stack:
        idle_clients(stack, server, IDLE)
        ask(server)
        assert sum(psutil.Process(pid).num_fds() for pid in pids) < workers * 1024
        ask(server)
    assert server.worker_pids() == pids


def test_the_soft_limit_is_raised(start_server: Callable[..., Server]):
    """One worker keeps all idle clients."""
    server = start_server(server={"workers": 1}, wrapper=["prlimit", "--nofile=1024:8192"])
    [pid] = server.worker_pids()
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (8192, 8192)
    with ExitStack() as stack:
        wires = idle_clients(stack, server, IDLE)
        ask(server)
        for wire in (wires[0], wires[-1]):
            wire.send(request("GET", "/v1/health"))
            assert wire.answer().status == 200


@pytest.mark.expected_errors("event=accept_failed error=EMFILE")
def test_a_worker_survives_without_descriptors(start_server: Callable[..., Server]):
    """The oldest idle client is dropped for each new one."""
    server = start_server(server={"workers": 1})
    [pid] = server.worker_pids()
    process = psutil.Process(pid)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        wires = idle_clients(stack, server, 20)
        wait_until(lambda: process.num_fds() >= 20, SECONDS, "the clients to be accepted")
        ask(server)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (process.num_fds() - 1, hard))
        started = time.monotonic()
        late = idle_clients(stack, server, 5)
        for wire in late:
            wire.send(request("GET", "/v1/health"))
            assert wire.answer().status == 200
        assert wires[0].rest() == b""
        seconds = time.monotonic() - started
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert 1 <= server.log().count("event=accept_failed") <= seconds + 1
        wires[-1].send(request("GET", "/v1/health"))
        assert wires[-1].answer().status == 200
    assert server.worker_pids() == [pid]


@pytest.mark.expected_errors("event=accept_failed error=")
@pytest.mark.parametrize("name", ["ENFILE", "ENOBUFS", "ENOMEM", "ECONNABORTED", "EPROTO", "ENETDOWN", "EINVAL"])
def test_an_error_of_accept_does_not_end_a_worker(start_server: Callable[..., Server], tmp_path: Path, name: str):
    """The errors are simulated. Open connections are served meanwhile, and new ones afterwards."""
    assert hasattr(errno, name)
    (tmp_path / "settings.py").write_text(SETTINGS.format(folder=str(tmp_path)))
    server = start_server(server={"workers": 1}, arguments=["--config", str(tmp_path / "settings.py")])
    pids = server.worker_pids()
    with Wire(server) as there:
        there.send(request("GET", "/v1/health"))
        assert there.answer().status == 200
        there.send(b"GET /v1/health")
        there.wait_until_taken()
        (tmp_path / "failing").write_text(name)
        with Wire(server) as late:
            late.send(request("GET", "/v1/health"))
            wait_until(lambda: f"error={name}" in server.log(), SECONDS, "the error")
            there.send(b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert there.answer().status == 200
            (tmp_path / "failing").unlink()
            assert late.answer().status == 200
    assert server.worker_pids() == pids


def test_no_client_is_cut_for_a_new_one(start_server: Callable[..., Server]):
    """Beyond the limit, a new client waits until another client's request is finished."""
    connections = 6
    server = start_server(server={"workers": 1, "connections": connections})
    folder = new_folder()
    with ExitStack() as stack:
        uploads = idle_clients(stack, server, connections)
        for number, wire in enumerate(uploads):
            head = {**server.headers(), "Content-Length": 2 * KIB, "Connection": "close"}
            wire.send(request("PUT", f"/{folder}/{number}", head), bytes(KIB))
            wire.wait_until_taken()
        late = stack.enter_context(Wire(server))
        late.send(request("GET", "/v1/health"))
        time.sleep(2)
        assert psutil.Process(server.worker_pids()[0]).num_threads() > connections  # each connection has a thread
        assert not is_readable(late)
        uploads[0].send(bytes(KIB))
        assert uploads[0].answer().status == 201
        uploads[0].close()
        assert late.answer().status == 200
        for wire in uploads[1:]:
            wire.send(bytes(KIB))
            assert wire.answer().status == 201
