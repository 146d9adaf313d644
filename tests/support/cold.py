# SPDX-License-Identifier: LGPL-2.1-or-later
"""For tests of cold objects: a server whose backend fails on demand, and crowds of clients."""

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
READ_TIMEOUT = 300  # seconds; long, so that a request which a test holds up is not retried, even on a busy machine


@dataclass
class Bench:
    """A server with Azurite as its backend, the proxy between them, and the container, reached without the proxy."""

    server: Server
    proxy: FaultProxy
    container: ContainerClient

    def store(self, content: bytes, key: str | None = None, digest: str = "sha256") -> str:
        """Store an object as this server does, without it.

        :param key: None: a new one.
        :param digest: the one that is stored with the object: ``sha256``, ``md5``, or none.
        :returns: its key.
        """
        key = key or f"{new_folder()}/file.bin"
        metadata = {"uploadid": secrets.token_hex(16)}
        if digest == "sha256":
            metadata["sha256"] = hashlib.sha256(content).hexdigest()
        md5 = bytearray(hashlib.md5(content).digest()) if digest == "md5" else None
        self.container.upload_blob(
            key, content, overwrite=True, metadata=metadata, content_settings=ContentSettings(content_md5=md5)
        )
        return key

    def fetched(self, key: str) -> int:
        """How many bytes of the object the backend has sent."""
        return self.proxy.body_bytes(CONTENT, key)

    def arrived(self, key: str) -> int:
        """How many bytes of a running fill are on the server's disk; 0: none, or no fill runs."""
        digest = hashlib.sha512(key.encode()).hexdigest()
        with suppress(FileNotFoundError):  # it has just ended
            return sum(path.stat().st_size for path in self.server.cache_directory.glob(f"??/{digest}.*.part"))
        return 0

    def wait_for(self, key: str, size: int) -> None:
        """Wait until a running fill has this many bytes on the server's disk."""
        wait_until(lambda: self.arrived(key) >= size, SECONDS, f"{size} bytes of the object")

    def filler(self, key: str) -> int:
        """The process ID of the worker that runs an object's fill."""
        digest = hashlib.sha512(key.encode()).hexdigest()
        [claim] = self.server.cache_directory.glob(f"??/{digest}.fill")
        [pid] = self.server.holders(claim)
        return pid

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, over all workers; 0: there is no such series."""
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
    """A bench, during the block; at its end the server must be clean (:meth:`.Server.assert_clean`).

    :param options: the server's configuration, except for the backend.
    :param expected_errors: patterns of errors that the log may have.
    """
    name = azurite.new_container()
    with fault_proxy(azurite) as proxy, azurite.client(name) as container:
        azure = {"account": azurite.account, "key": azurite.key, "endpoint": proxy.endpoint, "container": name}
        document = {
            "driver": "azure",
            **options,
            "azure": {**azure, "read_timeout": READ_TIMEOUT, "retry_timeout": 0, **options.get("azure", {})},
            "server": {"workers": 3, **options.get("server", {})},
        }
        server = Server(folder, document)
        server.expected_errors += expected_errors
        with running(server):
            yield Bench(server, proxy, container)


@pytest.fixture(scope="module")
def shared_bench(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The server of a module's tests, which use it by the fixture ``bench``."""
    with cold_bench(azurite, tmp_path_factory.mktemp("bench"), {}) as bench:
        yield bench


@pytest.fixture
def bench(shared_bench: Bench, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A server of three workers, shared by a module's tests; each test uses keys of its own."""
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
    """Starts a server for one test: ``new_bench(cache={"max_fills": 2})``."""
    with ExitStack() as stack:

        def start(**options: Any) -> Bench:
            folder = tmp_path_factory.mktemp("bench")
            return stack.enter_context(cold_bench(azurite, folder, options, _expected_errors(request)))

        yield start


# Clients


@dataclass
class Visit:
    """One client's download."""

    expected: bytes = field(repr=False)
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    received: int = 0  # bytes of the body
    correct: bool = True  # whether the received bytes are the expected ones
    first_byte: float = float("inf")  # seconds from the request to the body's first byte
    seconds: float = 0.0  # until the end
    _head: bytes = field(default=b"", repr=False)

    @property
    def complete(self) -> bool:
        """Whether the client received the whole expected content."""
        return self.status in (200, 206) and self.correct and self.received == len(self.expected)

    @property
    def deceived(self) -> bool:
        """Whether the client received wrong or too few bytes, and could not detect it."""
        if self.status not in (200, 206):
            return False
        return not self.correct or (self.received >= int(self.headers["content-length"]) and not self.complete)

    def take(self, data: memoryview, elapsed: float) -> bool:
        """Receive a piece of the response; whether it was the last one.

        :param elapsed: seconds since the request.
        """
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
    """Clients request an object at the same moment, each on its own connection, and read to the end.

    :param count: how many clients.
    :param begun: set when each of them has received a part of the body.
    """
    visits = {_connect(server): Visit(expected) for _ in range(count)}
    buffer = bytearray(256 * 1024)
    view = memoryview(buffer)
    with selectors.DefaultSelector() as selector:
        started = time.monotonic()
        for sock in visits:
            with suppress(ConnectionError):  # its worker was killed; reading reports that too
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
    """A crowd whose clients have each received a part of the body, and go on in the background."""
    begun = threading.Event()
    visits = in_background(crowd, server, key, count, expected, headers, begun)
    assert begun.wait(CROWD_SECONDS), "not every client has received something"
    return visits


def _connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=CROWD_SECONDS)


def _receive(sock: socket.socket, buffer: bytearray) -> int:
    try:
        return sock.recv_into(buffer)
    except ConnectionResetError:
        return 0


def median_first_byte(visits: list[Visit]) -> float:
    """The median of the times to the first byte, in seconds."""
    return statistics.median(visit.first_byte for visit in visits)


def figure(case: str, **values: Any) -> None:
    """Print a figure for docs/reliability.md; ``pytest -s`` shows it."""
    print(f"\n{case}: " + ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items()))


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def some_bytes(size: int) -> bytes:
    """Random bytes."""
    return secrets.token_bytes(size)


def beginning(bench: Bench, key: str, at_least: int = 1) -> Wire:
    """A client that has begun to download an object, and has read ``at_least`` bytes of it."""
    wire = Wire(bench.server)
    wire.send(request("GET", f"/{key}"))
    assert wire.head().status == 200
    assert len(wire.read(at_least)) == at_least
    return wire


# Workers: the kernel decides which of them accepts a connection, and it may always be the same one


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Stop these processes during the block, so that other workers accept the new connections."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(_stands_still(pid) for pid in pids), SECONDS, "the workers to stop")
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _stands_still(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def from_each_worker(server: Server, ask: Callable[[], T]) -> list[T]:
    """The results of ``ask()`` from each worker in turn, while the others are stopped; they keep their locks."""
    got = []
    for pid in server.worker_pids():
        with only(server, pid):
            got.append(ask())
    return got


def only(server: Server, pid: int) -> AbstractContextManager[None]:
    """Have this worker alone accept new connections during the block."""
    return frozen(*(other for other in server.worker_pids() if other != pid))


def in_background(function: Callable[..., T], *args: Any) -> Future[T]:
    """Call a function in a thread; returns at once, with its future result."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function(*args))
        except BaseException as exc:  # noqa: BLE001  (raised where the result is wanted)
            result.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return result
