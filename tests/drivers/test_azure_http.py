# SPDX-License-Identifier: LGPL-2.1-or-later
"""The HTTP that blobs are read and written by: which connections are used again, what is an answer, proxies, TLS."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest

from kci_storage.drivers.azure import http
from kci_storage.drivers.azure.connect import Connector, authorities, proxy_for
from kci_storage.drivers.azure.errors import Unanswered
from kci_storage.drivers.azure.http import HEAD_SIZE, TOGETHER, Answer, ConnectionPool, wait_for
from kci_storage.errors import BackendError, BackendTimeout
from tests.support.certificates import self_signed

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
        self.sockets: list[socket.socket] = []
        self.pause = 0.0  # seconds before each answer
        self.hang_up = False  # whether the connection ends after an answer
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
                self.sockets.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self._serve_requests(sock)

    def _serve_requests(self, sock: socket.socket) -> None:
        while request := self._request(sock):
            self.requests.append(request)
            answer = next(self._answers, b"")
            time.sleep(self.pause)
            sock.sendall(answer)
            if request.startswith(b"CONNECT") and self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            elif not answer or self._missing(request) or self.hang_up:
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


def pool_of(peer: Peer, read_timeout: float = SECONDS, **options: str) -> ConnectionPool:
    url, proxy = options.get("url", f"http://{peer.address}"), options.get("proxy")
    return ConnectionPool(Connector(url, proxy, options.get("authorities"), SECONDS), read_timeout)


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
        b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" * 2000,
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
    ids=["another protocol", "status", "colon", "folded", "length", "endless", "only hints", "another protocol's"],
)
def test_what_is_no_answer_is_an_error(peer: Callable[..., Peer], answer: bytes) -> None:
    with pytest.raises(BackendError, match="makes no sense"):
        pool_of(peer(answer)).ask("GET", "/a", {})


def test_no_answer(peer: Callable[..., Peer]) -> None:
    with pytest.raises(Unanswered):
        pool_of(peer(b"")).ask("GET", "/a", {})
    with pytest.raises(BackendTimeout):
        pool_of(peer(b"HTTP/1.1"), read_timeout=0.1).ask("GET", "/a", {})


def test_a_body_that_breaks_off_is_an_error(peer: Callable[..., Peer]) -> None:
    there = peer(OK[:-2], b"")
    answer = pool_of(there).ask("GET", "/a", {})
    there.close()
    answer._connection.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(BackendError, match="broke off"):
        body_of(answer)


INTERIM = [
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nContent-Length: 5\r\n\r\n",
]


@pytest.mark.parametrize("interim", [*INTERIM, b"".join(INTERIM)], ids=["100", "103", "both"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_interim_answers_are_read_past(peer: Callable[..., Peer], interim: bytes, method: str) -> None:
    final = OK if method == "GET" else CREATED
    there = peer(interim + final, OK)
    pool = pool_of(there)
    answer = pool.ask(method, "/a", {})
    assert (answer.status, body_of(answer)) == ((206, b"body") if method == "GET" else (201, b""))
    assert body_of(pool.ask("GET", "/a", {})) == b"body"
    assert there.connections == 1


# Connections that were idle


def test_one_that_ended_meanwhile_costs_no_answer(peer: Callable[..., Peer]) -> None:
    """A relay that has forgotten the connection says so only when the next request comes."""
    there = peer(OK, b"", OK)
    pool = pool_of(there)
    assert [body_of(pool.ask("GET", "/a", {})) for _ in range(2)] == [b"body"] * 2
    assert (len(there.requests), there.connections) == (3, 2)


def test_a_body_is_sent_again_whole_on_a_new_one(peer: Callable[..., Peer]) -> None:
    there = peer(CREATED, b"", CREATED)
    pool, body = pool_of(there), random.randbytes(MIB)
    assert [put(pool, body).status for _ in range(2)] == [201, 201]
    assert there.connections == 2
    assert there.requests[2].endswith(body)


def test_nothing_is_sent_again_once_an_answer_has_begun(peer: Callable[..., Peer]) -> None:
    there = peer(OK, b"HTTP/1.1 206 Part", OK)
    pool = pool_of(there)
    body_of(pool.ask("GET", "/a", {}))
    there.hang_up = True
    with pytest.raises(Unanswered):
        pool.ask("GET", "/a", {})
    assert len(there.requests) == 2


def test_a_new_connection_that_ends_at_once_is_not_made_again(peer: Callable[..., Peer]) -> None:
    there = peer(b"", OK)
    with pytest.raises(Unanswered):
        pool_of(there).ask("GET", "/a", {})
    assert there.connections == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Turns the pool's clock on by so many seconds."""
    now = [0.0]
    monkeypatch.setattr(http, "_now", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.mark.parametrize(("seconds", "connections"), [(59, 1), (61, 2)])
def test_one_that_was_idle_for_a_minute_is_not_used(
    peer: Callable[..., Peer], clock: Callable[[float], None], seconds: float, connections: int
) -> None:
    there = peer(OK, OK)
    pool = pool_of(there)
    body_of(pool.ask("GET", "/a", {}))
    clock(seconds)
    body_of(pool.ask("GET", "/a", {}))
    assert there.connections == connections


def test_old_ones_are_closed(peer: Callable[..., Peer], clock: Callable[[float], None]) -> None:
    """Even when there is always a younger one for the next request."""
    there = peer(*[OK] * 3)
    pool = pool_of(there)
    first, second = (pool.ask("GET", "/a", {}) for _ in range(2))
    body_of(first)
    clock(40)
    body_of(second)
    clock(40)
    body_of(pool.ask("GET", "/a", {}))
    assert there.connections == 2
    assert first._connection.sock.fileno() == -1, "it is still open"
    assert second._connection.sock.fileno() >= 0


def test_time_for_which_the_machine_slept_counts() -> None:
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert now <= http._now() <= now + SECONDS


DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # a program for the kernel's packet filter: accept 0 bytes of each
SO_ATTACH_FILTER = 26  # socket(7)


def forget(sock: socket.socket) -> None:
    """Have the kernel drop whatever comes for this connection, as a relay does that has forgotten it."""
    program = ctypes.create_string_buffer(DROP_ALL)
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))


@pytest.mark.parametrize("body", [b"", b"x" * MIB], ids=["small", "large"])
def test_one_that_a_relay_has_forgotten_costs_a_moment_and_no_answer(peer: Callable[..., Peer], body: bytes) -> None:
    """And only once, however many were idle."""
    there = peer(*[OK] * 3, *[CREATED] * 2)
    pool = ConnectionPool(Connector(f"http://{there.address}", None, None, connect_timeout=0.5), read_timeout=5.0)
    for answer in [pool.ask("GET", "/a", {}) for _ in range(3)]:
        body_of(answer)
    assert there.connections == 3
    for sock in there.sockets:
        forget(sock)
    lost: list[str] = []
    for name in ("first", "second"):
        headers = {"Content-Length": str(len(body))}
        assert pool.ask("PUT", f"/{name}", headers, body, functools.partial(lost.append, name)).status == 201
    assert (lost, there.connections) == (["first"], 4)


def test_an_answer_that_takes_its_time_is_waited_for(peer: Callable[..., Peer]) -> None:
    """As long as the other side acknowledges the request."""
    there = peer(OK, OK)
    pool = ConnectionPool(Connector(f"http://{there.address}", None, None, connect_timeout=0.2), SECONDS)
    body_of(pool.ask("GET", "/a", {}))
    there.pause = 1.0
    body_of(pool.ask("GET", "/a", {}))
    assert there.connections == 1


def test_connections_are_kept_alive(peer: Callable[..., Peer]) -> None:
    answer = pool_of(peer(OK)).ask("GET", "/a", {})
    assert answer._connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert answer._connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < http.IDLE_SECONDS


# Bodies that are received whole


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (OK, b"body"),
        (CHUNKED + b"0\r\n\r\n", b""),
        (CHUNKED + b"4\r\nbody\r\n0\r\n\r\n", b"body"),
        (CHUNKED + b"2;name=value\r\nbo\r\n00A\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n", b"bo0123456789"),
        (CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (MIB, b"x" * MIB), b"x" * MIB),
        (OK[:-4].replace(b": 4", b": %d" % MIB) + b"x" * MIB, b"x" * MIB),
    ],
    ids=["length", "empty", "chunk", "chunks", "large chunk", "large"],
)
def test_a_body_is_received_whole(peer: Callable[..., Peer], answer: bytes, content: bytes) -> None:
    there = peer(answer, OK)
    pool = pool_of(there)
    assert pool.ask("GET", "/a", {}).content() == content
    assert pool.ask("GET", "/a", {}).content() == b"body"
    assert there.connections == 1


def test_a_body_without_a_length_ends_with_the_connection(peer: Callable[..., Peer]) -> None:
    there = peer(b"HTTP/1.0 200 OK\r\n\r\nbody")
    there.hang_up = True
    assert pool_of(there).ask("GET", "/a", {}).content() == b"body"


@pytest.mark.parametrize("rest", [b"", b"4", b"4\r\nbo", b"4\r\nbody\r\n", b"4\r\nbody\r\n0\r\n"])
def test_a_chunked_body_that_breaks_off_is_an_error(peer: Callable[..., Peer], rest: bytes) -> None:
    there = peer(CHUNKED + rest)
    there.hang_up = True
    with pytest.raises(Unanswered):
        pool_of(there).ask("GET", "/a", {}).content()


@pytest.mark.parametrize("rest", [b"\r\n", b"x\r\n", b"-1\r\n", b"0x4\r\n", b"3\r\nbody\r\n0\r\n\r\n"])
def test_a_chunked_body_that_makes_no_sense_is_an_error(peer: Callable[..., Peer], rest: bytes) -> None:
    with pytest.raises(BackendError, match="makes no sense"):
        pool_of(peer(CHUNKED + rest)).ask("GET", "/a", {}).content()


def test_a_body_that_stops_is_a_time_out(peer: Callable[..., Peer]) -> None:
    with pytest.raises(BackendTimeout):
        pool_of(peer(CHUNKED + b"4\r\n"), read_timeout=0.2).ask("GET", "/a", {}).content()


def test_a_value_of_several_lines_is_never_sent(peer: Callable[..., Peer]) -> None:
    there = peer(OK)
    with pytest.raises(BackendError):
        pool_of(there).ask("GET", "/a", {"If-Match": '"x"\r\nHost: elsewhere'})
    assert there.requests == []


# Bodies that are sent


def put(pool: ConnectionPool, body: bytes | memoryview) -> Answer:
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


PROXIES = {"HTTP_PROXY": "http://plain:1", "HTTPS_PROXY": "http://secure:1"}
BLOBS = "https://account.blob.core.windows.net"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables that say how connections are made, and unsets all others."""
    names = [
        *PROXIES,
        "ALL_PROXY",
        "NO_PROXY",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    ]

    def set_variables(**variables: str) -> None:
        for name in names:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({}, BLOBS, None),
        (PROXIES, BLOBS, "http://secure:1"),
        (PROXIES, "http://10.1.2.3:10000/account", "http://plain:1"),
        (PROXIES | {"https_proxy": "http://lower:1"}, BLOBS, "http://lower:1"),
        ({"ALL_PROXY": "http://all:1"}, BLOBS, "http://all:1"),
        ({"HTTP_PROXY": "http://plain:1"}, BLOBS, None),
        (PROXIES | {"NO_PROXY": "*"}, BLOBS, None),
        (PROXIES | {"NO_PROXY": "example.com, .windows.net"}, BLOBS, None),
        (PROXIES | {"NO_PROXY": "windows.net:444,example.com"}, BLOBS, "http://secure:1"),
        (PROXIES | {"NO_PROXY": "windows.net:444"}, f"{BLOBS}:444", None),
        (PROXIES | {"NO_PROXY": "10.0.0.0/8"}, "http://10.1.2.3:10000/account", None),
        (PROXIES | {"NO_PROXY": "10.0.0.0/16,fd00::/8"}, "http://10.1.2.3:10000/account", "http://plain:1"),
        (PROXIES | {"NO_PROXY": "10.1.2.3"}, "http://10.1.2.3:10000/account", None),
    ],
)
def test_the_environment_names_the_proxy(environment: Any, variables: dict[str, str], url: str, proxy: str) -> None:
    environment(**variables)
    assert proxy_for(url) == proxy


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, certifi.where()),
        ({"REQUESTS_CA_BUNDLE": "/ours"}, "/ours"),
        ({"CURL_CA_BUNDLE": "/ours"}, "/ours"),
        ({"CURL_CA_BUNDLE": "/theirs", "REQUESTS_CA_BUNDLE": "/ours", "SSL_CERT_FILE": "/system"}, "/ours"),
        ({"SSL_CERT_FILE": "/system"}, None),
        ({"SSL_CERT_DIR": "/system"}, None),
    ],
)
def test_the_environment_names_the_certificates(environment: Any, variables: dict[str, str], expected: str) -> None:
    environment(**variables)
    assert authorities() == expected


@pytest.mark.parametrize("proxy", ["{}", "http://{}"])
def test_a_proxy_may_be_named_without_its_scheme(peer: Callable[..., Peer], proxy: str) -> None:
    there = peer(OK)
    pool = pool_of(there, url="http://blobs.example", proxy=proxy.format(there.address))
    assert body_of(pool.ask("GET", "/a", {})) == b"body"
    assert there.requests[0].startswith(b"GET http://blobs.example/a ")


@pytest.mark.parametrize("scheme", ["https", "socks5", "socks5h"])
def test_other_proxies_are_refused(peer: Callable[..., Peer], scheme: str) -> None:
    there = peer(OK)
    with pytest.raises(BackendError) as caught:
        pool_of(there, url="http://blobs.example", proxy=f"{scheme}://{there.address}").ask("GET", "/a", {})
    assert "a proxy must be one of http://" in (caught.value.detail or "")
    assert there.connections == 0


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_named_certificate_is_trusted(
    peer: Callable[..., Peer], certificate: Path, environment: Any, variable: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    there = peer(b"HTTP/1.1 200 Connection established\r\n\r\n", OK, tls=context)
    environment(**{variable: str(certificate.with_suffix(".crt")), "HTTPS_PROXY": f"http://{there.address}"})
    pool = ConnectionPool(Connector.from_environment("https://blobs.example", SECONDS), SECONDS)
    assert body_of(pool.ask("GET", "/a", {})) == b"body"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for blobs.example, in one file; the certificate alone is beside it (``.crt``)."""
    return self_signed(tmp_path_factory.mktemp("tls"), host="DNS:blobs.example").both


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
