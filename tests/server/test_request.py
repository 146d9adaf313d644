# SPDX-License-Identifier: LGPL-2.1-or-later
"""A request's environ is the one that gunicorn would make, also for later requests of a connection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http import wsgi
from gunicorn.http.message import Request

from kci_storage.net.connection import Connection
from kci_storage.net.received import ChunkedBody, LengthBody, Received
from kci_storage.server.gunicorn_parts import MalformedRequest, ParsedRequest, RequestSettings, parse
from kci_storage.server.request import MOUNT_VARIABLE, _expects_continue, make_environ, wants_to_stay

ADDRESS = "192.0.2.1", 12345
SERVER = "127.0.0.1", 3000
# Keys that differ by request, come from the worker, or are not used here.
LEFT_OUT = {
    "wsgi.errors", "wsgi.input", "wsgi.multithread", "wsgi.multiprocess", "wsgi.file_wrapper", "SERVER_SOFTWARE",
    "gunicorn.socket", "wsgi.early_hints",
}  # fmt: skip
HEADS = {
    "plain": b"GET / HTTP/1.1\r\nHost: storage\r\n\r\n",
    "escaped": b"GET /a%20b/%E6%96%87%2F?x=%20&y HTTP/1.1\r\nHost: storage:80\r\nUser-Agent: curl\r\n\r\n",
    "doubled": b"GET //a//b HTTP/1.1\r\nHost: storage\r\n\r\n",
    "old": b"HEAD /a?b#c HTTP/1.0\r\n\r\n",
    "repeated": b"GET http://other/a HTTP/1.1\r\nHost: other\r\nX-A: 1\r\nX-B: \r\nX-A: 2\r\nX-A:3\r\n\r\n",
    "body": b"PUT /a HTTP/1.1\r\nHost: storage\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n",
    "latin": b"GET /a HTTP/1.1\r\nHost: storage\r\nX-E: \xe9\r\n\r\n",
    "any": b"OPTIONS * HTTP/1.1\r\nHost: storage\r\n\r\n",
}


def connection(address: Any = ADDRESS, server: Any = SERVER) -> Connection:
    sock: Any = SimpleNamespace(is_encrypted=False)
    background: Any = None
    return Connection(sock, address, server, background)


def received(data: bytes) -> Received:
    sock: Any = SimpleNamespace(recv=lambda size: b"", recv_into=lambda buffer: 0)
    return Received(sock, data)


def parsed(head: bytes) -> ParsedRequest:
    return parse(RequestSettings(Config()), received(head))


def gunicorns(head: bytes, conn: Connection) -> dict[str, Any]:
    request = Request(Config(), received(head), conn.client)
    return without(wsgi.create(request, None, conn.client, conn.server, Config())[1])


def without(environ: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environ.items() if name not in LEFT_OUT}


@pytest.mark.parametrize("server", [SERVER, "/run/socket"], ids=["tcp", "unix"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_each_environ_is_as_gunicorn_makes_it(head: bytes, server: Any):
    conn = connection(server=server)
    make_environ(conn, parsed(b"POST /first HTTP/1.1\r\nHost: first\r\nX-First: 1\r\n\r\n"))
    expected = gunicorns(head, conn)
    if server != SERVER and b"Host" not in head:
        expected["SERVER_NAME"], expected["SERVER_PORT"] = "", "80"  # gunicorn has the socket's path
    for _ in range(2):
        assert without(make_environ(conn, parsed(head))) == expected


def test_an_absolute_target_without_a_path_is_the_root():
    assert make_environ(connection(), parsed(b"GET http://storage HTTP/1.1\r\n\r\n"))["PATH_INFO"] == "/"


def test_an_application_may_be_mounted_below_a_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(MOUNT_VARIABLE, "/files")
    head = b"GET /files/a%20b HTTP/1.1\r\nHost: storage\r\n\r\n"
    environ = make_environ(connection(), parsed(head))
    assert without(environ) == gunicorns(head, connection())
    with pytest.raises(MalformedRequest):
        make_environ(connection(), parsed(b"GET /a HTTP/1.1\r\n\r\n"))


@pytest.mark.parametrize(
    "header", ["X-Forwarded-Proto: https", "X-Forwarded-Ssl: on", "Script_Name: /a", "Path_Info: /a"]
)
@pytest.mark.parametrize("address", [ADDRESS, ""], ids=["tcp", "unix"])
def test_forwarded_headers_are_ignored(address: Any, header: str):
    """Forwarded headers are ignored here, also on a Unix socket, where gunicorn itself would trust them."""
    environ = make_environ(connection(address), parsed(f"GET /x HTTP/1.1\r\n{header}\r\n\r\n".encode()))
    assert (environ["wsgi.url_scheme"], environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("http", "", "/x")


@pytest.mark.parametrize(
    ("method", "version", "header", "stays"),
    [
        ("GET", (1, 1), "", True),
        ("GET", (1, 1), "close", False),
        ("GET", (1, 1), "TE, Close", False),
        ("GET", (1, 1), "keep-alive", True),
        ("GET", (1, 0), "", False),
        ("GET", (1, 0), "Keep-Alive", True),
        ("GET", (1, 0), "keep-alive, close", False),
        ("CONNECT", (1, 1), "keep-alive", False),
    ],
)
def test_which_connections_are_kept(method: str, version: tuple[int, int], header: str, stays: bool):
    body: Any = None
    assert wants_to_stay(ParsedRequest(method, "/", version, [], body), header) is stays


def test_what_a_client_may_expect():
    for value, expects in (("100-continue", True), ("100-Continue", True), ("", False), (" , ", False)):
        head = f"PUT /a HTTP/1.1\r\nHost: x\r\nExpect: {value}\r\nContent-Length: 1\r\n\r\n".encode()
        request = parsed(head)
        assert _expects_continue(request, make_environ(connection(), request)) is expects
    for value in ("more", "100-continue, more"):
        request = parsed(f"GET /a HTTP/1.1\r\nHost: x\r\nExpect: {value}\r\n\r\n".encode())
        with pytest.raises(MalformedRequest):
            _expects_continue(request, make_environ(connection(), request))


# Bodies


def chunked(data: bytes) -> tuple[ChunkedBody, Received]:
    source = received(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    return ChunkedBody(parse(RequestSettings(Config()), source).body), source


def test_a_body_of_known_length_ends_where_the_next_request_begins():
    source = received(b"0123456789GET /")
    body = LengthBody(source, 10)
    assert (body.read(4), body.is_read) == (b"0123", False)
    buffer = bytearray(20)
    assert (body.readinto(buffer), buffer[:6], body.is_read) == (6, b"456789", True)
    assert (body.read(), body.readinto(buffer), source.take()) == (b"", 0, b"GET /")


def test_a_body_that_is_cut_short_is_not_read_to_its_end():
    body = LengthBody(received(b"0123"), 10)
    assert (body.read(), body.is_read, body.readinto(bytearray(9)), body.is_read) == (b"0123", False, 0, False)


def test_a_chunked_body_ends_where_the_next_request_begins():
    body, source = chunked(b"4\r\n0123\r\n2\r\n45\r\n0\r\n\r\nGET /")
    assert (body.read(6), body.is_read) == (b"012345", False)
    assert (body.read(1), body.is_read, source.take()) == (b"", True, b"GET /")


def test_lines_can_be_read_of_a_body():
    """PEP 3333 requires it of a body."""
    for body in (LengthBody(received(b"a\nbc\nd"), 6), chunked(b"6\r\na\nbc\nd\r\n0\r\n\r\n")[0]):
        assert (body.readline(), list(body), body.is_read) == (b"a\n", [b"bc\n", b"d"], True)
