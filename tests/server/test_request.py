"""A request's environ is gunicorn's, also from a connection's second request on (kci_storage/server/request.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http import wsgi
from gunicorn.http.parser import RequestParser

from kci_storage.server.request import Environs, Request
from kci_storage.server.response import Response

ADDRESS = "192.0.2.1", 12345
SERVER = "127.0.0.1", 3000
ONE_EACH = {"wsgi.errors", "wsgi.input", "wsgi.multithread"}  # each request's own, and what the worker says
UNUSED = {"gunicorn.socket", "wsgi.early_hints"}  # what nothing here asks for


def connection(address: Any = ADDRESS, server: Any = SERVER) -> SimpleNamespace:
    return SimpleNamespace(client=address, server=server, cfg=Config(), sock=None)


def parsed(head: bytes, conn: SimpleNamespace) -> Request:
    parser = RequestParser(conn.cfg, iter([head]), conn.client)
    parser.mesg_class = Request
    request: Request = next(parser)
    return request


def gunicorns(head: bytes, conn: SimpleNamespace) -> dict[str, Any]:
    _, environ = wsgi.create(parsed(head, conn), None, conn.client, conn.server, conn.cfg)
    return without(environ, ONE_EACH | UNUSED)


def without(environ: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize("server", [SERVER, "/run/socket"], ids=["tcp", "unix"])
@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: storage\r\n\r\n",
        b"GET /a%20b/%E6%96%87%2F?x=%20&y HTTP/1.1\r\nHost: storage:80\r\nUser-Agent: curl\r\n\r\n",
        b"HEAD /a?b#c HTTP/1.0\r\n\r\n",
        b"GET http://other/a HTTP/1.1\r\nHost: other\r\nX-A: 1\r\nX-B: \r\nX-A: 2\r\nX-A:3\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: storage\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: storage\r\nX-E: \xe9\r\n\r\n",
    ],
    ids=["plain", "escaped", "old", "repeated", "body", "latin"],
)
def test_each_environ_is_gunicorns(head: bytes, server: Any):
    conn = connection(server=server)
    environs = Environs()
    environs.make(parsed(b"POST /first HTTP/1.1\r\nHost: first\r\nX-First: 1\r\n\r\n", conn), conn, Response)
    expected = gunicorns(head, conn)
    for _ in range(2):
        _, environ = environs.make(parsed(head, conn), conn, Response)
        assert without(environ, ONE_EACH | UNUSED) == expected


@pytest.mark.parametrize("address", [ADDRESS, ""], ids=["tcp", "unix"])
def test_nobody_is_believed_by_gunicorn(address: Any):
    """Not a neighbour on a Unix socket either, whom gunicorn itself believes."""
    head = b"GET / HTTP/1.1\r\nHost: storage\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Ssl: on\r\n\r\n"
    assert parsed(head, connection(address)).scheme == "http"
