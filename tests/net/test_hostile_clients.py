# SPDX-License-Identifier: LGPL-2.1-or-later
"""Slow and hostile clients without a proxy in front, and how long a well-behaved client waits beside them.

Each attack has more connections than the server has threads. If each of them occupied a thread, the well-behaved
client would wait for seconds, or for ever. ``pytest -s`` prints its median.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import requests

from kci_storage.net.threads import SLOW_PER_SLOT
from tests.support.cold import figure, in_background
from tests.support.harness import Server, running, wait_until
from tests.support.wire import (
    SECONDS,
    Wire,
    access,
    assert_error,
    exchange,
    get,
    new_folder,
    put,
    request,
    wait_until_tidy,
)

KIB, MIB = 1024, 1024 * 1024
WORKERS, THREADS = 2, 2
ATTACKERS = 4 * WORKERS * THREADS
LARGE = 32 * MIB  # more than the kernel's buffers hold
MANY = 12 * WORKERS * THREADS  # enough, even if the same worker accepts all of them
DRIP_SECONDS = 0.03  # between two bytes: less than SLOW_SECONDS
PAUSE_SECONDS = 0.1  # between two requests of a well-behaved client, or two steps of a slow one
BEARABLE = 0.5  # seconds by which the median may grow
ATTEMPTS = 4  # measurements, of which one must be bearable: the machine's other load comes and goes

Attack = Callable[["Scene", ExitStack], None]


class Scene:
    """A server with few threads, a small object for well-behaved clients, and a large one."""

    def __init__(self, server: Server):
        self.server = server
        folder = new_folder()
        self.small, self.large = f"{folder}/small", f"{folder}/large"
        self.content = os.urandom(4 * KIB)
        assert put(server, self.small, self.content).status_code == 201
        assert put(server, self.large, bytes(LARGE)).status_code == 201

    def latencies(self, count: int) -> list[float]:
        """Seconds that a well-behaved client's downloads take, each on a new connection, at intervals."""
        return [self._latency() for _ in range(count)]

    def _latency(self) -> float:
        time.sleep(PAUSE_SECONDS)
        started = time.monotonic()
        assert exchange(self.server, request("GET", f"/{self.small}")).body == self.content
        return time.monotonic() - started

    def wires(self, stack: ExitStack, count: int = ATTACKERS, receive_buffer: int | None = None) -> list[Wire]:
        """The given number of connections, open until the end of the attack."""
        return [stack.enter_context(Wire(self.server, receive_buffer)) for _ in range(count)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    document = {"server": {"workers": WORKERS, "threads": THREADS}}
    with running(Server(tmp_path_factory.mktemp("hostile"), document)) as server:
        yield Scene(server)


@contextmanager
def dripping(wires: Iterable[Any], step: Callable[[Any], object]) -> Iterator[None]:
    """Call the function for each connection repeatedly during the block, until the connection ends."""
    over = threading.Event()

    def run() -> None:
        going = list(wires)
        while not over.wait(DRIP_SECONDS):
            for wire in tuple(going):
                try:
                    step(wire)
                except OSError:
                    going.remove(wire)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def send_byte(wire: Wire) -> None:
    wire.send(b"x")


# The attacks


def hold_closed_connections_open(scene: Scene, stack: ExitStack) -> None:
    """Responses without a reader: the clients do not notice that their connections have ended."""
    held: list[Wire] = []
    stack.callback(lambda: [wire.close() for wire in held])

    def hold_one_more(_: object) -> None:
        held.append(Wire(scene.server))
        held[-1].send(request("GET", f"/{scene.small}", {"Connection": "close"}))

    for _ in range(24):
        hold_one_more(None)
    stack.enter_context(dripping([None], hold_one_more))


def say_nothing(scene: Scene, stack: ExitStack) -> None:
    scene.wires(stack, MANY)


def stop_in_a_head(scene: Scene, stack: ExitStack) -> None:
    for wire in scene.wires(stack, MANY):
        wire.send(b"GET /")
        wire.wait_until_taken()


def stop_in_a_later_head(scene: Scene, stack: ExitStack) -> None:
    for wire in scene.wires(stack, MANY):
        wire.send(request("GET", f"/{scene.small}"), b"GET /")
        assert wire.answer().body == scene.content


def drip_a_head(scene: Scene, stack: ExitStack) -> None:
    wires = scene.wires(stack, MANY)
    for wire in wires:
        wire.send(b"GET /")
    stack.enter_context(dripping(wires, send_byte))


def stop_in_a_body(scene: Scene, stack: ExitStack) -> None:
    folder = new_folder()
    for number, wire in enumerate(scene.wires(stack, MANY)):
        wire.send(upload_head(scene.server, f"{folder}/{number}", LARGE), b"x")
        wire.wait_until_taken()


def drip_a_body(scene: Scene, stack: ExitStack) -> None:
    folder, wires = new_folder(), scene.wires(stack, MANY)
    for number, wire in enumerate(wires):
        wire.send(upload_head(scene.server, f"{folder}/{number}", LARGE), b"x")
    stack.enter_context(dripping(wires, send_byte))


def drip_a_chunk(scene: Scene, stack: ExitStack) -> None:
    folder, wires = new_folder(), scene.wires(stack, MANY)
    for number, wire in enumerate(wires):
        head = request("PUT", f"/{folder}/{number}", {**scene.server.headers(), "Transfer-Encoding": "chunked"})
        wire.send(head, b"1000000\r\n")
    stack.enter_context(dripping(wires, send_byte))


def do_not_read(scene: Scene, stack: ExitStack) -> None:
    begin_to_read(scene, stack)


def do_not_read_several_ranges(scene: Scene, stack: ExitStack) -> None:
    begin_to_read(scene, stack, {"Range": f"bytes=0-{LARGE // 2},{LARGE // 2 + 2}-"})


def read_a_kib_per_second(scene: Scene, stack: ExitStack) -> None:
    size = int(KIB * DRIP_SECONDS)
    stack.enter_context(dripping(begin_to_read(scene, stack), lambda wire: wire.read(size)))


def send_requests_without_end(scene: Scene, stack: ExitStack) -> None:
    """The next request always arrives before the response to the last one has been sent."""

    def take_answers(wire: Wire) -> None:
        with contextlib.suppress(OSError):
            while wire.read(64 * KIB):
                pass

    def send_requests(wire: Wire) -> None:
        with contextlib.suppress(OSError):
            wire.send(request("HEAD", f"/{scene.small}") * 100_000)

    for wire in scene.wires(stack):
        in_background(send_requests, wire)
        in_background(take_answers, wire)


def begin_to_read(
    scene: Scene, stack: ExitStack, headers: dict[str, str] | None = None, count: int = MANY
) -> list[Wire]:
    """Request the large object, and read the response's head."""
    wires = scene.wires(stack, count, receive_buffer=8 * KIB)
    for wire in wires:
        wire.send(request("GET", f"/{scene.large}", headers))
    for wire in wires:
        assert wire.head().status in (200, 206)
    return wires


def upload_head(server: Server, key: str, size: int) -> bytes:
    return request("PUT", f"/{key}", {**server.headers(), "Content-Length": size})


@pytest.mark.parametrize(
    "attack",
    [
        hold_closed_connections_open,
        say_nothing,
        stop_in_a_head,
        stop_in_a_later_head,
        drip_a_head,
        stop_in_a_body,
        drip_a_body,
        drip_a_chunk,
        do_not_read,
        do_not_read_several_ranges,
        read_a_kib_per_second,
        send_requests_without_end,
    ],
)
def test_a_well_behaved_client_is_served_quickly(scene: Scene, attack: Attack):
    before = scene.latencies(20)
    bearable = statistics.median(before) + BEARABLE
    with ExitStack() as stack:
        attack(scene, stack)
        for _ in range(ATTEMPTS):
            during = scene.latencies(20)
            if statistics.median(during) < bearable:
                break
    name = attack.__name__.replace("_", " ")
    figure(name, median=statistics.median(during), slowest=max(during), idle=statistics.median(before))
    assert statistics.median(during) < bearable
    wait_until_tidy(scene.server)


def test_quick_requests_use_the_free_thread(scene: Scene):
    """Three of four threads have a slow download; 60 requests at once."""
    with ExitStack() as stack:
        wires = scene.wires(stack, WORKERS * THREADS - 1, receive_buffer=8 * KIB)
        for wire in wires:
            wire.send(request("GET", f"/{scene.large}"))
            assert wire.head().status == 200
        stack.enter_context(dripping(wires, lambda wire: wire.read(6 * KIB)))
        with ThreadPoolExecutor(60) as crowd:
            seconds = list(crowd.map(lambda _: scene.latencies(1)[0], range(60)))
    figure("60 quick ones at once", median=statistics.median(seconds), slowest=max(seconds))
    assert max(seconds) < SECONDS / 2  # the slow downloads take longer than the test waits


def test_a_refused_upload_does_not_break_the_next_request(scene: Scene):
    with requests.Session() as session:
        for _ in range(20):
            refused = session.put(f"{scene.server.url}/{new_folder()}/a", bytes(2 * MIB), timeout=SECONDS)
            assert refused.status_code == 401
            assert session.get(f"{scene.server.url}/{scene.small}", timeout=SECONDS).content == scene.content


# Heads that come in pieces


def test_a_head_may_come_in_pieces(scene: Scene):
    head = request("GET", f"/{scene.small}")
    with Wire(scene.server) as wire:
        for cut in (1, 5, len(head) - 3, len(head) - 2, len(head) - 1):
            wire.send(head[:cut])
            wire.wait_until_taken()
            wire.send(head[cut:])
            assert wire.answer().body == scene.content


def test_a_head_may_come_with_the_request_before(scene: Scene):
    head = request("GET", f"/{scene.small}")
    with Wire(scene.server) as wire:
        wire.send(head, head[:9])
        assert wire.answer().body == scene.content
        wire.send(head[9:], b"\r\n")  # an empty line, which is ignored (RFC 9112, 2.2)
        assert wire.answer().body == scene.content
        wire.send(head)
        assert wire.answer().body == scene.content


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One thread and a short send_timeout; but a busy machine may stall for a second or two, with all its clients."""
    document = {"server": {"workers": 1, "threads": 1, "send_timeout": 5}}
    with running(Server(tmp_path_factory.mktemp("impatient"), document)) as server:
        yield Scene(server)


@pytest.mark.parametrize("steps", [0, 100], ids=["silent", "dripping"])
def test_a_head_that_takes_too_long_is_refused(impatient: Scene, steps: int):
    with Wire(impatient.server) as wire, dripping([wire] if steps else [], send_byte):
        wire.send(b"GET /")
        answer = wire.answer()
        assert_error(answer, 408, impatient.server)
        assert answer.headers["Connection"] == "close"
        assert access(impatient.server, answer)["status"] == "408"


def test_a_head_without_an_end_is_refused(scene: Scene):
    with Wire(scene.server) as wire:
        wire.send(b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 20_000)
        assert_error(wire.answer(), 431, scene.server)
        assert wire.rest() == b""


def test_the_longest_idle_connection_makes_room(start_server: Callable[..., Server]):
    """When a worker has all its connections, idle ones are closed, the oldest first."""
    server = start_server(server={"workers": 1, "threads": 2, "connections": 8})
    put(server, "a", b"content")
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(20)]
        assert exchange(server, request("GET", "/a")).body == b"content"
        assert wires[0].rest() == b""
        wires[-1].send(request("GET", "/a"))
        assert wires[-1].answer().body == b"content"


# Clients on slow links


@pytest.mark.parametrize("ranges", ["", f"bytes=0-{LARGE // 2},{LARGE // 2 + 1}-"], ids=["file", "ranges"])
def test_a_slow_reader_gets_the_whole_file(impatient: Scene, ranges: str):
    """Slower than a third of the kernel's buffer per send_timeout."""
    with Wire(impatient.server, receive_buffer=128 * KIB) as wire:
        wire.send(request("GET", f"/{impatient.large}", {"Range": ranges} if ranges else {}))
        head = wire.head()
        size = int(head.headers["Content-Length"])
        received = 0
        for _ in range(20):
            received += len(wire.read(64 * KIB))
            time.sleep(0.5)  # the reader is slow
        received += len(wire.read(size - received))
        assert received == size
        assert access(impatient.server, head)["bytes"] == str(size)
        wire.send(request("GET", f"/{impatient.small}"))
        assert wire.answer().body == impatient.content


def test_each_slow_reader_gets_its_own_bytes(scene: Scene):
    content = os.urandom(LARGE)
    key = f"{new_folder()}/random"
    put(scene.server, key, content)
    with ExitStack() as stack:
        wires = scene.wires(stack)
        parts = [(number * MIB + number, LARGE - number * KIB) for number in range(len(wires))]
        for wire, (start, stop) in zip(wires, parts, strict=True):
            wire.send(request("GET", f"/{key}", {"Range": f"bytes={start}-{stop - 1}"}))
        for wire, (start, stop) in zip(wires, parts, strict=True):  # the others wait meanwhile
            body = wire.answer().body
            assert hashlib.sha256(body).digest() == hashlib.sha256(content[start:stop]).digest()


def test_a_slow_reader_that_leaves_is_logged(scene: Scene):
    with Wire(scene.server, receive_buffer=8 * KIB) as wire:
        wire.send(request("GET", f"/{scene.large}"))
        head = wire.head()
        wire.read(MIB)
        wire.reset()
    line = access(scene.server, head)
    assert line["status"] == "200" and MIB <= int(line["bytes"]) < LARGE


def test_a_client_that_leaves_between_two_requests_is_no_error(scene: Scene):
    for _ in range(20):
        with Wire(scene.server) as wire:
            wire.send(request("GET", f"/{scene.small}"))
            assert wire.answer().body == scene.content
            wire.reset()
    scene.server.assert_no_trouble()


def test_a_slow_reader_may_finish_when_the_server_stops(start_server: Callable[..., Server]):
    server = start_server(server={"workers": 1, "threads": 1})
    put(server, "a", bytes(LARGE))
    with Wire(server, receive_buffer=64 * KIB) as wire:
        wire.send(request("GET", "/a"))
        head = wire.head()
        assert exchange(server, request("GET", "/v1/health")).status == 200  # so no thread sends any more
        stopping = in_background(server.stop)
        wait_until(lambda: "Handling signal: term" in server.log(), SECONDS, "the stop")
        assert len(wire.read(LARGE)) == LARGE
        assert access(server, head)["bytes"] == str(LARGE)
    stopping.result(SECONDS)


# Too many


def send_slowly(wire: Wire, piece: int, count: int) -> int:
    """Send a body in ``count`` pieces of ``piece`` bytes; the response's status."""
    for _ in range(count):
        time.sleep(PAUSE_SECONDS)
        wire.send(bytes(piece))
    return wire.answer().status


def test_a_slow_client_is_served_while_there_is_room(impatient: Scene):
    with ExitStack() as stack:
        wires = impatient.wires(stack, 2)
        for wire in wires:
            wire.send(upload_head(impatient.server, f"{new_folder()}/a", 80))
        finished = [in_background(send_slowly, wire, 1, 80) for wire in wires]
        assert [status.result(SECONDS) for status in finished] == [201, 201]


def test_slow_clients_are_shed_when_there_are_too_many(impatient: Scene):
    """With one slow upload too many, those below MIN_RATE are shed, and one above it is served to its end."""
    server, folder, before = impatient.server, new_folder(), len(impatient.server.log())
    piece = 8 * KIB  # above that rate even on a busy machine

    def refused() -> list[str]:
        return [line for line in server.log()[before:].splitlines() if "client_disconnected" in line]

    with ExitStack() as stack:
        steady, *others = impatient.wires(stack, SLOW_PER_SLOT + 1)
        for number, wire in enumerate((steady, *others)):
            wire.send(upload_head(server, f"{folder}/{number}", 100 * piece))
            wire.wait_until_taken()
        finished = in_background(send_slowly, steady, piece, 100)
        stack.enter_context(dripping(others, send_byte))
        assert get(server, impatient.small).content == impatient.content
        wait_until(refused, SECONDS, "the slowest to be refused")
        assert finished.result(SECONDS) == 201
        assert all(f"path=/{folder}/" in line and "status=400" in line for line in refused())
    wait_until_tidy(server)
