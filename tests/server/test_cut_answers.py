# SPDX-License-Identifier: LGPL-2.1-or-later
"""A response that fails after it has begun does not look complete, however its end is marked."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator

import pytest

from tests.net.test_tls import certificate
from tests.support.harness import Server, running
from tests.support.wire import SECONDS

# The server's settings, but a list fails at certain keys.
SETTINGS = """
import kci_storage.blueprints.listing
from kci_storage.errors import BackendError
from kci_storage.server.hooks import *
from kci_storage.server.hooks import post_fork as begin

FAILURES = {"backend": BackendError("the backend has failed"), "defect": ZeroDivisionError("as it is to be")}

def text_line(info):
    failure = FAILURES.get(info.key.partition("/")[0])
    if failure and info.key.endswith("/last"):
        raise failure
    return info.key

def post_fork(server, worker):
    begin(server, worker)
    kci_storage.blueprints.listing.text_line = text_line
"""
KEYS = 1000  # on the first page

pytestmark = pytest.mark.expected_errors("ZeroDivisionError")


@pytest.fixture(scope="module", params=["plain", "tls"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose lists have two pages, of which the second fails at its end."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "settings.py").write_text(SETTINGS)
    files = certificate(folder, "server") if request.param == "tls" else {}
    server = Server(folder, {"server": files}, arguments=["--config", str(folder / "settings.py")])
    server.expected_errors.append("ZeroDivisionError")
    for name in ("backend", "defect", "whole"):
        (server.storage_path / name).mkdir(parents=True)
        for number in range(KEYS):
            (server.storage_path / name / f"{number:04}").touch()
        (server.storage_path / name / "last").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REQUESTS_CA_BUNDLE", str(files.get("certfile", "")))
        with running(server):
            yield server


def ask(server: Server, prefix: str, version: str) -> tuple[bytes, bool]:
    """The received part of a list, and whether the response looked complete."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS))
        if server.url.startswith("https"):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            client = stack.enter_context(context.wrap_socket(client, suppress_ragged_eofs=False))
        client.sendall(f"GET /v1/list?prefix={prefix}/ {version}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = b""
        try:
            while data := client.recv(1 << 20):
                received += data
        except (ConnectionResetError, ssl.SSLEOFError):  # a reset in TLS
            return received, False
        return received, True


@pytest.mark.parametrize("failure", ["backend", "defect"])
def test_a_failed_response_that_ends_with_the_connection_is_reset(server: Server, failure: str) -> None:
    answer, in_order = ask(server, failure, "HTTP/1.0")
    assert not in_order
    assert b"\r\nContent-Length:" not in answer and b"\r\nTransfer-Encoding:" not in answer
    assert answer.count(f"{failure}/".encode()) <= KEYS  # a reset may lose some of them


@pytest.mark.parametrize("failure", ["backend", "defect"])
def test_a_failed_chunked_response_lacks_the_last_chunk(server: Server, failure: str) -> None:
    answer, _ = ask(server, failure, "HTTP/1.1")
    assert answer.count(f"{failure}/".encode()) == KEYS
    assert not answer.endswith(b"\r\n0\r\n\r\n")


def test_a_complete_response_ends_properly(server: Server) -> None:
    for _ in range(10):
        answer, in_order = ask(server, "whole", "HTTP/1.0")
        assert in_order
        assert answer.count(b"whole/") == KEYS + 1


def test_the_server_goes_on(server: Server) -> None:
    for _ in range(20):
        assert not ask(server, "backend", "HTTP/1.0")[1]
    assert ask(server, "whole", "HTTP/1.0")[1]
