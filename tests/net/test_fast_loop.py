# SPDX-License-Identifier: LGPL-2.1-or-later
"""Busy clients share a thread (kci_storage/net/fast_loop.py), and none of them waits for another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.azurite import Azurite
from tests.support.faultproxy import Hold, fault_proxy
from tests.support.harness import Server, wait_until
from tests.support.wire import SECONDS, Answer, Wire, new_folder, put, request, wait_until_tidy

KIB, MIB = 1024, 1024 * 1024
CLIENTS = 8
TURNS = 3

# The server's settings with three changes: a response names the thread that sent it; a request for "/…held" blocks in
# the application without calling may_block(); and the worker's checks for blocking requests may be switched off. The
# loop's own limits are some hundredths of a second, and a busy machine may take that long for a single request.
SETTINGS = """
import pathlib, threading, time
import kci_storage.net.fast_loop
from kci_storage.server.hooks import *
from kci_storage.server.hooks import post_worker_init as begin

folder = pathlib.Path({folder!r})
kci_storage.net.fast_loop.LOOK_SECONDS = {look_seconds}
kci_storage.net.fast_loop.WAIT_SECONDS = kci_storage.net.fast_loop.STAY_SECONDS = 1

def post_worker_init(worker):
    begin(worker)
    application = worker.wsgi

    def telling(environ, start_response):
        if environ["PATH_INFO"].endswith("held"):
            (folder / "held").touch()
            while (folder / "hold").exists():
                time.sleep(0.01)

        def start(status, headers, *exc_info):
            return start_response(status, [*headers, ("X-Thread", str(threading.get_ident()))], *exc_info)

        return application(environ, start)

    worker.wsgi = telling
"""


@dataclass
class Clients:
    """Clients that keep their connections, and the object that they request."""

    wires: list[Wire]
    key: str
    content: bytes

    def ask(self, wire: Wire) -> Answer:
        wire.send(request("GET", f"/{self.key}"))
        answer = wire.answer()
        assert (answer.status, answer.body) == (200, self.content)
        return answer

    def take_turns(self) -> set[str]:
        """Let each client send some requests in turn; returns the threads that have answered."""
        return {self.ask(wire).headers["X-Thread"] for _ in range(TURNS) for wire in self.wires}

    def share_a_thread(self) -> bool:
        return len(self.take_turns()) == 1


def settings(folder: Path, look_seconds: float = 0.5) -> list[str]:
    """gunicorn's arguments."""
    path = folder / "settings.py"
    path.write_text(SETTINGS.format(folder=str(folder), look_seconds=look_seconds))
    return ["--config", str(path)]


@contextmanager
def busy_clients(server: Server) -> Iterator[Clients]:
    """Clients that share a thread at the beginning of the block."""
    key, content = f"{new_folder()}/a", b"quick"
    assert put(server, key, content).status_code == 201
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(CLIENTS)]
        clients = Clients(wires, key, content)
        wait_until(clients.share_a_thread, SECONDS, "one thread for all")
        yield clients
    wait_until_tidy(server)


def test_busy_clients_share_a_thread(start_server: Callable[..., Server], tmp_path: Path):
    with busy_clients(start_server(server={"workers": 1}, arguments=settings(tmp_path))):
        pass


def test_a_thread_that_blocks_unexpectedly_drops_out_of_the_loop(start_server: Callable[..., Server], tmp_path: Path):
    server = start_server(server={"workers": 1}, arguments=settings(tmp_path))
    (tmp_path / "hold").touch()
    with busy_clients(server) as clients:
        held, *others = clients.wires
        held.send(request("GET", f"/{clients.key}.held"))
        wait_until((tmp_path / "held").exists, SECONDS, "the request that is held up")
        clients.wires = others
        wait_until(clients.share_a_thread, SECONDS, "one thread for the others")
        (tmp_path / "hold").unlink()
        assert held.answer().status == 404
        clients.ask(held)


def do_not_read(server: Server, wire: Wire) -> None:
    key = f"{new_folder()}/large"
    assert put(server, key, bytes(32 * MIB)).status_code == 201
    wire.send(request("GET", f"/{key}", {"Range": f"bytes=0-{16 * MIB},{20 * MIB}-"}))
    assert wire.head().status == 206


def stop_in_a_body(server: Server, wire: Wire) -> None:
    wire.send(request("PUT", f"/{new_folder()}/a", {**server.headers(), "Content-Length": MIB}), bytes(KIB))
    wire.wait_until_taken()


def stop_in_a_head(server: Server, wire: Wire) -> None:
    wire.send(b"GET /")
    wire.wait_until_taken()


@pytest.mark.parametrize("be_slow", [do_not_read, stop_in_a_body, stop_in_a_head])
def test_no_client_waits_for_a_slow_one(
    start_server: Callable[..., Server], tmp_path: Path, be_slow: Callable[[Server, Wire], None]
):
    """This holds without the worker's checks for blocking requests."""
    server = start_server(server={"workers": 1}, arguments=settings(tmp_path, look_seconds=1000))
    with busy_clients(server) as clients:
        slow = clients.wires.pop()
        be_slow(server, slow)
        wait_until(clients.share_a_thread, SECONDS, "one thread for the others")
        slow.close()


def test_no_client_waits_for_a_cold_object(start_server: Callable[..., Server], azurite: Azurite, tmp_path: Path):
    with fault_proxy(azurite) as proxy:
        arguments = settings(tmp_path, look_seconds=1000)
        server = start_server("azure", azure={"endpoint": proxy.endpoint}, server={"workers": 1}, arguments=arguments)
        key = f"{new_folder()}/cold"
        with azurite.client(server.document["azure"]["container"]) as container:
            container.upload_blob(key, b"cold")
        rule = proxy.inject(Hold(), key=key)
        with busy_clients(server) as clients:
            cold = clients.wires.pop()
            cold.send(request("GET", f"/{key}"))
            rule.wait_until_reached()
            wait_until(clients.share_a_thread, SECONDS, "one thread for the others")
            rule.end()
            assert cold.answer().body == b"cold"
            clients.ask(cold)


def test_requests_that_come_together_are_answered_in_order(start_server: Callable[..., Server], tmp_path: Path):
    server = start_server(server={"workers": 1}, arguments=settings(tmp_path))
    with busy_clients(server) as clients:
        for wire in clients.wires:
            wire.send(request("GET", f"/{clients.key}"), request("HEAD", "/none"), request("GET", f"/{clients.key}"))
        for wire in clients.wires:
            assert wire.answer().body == clients.content
            assert wire.answer("HEAD").status == 404
            assert wire.answer().body == clients.content


def test_a_closed_connection_is_forgotten(start_server: Callable[..., Server], tmp_path: Path):
    """Some clients close or reset their connection, also during a request; the others stay."""
    server = start_server(server={"workers": 1}, arguments=settings(tmp_path))
    with busy_clients(server) as clients:
        closed, reset, asking, *clients.wires = clients.wires
        asking.send(request("GET", f"/{clients.key}"))
        asking.reset()
        reset.reset()
        closed.close()
        wait_until(clients.share_a_thread, SECONDS, "one thread for the others")
