"""The HTTP that blobs are read and written by: which connections are used again, what is an answer, proxies, TLS."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kci_storage.drivers.azure.errors import Unanswered
from kci_storage.drivers.azure.http import HEAD_SIZE, TOGETHER, Answer, Pool, wait_for
from kci_storage.errors import BackendError, BackendTimeout

SECONDS = 60
MIB = 1024 * 1024
Take = Callable[[socket.socket, int], bytes]
OK = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nbody"
CREATED = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"


class Peer:
    """A server that answers each request with the next of some answers, as they are; then it ends the connection.

    :param take: takes the rest of a body in, of which so many bytes are missing; what is left of it is not taken.
    """

    def __init__(self, *answers: bytes, tls: ssl.SSLContext | None = None, take: Take | None = None):
        self.requests: list[bytes] = []
        self.connections = 0
        self._answers = iter(answers)
        self._tls = tls
        self._take = take or take_all
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Some systems' sockets hold tens of MiB, for who would seem to be silent while it takes that in.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                with sock, contextlib.suppress(OSError):
                    self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        while request := self._request(sock):
            self.requests.append(request)
            answer = next(self._answers, b"")
            sock.sendall(answer)
            if request.startswith(b"CONNECT") and self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            elif not answer or self._missing(request):
                return

    def _request(self, sock: socket.socket) -> bytes:
        received = b""
        while b"\r\n\r\n" not in received:
            piece = sock.recv(65536)
            if not piece:
                return b""
            received += piece
        return received + self._take(sock, self._missing(received))

    @staticmethod
    def _missing(request: bytes) -> int:
        """Bytes of the body that have not come."""
        head, _, body = request.partition(b"\r\n\r\n")
        return int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0) - len(body)

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()


def take_all(sock: socket.socket, size: int, pause: float = 0) -> bytes:
    """So many bytes of a body, with a pause in seconds before each half MiB."""
    body = bytearray()
    while len(body) < size:
        time.sleep(pause)
        for _ in range(8):
            piece = sock.recv(min(65536, size - len(body)))
            assert piece or len(body) == size, "the body is short"
            body += piece
    return bytes(body)


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """Starts a server."""
    with contextlib.ExitStack() as stack:

        def start(*answers: bytes, **options: Any) -> Peer:
            return stack.enter_context(contextlib.closing(Peer(*answers, **options)))

        yield start


def pool_of(peer: Peer, read_timeout: float = SECONDS, **options: str) -> Pool:
    url, proxy = options.get("url", f"http://{peer.address}"), options.get("proxy")
    return Pool(url, proxy, options.get("authorities"), connect_timeout=SECONDS, read_timeout=read_timeout)


def body_of(answer: Answer) -> bytes:
    """All of a body."""
    received, buffer = b"", memoryview(bytearray(3))
    while answer.missing:
        size = answer.receive_into(buffer)
        if size is None:
            assert wait_for([answer], SECONDS)
        else:
            received += buffer[:size]
    return received


def test_a_connection_is_used_again(peer: Callable[..., Peer]) -> None:
    there = peer(OK, OK)
    pool = pool_of(there)
    assert [body_of(pool.ask("GET", "/a", {})) for _ in range(2)] == [b"body"] * 2
    assert there.connections == 1
    assert there.requests[0] == f"GET /a HTTP/1.1\r\nHost: {there.address}\r\n\r\n".encode()


@pytest.mark.parametrize(
    "first",
    [
        OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        OK + b"HTTP/1.1 206 not asked for",
        b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["it is to be closed", "more than the answer came", "the answer has no length"],
)
def test_a_connection_is_not_used_again(peer: Callable[..., Peer], first: bytes) -> None:
    there = peer(first, OK)
    pool = pool_of(there)
    answer = pool.ask("GET", "/a", {})
    body_of(answer) if answer.status == 206 else answer.discard()
    assert body_of(pool.ask("GET", "/a", {})) == b"body"
    assert there.connections == 2


def test_a_small_body_that_nobody_wants_does_not_cost_the_connection(peer: Callable[..., Peer]) -> None:
    there = peer(b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nerror", OK)
    pool = pool_of(there)
    pool.ask("GET", "/a", {}).discard()
    assert body_of(pool.ask("GET", "/a", {})) == b"body"
    assert there.connections == 1


def test_an_answer_to_head_has_no_body(peer: Callable[..., Peer]) -> None:
    there = peer(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", OK)
    pool = pool_of(there)
    assert (pool.ask("HEAD", "/a", {}).missing, body_of(pool.ask("GET", "/a", {}))) == (0, b"body")
    assert there.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded: line\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * (HEAD_SIZE + 65536),
    ],
    ids=["another protocol", "status", "colon", "folded", "length", "endless"],
)
def test_what_is_no_answer_is_an_error(peer: Callable[..., Peer], answer: bytes) -> None:
    with pytest.raises(BackendError, match="makes no sense"):
        pool_of(peer(answer)).ask("GET", "/a", {})


def test_no_answer(peer: Callable[..., Peer]) -> None:
    with pytest.raises(Unanswered):
        pool_of(peer(b"")).ask("GET", "/a", {})
    with pytest.raises(BackendTimeout):
        Pool(f"http://{peer(b'HTTP/1.1').address}", None, None, SECONDS, read_timeout=0.1).ask("GET", "/a", {})


def test_a_body_that_breaks_off_is_an_error(peer: Callable[..., Peer]) -> None:
    there = peer(OK[:-2], b"")
    answer = pool_of(there).ask("GET", "/a", {})
    there.close()
    answer._connection.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(BackendError, match="broke off"):
        body_of(answer)


def test_a_value_of_several_lines_is_never_sent(peer: Callable[..., Peer]) -> None:
    there = peer(OK)
    with pytest.raises(BackendError):
        pool_of(there).ask("GET", "/a", {"If-Match": '"x"\r\nHost: elsewhere'})
    assert there.requests == []


# Bodies that are sent


def put(pool: Pool, body: bytes | memoryview) -> Answer:
    """Send a body."""
    return pool.ask("PUT", "/a", {"Content-Length": str(len(body))}, body)


@pytest.mark.parametrize("size", [0, 1, TOGETHER, TOGETHER + 1, MIB + 1])
def test_a_body_is_sent_whole(peer: Callable[..., Peer], size: int) -> None:
    there = peer(CREATED, CREATED)
    pool, body = pool_of(there), random.randbytes(size)
    assert [put(pool, each).status for each in (body, memoryview(bytearray(body)))] == [201, 201]
    assert [request.partition(b"\r\n\r\n")[2] for request in there.requests] == [body] * 2
    assert there.connections == 1


def test_who_takes_a_body_slowly_is_not_silent(peer: Callable[..., Peer]) -> None:
    body = random.randbytes(20 * MIB)  # more than sockets hold
    there = peer(CREATED, take=functools.partial(take_all, pause=0.2))
    assert put(pool_of(there, read_timeout=4), body).status == 201
    assert there.requests[0].endswith(body)


def test_who_takes_none_of_a_body_is_silent(peer: Callable[..., Peer]) -> None:
    release = threading.Event()
    there = peer(CREATED, take=lambda sock, size: bytes(release.wait(SECONDS) and 0))
    with pytest.raises(BackendTimeout):
        put(pool_of(there, read_timeout=0.2), bytes(20 * MIB))
    release.set()


def test_an_answer_may_come_before_the_end_of_a_body(peer: Callable[..., Peer]) -> None:
    there = peer(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", CREATED, take=lambda sock, size: b"")
    pool = pool_of(there)
    assert put(pool, bytes(20 * MIB)).status == 403
    assert put(pool, b"").status == 201
    assert there.connections == 2


def test_who_ends_the_connection_before_the_end_of_a_body_has_not_answered(peer: Callable[..., Peer]) -> None:
    with pytest.raises(Unanswered):
        put(pool_of(peer(b"", take=lambda sock, size: b"")), bytes(20 * MIB))


# Proxies and TLS


def test_a_proxy_gets_the_whole_url_and_its_password(peer: Callable[..., Peer]) -> None:
    there = peer(OK)
    pool = pool_of(there, url="http://blobs.example", proxy=f"http://user:p%40ss@{there.address}")
    assert body_of(pool.ask("GET", "/a?b", {})) == b"body"
    assert there.requests[0].splitlines() == [
        b"GET http://blobs.example/a?b HTTP/1.1",
        b"Host: blobs.example",
        b"Proxy-Authorization: Basic dXNlcjpwQHNz",
        b"",
    ]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for blobs.example, in one file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    names = ["-subj", "/CN=blobs.example", "-addext", "subjectAltName=DNS:blobs.example"]
    files = ["-keyout", path, "-out", path.with_suffix(".crt")]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*new, "-days", "1", *names, *files], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


def test_tls_through_a_proxy_is_verified(peer: Callable[..., Peer], certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    tunnel = b"HTTP/1.1 200 Connection established\r\n\r\n"
    url, authorities = "https://blobs.example", str(certificate.with_suffix(".crt"))
    there = peer(tunnel, OK, CREATED, tls=context)
    pool = pool_of(there, url=url, authorities=authorities, proxy=f"http://user:secret@{there.address}")
    assert body_of(pool.ask("GET", "/a", {})) == b"body"
    assert there.requests[0].startswith(b"CONNECT blobs.example:443 ")
    assert b"Proxy-Authorization: Basic" in there.requests[0]
    assert there.requests[1] == b"GET /a HTTP/1.1\r\nHost: blobs.example\r\n\r\n"
    body = random.randbytes(MIB)
    assert put(pool, body).status == 201
    assert there.requests[2].endswith(body)
    stranger = peer(tunnel, OK, tls=context)
    with pytest.raises(BackendError):
        pool_of(stranger, url=url, proxy=f"http://{stranger.address}").ask("GET", "/a", {})
