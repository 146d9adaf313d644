# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests of cold objects share: a server whose backend fails as it is told, and crowds of clients."""

from __future__ import annotations

import hashlib
import os
import secrets
import selectors
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import requests
from azure.storage.blob import ContainerClient, ContentSettings

from tests.support.azurite import Azurite
from tests.support.faultproxy import CONTENT, FaultProxy, fault_proxy
from tests.support.harness import Server, running, wait_until
from tests.support.wire import SECONDS, Wire, new_folder, request

T = TypeVar("T")

MIB = 1024 * 1024
CROWD_SECONDS = 120  # after which clients give up
READ_TIMEOUT = 300  # seconds; a backend that a test holds up is not asked again on a busy machine either


@dataclass
class Bench:
    """A server over Azurite, a proxy between them, and the container, which is reached without the proxy."""

    server: Server
    proxy: FaultProxy
    container: ContainerClient

    def store(self, content: bytes, key: str | None = None, digest: str = "sha256") -> str:
        """Store an object as another program would, and give its key.

        :param digest: which one the backend gets to know: ``sha256``, ``md5``, or none.
        """
        key = key or f"{new_folder()}/file.bin"
        metadata = {"sha256": hashlib.sha256(content).hexdigest()} if digest == "sha256" else None
        md5 = bytearray(hashlib.md5(content).digest()) if digest == "md5" else None
        self.container.upload_blob(
            key, content, overwrite=True, metadata=metadata, content_settings=ContentSettings(content_md5=md5)
        )
        return key

    def fetched(self, key: str) -> int:
        """How many bytes of the object the backend has sent."""
        return self.proxy.body_bytes(CONTENT, key)

    def arrived(self, key: str) -> int:
        """How many bytes of an object that is on its way in are on the server's disk; 0 also when it is not."""
        digest = hashlib.sha512(key.encode()).hexdigest()
        with suppress(FileNotFoundError):  # it has just ended
            return sum(path.stat().st_size for path in self.server.cache_directory.glob(f"??/{digest}.*.part"))
        return 0

    def wait_for(self, key: str, size: int) -> None:
        """Wait until so many bytes of an object that is on its way in are there."""
        wait_until(lambda: self.arrived(key) >= size, SECONDS, f"{size} bytes of the object")

    def filler(self, key: str) -> int:
        """The worker that fetches an object."""
        digest = hashlib.sha512(key.encode()).hexdigest()
        [claim] = self.server.cache_directory.glob(f"??/{digest}.fill")
        [pid] = self.server.holders(claim)
        return pid

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, over all workers."""
        pairs = ",".join(f'{label}="{value}"' for label, value in labels.items())
        wanted = f"{name}{{{pairs}}}" if pairs else name
        for line in requests.get(f"{self.server.url}/metrics", timeout=SECONDS).text.splitlines():
            found, _, value = line.rpartition(" ")
            if found == wanted:
                return float(value)
        return 0.0


@contextmanager
def cold_bench(
    azurite: Azurite, folder: Path, options: Mapping[str, Any], expected_errors: Iterable[str] = ()
) -> Iterator[Bench]:
    """A bench, during the block; the server must be clean at its end.

    :param options: the server's configuration beside the backend.
    :param expected_errors: patterns of what its log may say.
    """
    name = azurite.new_container()
    with fault_proxy(azurite) as proxy, azurite.client(name) as container:
        azure = {"account": azurite.account, "key": azurite.key, "endpoint": proxy.endpoint, "container": name}
        document = {
            "driver": "azure",
            **options,
            "azure": {**azure, "read_timeout": READ_TIMEOUT, **options.get("azure", {})},
            "server": {"workers": 3, **options.get("server", {})},
        }
        server = Server(folder, document)
        server.expected_errors += expected_errors
        with running(server):
            yield Bench(server, proxy, container)


@pytest.fixture(scope="module")
def shared_bench(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The one behind ``bench``."""
    with cold_bench(azurite, tmp_path_factory.mktemp("bench"), {}) as bench:
        yield bench


@pytest.fixture
def bench(shared_bench: Bench, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A server of three workers, shared by a module's tests: each uses keys of its own."""
    before = len(shared_bench.server.log())
    shared_bench.server.expected_errors += _expected_errors(request)
    yield shared_bench
    shared_bench.proxy.bandwidth = None
    shared_bench.proxy.come_back()
    shared_bench.server.assert_no_trouble(since=before)


def _expected_errors(request: pytest.FixtureRequest) -> list[str]:
    return [pattern for mark in request.node.iter_markers("expected_errors") for pattern in mark.args]


@pytest.fixture
def new_bench(
    azurite: Azurite, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Bench]]:
    """Starts a server for a test alone: ``new_bench(cache={"max_fills": 2})``."""
    with ExitStack() as stack:

        def start(**options: Any) -> Bench:
            folder = tmp_path_factory.mktemp("bench")
            return stack.enter_context(cold_bench(azurite, folder, options, _expected_errors(request)))

        yield start


# Clients


@dataclass
class Visit:
    """What one client got."""

    expected: bytes = field(repr=False)
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    received: int = 0  # bytes of the body
    correct: bool = True  # whether they are the expected ones so far
    first_byte: float = float("inf")  # seconds from the request to the body's first byte
    seconds: float = 0.0  # until the end
    _head: bytes = field(default=b"", repr=False)

    @property
    def complete(self) -> bool:
        """Whether it got all, and nothing else."""
        return self.status in (200, 206) and self.correct and self.received == len(self.expected)

    @property
    def deceived(self) -> bool:
        """Whether it got something wrong or too little, and could not know."""
        if self.status not in (200, 206):
            return False
        return not self.correct or (self.received >= int(self.headers["content-length"]) and not self.complete)

    def take(self, data: memoryview, elapsed: float) -> bool:
        """Take what came; whether that was the end."""
        if self.status == 0:
            self._head += data
            if b"\r\n\r\n" not in self._head:
                return False
            head, _, rest = self._head.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            self.status = int(lines[0].split()[1])
            self.headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
            }
            data = memoryview(rest)
        if data:
            self.first_byte = min(self.first_byte, elapsed)
            if self.status in (200, 206):
                self.correct &= self.expected[self.received : self.received + len(data)] == data
            self.received += len(data)
        return self.received >= int(self.headers["content-length"])


def crowd(
    server: Server,
    key: str,
    count: int,
    expected: bytes,
    headers: Mapping[str, str] | None = None,
    begun: threading.Event | None = None,
) -> list[Visit]:
    """So many clients ask for an object at the same moment, each on a connection of its own, and read to the end.

    :param begun: set when every one of them has got something of a body.
    """
    visits = {_connect(server): Visit(expected) for _ in range(count)}
    buffer = bytearray(256 * 1024)
    view = memoryview(buffer)
    with selectors.DefaultSelector() as selector:
        started = time.monotonic()
        for sock in visits:
            with suppress(ConnectionError):  # its worker was killed: that is what it will read, too
                sock.sendall(request("GET", f"/{key}", headers))
            selector.register(sock, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() - started < CROWD_SECONDS:
            for found, _ in selector.select(1):
                assert isinstance(found.fileobj, socket.socket)
                sock = found.fileobj
                visit = visits[sock]
                size = _receive(sock, buffer)
                visit.seconds = time.monotonic() - started
                if not size or visit.take(view[:size], visit.seconds):
                    selector.unregister(sock)
                    sock.close()
                if begun is not None and not begun.is_set() and all(visit.received for visit in visits.values()):
                    begun.set()
        assert not selector.get_map(), "clients are still waiting"
    return list(visits.values())


def begun_crowd(
    server: Server, key: str, count: int, expected: bytes, headers: Mapping[str, str] | None = None
) -> Future[list[Visit]]:
    """A crowd of which every client has got something of the body, and goes on."""
    begun = threading.Event()
    visits = in_background(crowd, server, key, count, expected, headers, begun)
    assert begun.wait(CROWD_SECONDS), "not everybody has got something"
    return visits


def _connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=CROWD_SECONDS)


def _receive(sock: socket.socket, buffer: bytearray) -> int:
    try:
        return sock.recv_into(buffer)
    except ConnectionResetError:
        return 0


def median_first_byte(visits: list[Visit]) -> float:
    """In seconds."""
    return statistics.median(visit.first_byte for visit in visits)


def figure(case: str, **values: Any) -> None:
    """Print what docs/reliability.md shows; ``pytest -s`` lets one see it."""
    print(f"\n{case}: " + ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items()))


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def some_bytes(size: int) -> bytes:
    """Bytes that nothing else has."""
    return secrets.token_bytes(size)


def beginning(bench: Bench, key: str, at_least: int = 1) -> Wire:
    """A client that has begun to read an object, and has got at least so many bytes of it, which are read."""
    wire = Wire(bench.server)
    wire.send(request("GET", f"/{key}"))
    assert wire.head().status == 200
    assert len(wire.read(at_least)) == at_least
    return wire


# Workers: which of them takes a connection is up to the kernel, and may always be the same


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """These processes stand still during the block: who connects now is served by another worker."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(_stands_still(pid) for pid in pids), SECONDS, "the workers to stand still")
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _stands_still(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def from_each_worker(server: Server, ask: Callable[[], T]) -> list[T]:
    """What is got from each worker in turn, while the others stand still: with what they hold, such as locks."""
    got = []
    for pid in server.worker_pids():
        with only(server, pid):
            got.append(ask())
    return got


def only(server: Server, pid: int) -> AbstractContextManager[None]:
    """One worker serves whoever connects during the block."""
    return frozen(*(other for other in server.worker_pids() if other != pid))


def in_background(function: Callable[..., T], *args: Any) -> Future[T]:
    """Call a function in a thread; its result is to come."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function(*args))
        except BaseException as exc:  # noqa: BLE001  (raised where the result is wanted)
            result.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return result
