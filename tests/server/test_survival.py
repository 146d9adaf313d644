# SPDX-License-Identifier: LGPL-2.1-or-later
"""An unexpected failure ends one request at most: it is logged, and slots, loops and threads go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from kci_storage.config.settings import ServerConfig
from tests.support.harness import Server, wait_until
from tests.support.wire import SECONDS, Answer, Wire, new_folder, put, request, wait_until_tidy

KIB, MIB = 1024, 1024 * 1024
LARGE = 32 * MIB
THREADS = 2
BOT = {"User-Agent": "NastyBot/1.0"}

# The server's settings, but a function of the worker fails as long as a file with its name exists.
SETTINGS = """
import pathlib
import kci_storage.net.fast_loop
import kci_storage.server.reload
from kci_storage.net.client_socket import ClientSocket
from kci_storage.net.connection import Connection
from kci_storage.net.fast_loop import FastLoop
from kci_storage.server.hooks import *
from kci_storage.server.hooks import post_fork as begin
from kci_storage.server.request import Requests
from kci_storage.server.worker import Worker
from kci_storage.wsgi.exchange import SentFile

folder = pathlib.Path({folder!r})
kci_storage.net.fast_loop.WAIT_SECONDS = kci_storage.net.fast_loop.STAY_SECONDS = 1

def fail(owner, name, reason=ZeroDivisionError):
    function = getattr(owner, name)

    def failing(*arguments, **more):
        if (folder / name).exists():
            raise reason("made up")
        return function(*arguments, **more)

    setattr(owner, name, failing)

def post_fork(server, worker):
    begin(server, worker)
    fail(SentFile, "send_to")
    fail(Requests, "_parsed", SystemExit)
    fail(Requests, "answer")
    fail(ClientSocket, "send_rest")
    fail(Connection, "receive")
    fail(Worker, "_go_on")
    fail(Worker, "_expire")
    fail(FastLoop, "_next_has_come")
    fail(FastLoop, "_sweep")
    fail(kci_storage.server.reload.preflight, "usable")
"""

pytestmark = pytest.mark.expected_errors("ZeroDivisionError", "SystemExit")


class Scene:
    """A server with one worker and few threads, in which a test can make parts fail."""

    def __init__(self, server: Server, folder: Path):
        self.server = server
        self._folder = folder
        self.small, self.large = (f"{new_folder()}/{name}" for name in ("small", "large"))
        assert put(server, self.small, b"small").status_code == 201
        assert put(server, self.large, bytes(LARGE)).status_code == 201
        self.pids = server.worker_pids()

    @contextlib.contextmanager
    def failing(self, name: str) -> Iterator[None]:
        (self._folder / name).touch()
        try:
            yield
        finally:
            (self._folder / name).unlink()

    def ask(self, wire: Wire) -> Answer:
        wire.send(request("GET", f"/{self.small}"))
        answer = wire.answer()
        assert (answer.status, answer.body) == (200, b"small")
        return answer

    def assert_alive(self) -> None:
        """Check that all slots answer, open connections are kept, and no worker has ended."""
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(self.server)) for _ in range(4 * THREADS)]
            for _ in range(3):
                for wire in wires:
                    wire.send(request("GET", f"/{self.small}"))
                for wire in wires:
                    assert wire.answer().body == b"small"
        assert self.server.worker_pids() == self.pids
        wait_until_tidy(self.server)

    def logged(self, event: str, request_id: str = "") -> bool:
        wanted = f"level=error event={event} request_id={request_id}" if request_id else f"level=error event={event} "
        return any(wanted in line and "traceback=" in line for line in self.server.log().splitlines())


@pytest.fixture
def scene(start_server: Callable[..., Server], tmp_path: Path) -> Scene:
    (tmp_path / "settings.py").write_text(SETTINGS.format(folder=str(tmp_path)))
    document = {"workers": 1, "threads": THREADS}
    return Scene(start_server(server=document, arguments=["--config", str(tmp_path / "settings.py")]), tmp_path)


def test_a_request_that_fails_is_logged_with_its_id(scene: Scene):
    """There are more failures than slots."""
    with scene.failing("send_to"):
        for number in range(2 * THREADS):
            with Wire(scene.server) as wire:
                wire.send(request("GET", f"/{scene.small}", {"X-Request-ID": f"failing-{number}"}))
                assert wire.rest() == b""  # it is too late for an error response
            wait_until(lambda: scene.logged("request_failed", f"failing-{number}"), SECONDS, "the log")  # noqa: B023
    scene.assert_alive()


@pytest.mark.parametrize(("name", "event"), [("_parsed", "request_failed"), ("answer", "fast_loop_failed")])
def test_a_failed_task_costs_no_slot(scene: Scene, name: str, event: str):
    with scene.failing(name):
        for _ in range(2 * THREADS):
            with Wire(scene.server) as wire:
                wire.send(request("GET", "/"))
                assert wire.rest() == b""
    assert scene.logged(event)
    scene.assert_alive()


def test_a_failed_background_send_cuts_only_its_own_client(scene: Scene):
    with Wire(scene.server, receive_buffer=8 * KIB) as cut, scene.failing("send_rest"):
        cut.send(request("GET", f"/{scene.large}"))
        request_id = cut.head().headers["X-Request-ID"]
        received = 0
        while data := cut.read(64 * KIB):
            received += len(data)
            time.sleep(0.2)  # the reader is slow
        assert received < LARGE
        wait_until(lambda: scene.logged("background_failed", request_id), SECONDS, "the log")
    with Wire(scene.server, receive_buffer=8 * KIB) as late:
        late.send(request("GET", f"/{scene.large}"))
        late.head()
        time.sleep(1)  # this reader is slow, too
        assert len(late.read(LARGE)) == LARGE
    scene.assert_alive()


def test_a_head_that_cannot_be_collected_cuts_only_its_own_client(scene: Scene):
    with Wire(scene.server) as cut, Wire(scene.server) as other:
        with scene.failing("receive"):
            cut.send(b"GET / HTTP/1.1\r\n")
            assert cut.rest() == b""
        assert scene.logged("connection_failed")
        scene.ask(other)
    scene.assert_alive()


def test_a_connection_that_cannot_be_handed_back_costs_no_slot(scene: Scene):
    with scene.failing("_go_on"):
        for number in range(2 * THREADS):
            with Wire(scene.server) as wire:
                wire.send(request("GET", "/", {"X-Request-ID": f"lost-{number}", "Connection": "close"}))
                assert wire.rest().endswith(b"KernelCI Proxy Server")
            wait_until(lambda: scene.logged("connection_failed", f"lost-{number}"), SECONDS, "the log")  # noqa: B023
    scene.assert_alive()


def test_the_main_loop_survives_a_failure(scene: Scene):
    with scene.failing("_expire"):
        wait_until(lambda: scene.logged("main_loop_failed"), SECONDS, "the failure")
    scene.assert_alive()


@pytest.mark.parametrize("name", ["receive", "_sweep"])
def test_the_fast_loop_survives_a_failure(scene: Scene, name: str):
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(scene.server)) for _ in range(4)]
        for _ in range(5):
            for wire in wires:
                scene.ask(wire)
        with scene.failing(name):
            wires[0].send(request("GET", f"/{scene.small}"))
            wait_until(lambda: scene.logged("fast_loop_failed"), SECONDS, "the failure")
        for wire in wires[1:]:
            scene.ask(wire)
    scene.assert_alive()


def test_a_reload_that_fails_is_not_the_last_one(scene: Scene):
    """A worker that cannot apply a configuration keeps its last one, and applies the next."""
    server = scene.server
    with scene.failing("usable"):
        server.document["useragent"] = {"ban": ["nastybot"]}
        server.reload()
        wait_until(lambda: scene.logged("reload_failed"), SECONDS, "the failure")
    server.document["useragent"] = {"ban": ["nastybot", "other"]}
    server.reload()
    wait_until(lambda: "event=rules_renewed" in server.log(), SECONDS, "the new rules")
    with Wire(server) as wire:
        wire.send(request("GET", "/", BOT))
        assert wire.answer().status == 403
    scene.assert_alive()


def test_failures_leave_no_threads_behind(scene: Scene):
    """The worker has no more threads afterwards than before."""
    before = psutil.Process(scene.pids[0]).num_threads()
    with scene.failing("answer"):
        for _ in range(10 * THREADS):
            with Wire(scene.server) as wire:
                wire.send(request("GET", "/"))
                wire.rest()
    scene.assert_alive()
    assert psutil.Process(scene.pids[0]).num_threads() <= before + THREADS
    assert ServerConfig().threads > THREADS
