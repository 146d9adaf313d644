# SPDX-License-Identifier: LGPL-2.1-or-later
"""nginx in front, as deployed: TLS, and hits that nginx sends. Downloads themselves are in ``test_downloads.py``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.deploy.nginx import Frontend, nginx
from tests.support.harness import Server, wait_until
from tests.support.wire import SECONDS, Wire, access, get, new_folder, put, request, wait_until_tidy

MIB = 1 << 20


@pytest.fixture
def start(
    start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Frontend]]:
    """Starts a server behind nginx: ``start({"threads": 1}, user="www-data")``."""
    with ExitStack() as stack:

        def started(options: dict[str, Any] | None = None, **of_nginx: Any) -> Frontend:
            settings = {"accel_redirect": "/_cache/", "trusted_proxies": 1, **(options or {})}
            server = start_server("azure", server=settings)
            return stack.enter_context(nginx(tmp_path_factory.mktemp("nginx"), server, **of_nginx))

        yield started


def stored(server: Server, content: bytes) -> str:
    """A new object, which is in the cache; returns its key."""
    key = f"{new_folder()}/file.bin"
    assert put(server, key, content).status_code == 201
    return key


def sent_by_server(server: Server, answer: Any) -> int:
    """How many bytes of an answer the server itself has sent, to nginx or to the client."""
    return int(access(server, answer)["bytes"])


def test_over_tls(start: Callable[..., Frontend]):
    server = start()
    content = os.urandom(MIB)
    key = f"{new_folder()}/a"
    url, tls = f"{server.tls_url}/{key}", {"verify": str(server.certificate), "timeout": SECONDS}
    assert requests.put(url, content, headers=server.headers(), **tls).status_code == 201
    assert requests.get(url, **tls).content == content
    redirected = requests.get(f"{server.redirected_url}/{key}?download=1", allow_redirects=False, timeout=SECONDS)
    assert redirected.status_code == 301
    assert redirected.headers["Location"].endswith(f"/{key}?download=1")


def test_the_log_has_the_clients_real_address(start: Callable[..., Frontend]):
    server = start()
    answer = get(server, stored(server, b"x"), {"X-Forwarded-For": "192.0.2.1"})
    assert access(server, answer)["ip"] == "127.0.0.1"


def test_nginx_sends_hits_and_the_server_what_needs_its_decision(start: Callable[..., Frontend]):
    server = start()
    content = os.urandom(100_000)
    key = stored(server, content)
    etag = get(server, key).headers["ETag"]
    for headers in ({}, {"Range": "bytes=10-19"}, {"Range": "bytes=-5"}):
        answer = get(server, key, headers)
        assert answer.headers["X-Cache"] == "hit"
        assert (len(answer.content) > 0, sent_by_server(server, answer)) == (True, 0), headers
    for headers in ({"If-Match": etag}, {"Range": "bytes=0-1,5-6"}, {"If-Range": etag, "Range": "bytes=5-"}):
        answer = get(server, key, headers)
        assert sent_by_server(server, answer) == len(answer.content) > 0, headers


@pytest.mark.skipif(os.getuid() != 0, reason="only root may have nginx run as somebody else")
def test_the_server_sends_a_file_that_nginx_may_not_read(start: Callable[..., Frontend]):
    server = start(user="www-data")
    content = os.urandom(100_000)
    key = stored(server, content)
    assert_the_same(get(server, key), get(server.direct, key, {"If-Match": "*"}), content)


def test_the_server_sends_a_file_that_is_gone_when_nginx_opens_it(start: Callable[..., Frontend], tmp_path: Path):
    server = start(cache=tmp_path)
    content = os.urandom(100_000)
    key = stored(server, content)
    assert_the_same(get(server, key), get(server.direct, key, {"If-Match": "*"}), content)
    part = get(server, key, {"Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, content[5:10])


def assert_the_same(through: requests.Response, direct: requests.Response, content: bytes) -> None:
    assert through.status_code == direct.status_code == 200
    assert through.content == direct.content == content
    own = {"Server", "Date", "Connection", "X-Request-ID"}
    assert {name: value for name, value in through.headers.items() if name not in own} == {
        name: value for name, value in direct.headers.items() if name not in own
    }


def test_a_worker_is_free_while_nginx_sends(start: Callable[..., Frontend]):
    server = start({"workers": 1, "threads": 1})
    key = stored(server, os.urandom(32 * MIB))
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(Wire(server, receive_buffer=64 * 1024)) for _ in range(4)]
        for reader in readers:
            reader.send(request("GET", f"/{key}"))
            answer = reader.head()  # the rest is not read
            assert (answer.status, sent_by_server(server, answer)) == (200, 0)  # so the server has finished
        assert get(server, key, {"Range": "bytes=0-9"}).status_code == 206
    assert get(server, key).status_code == 200


def test_an_upload_is_not_buffered(start: Callable[..., Frontend]):
    """nginx does not buffer it: the server has the first bytes before the last ones are sent."""
    server = start()
    key = f"{new_folder()}/a"
    with Wire(server) as wire:
        wire.send(request("PUT", f"/{key}", {**server.headers(), "Content-Length": 2 * MIB}), b"x" * MIB)
        wait_until(lambda: server.is_writing(key), SECONDS, "the upload's lock")
        wire.send(b"x" * MIB)
        assert wire.answer().status == 201
    assert get(server, key).content == b"x" * 2 * MIB


def test_a_refused_upload_costs_nothing(start: Callable[..., Frontend]):
    server = start()
    with Wire(server) as wire:
        wire.send(request("PUT", f"/{new_folder()}/a", {"Expect": "100-continue", "Content-Length": 4 << 30}))
        answer = wire.head()
        while answer.status == 100:  # nginx's own
            answer = wire.head()
        assert answer.status == 401


def test_a_key_of_the_greatest_length(start: Callable[..., Frontend]):
    server = start()
    key = "/".join(["%F0%9F%90%A7" * 60] * 16)  # 16 * 60 penguins of 12 bytes, and 15 slashes
    assert put(server, key, b"content").status_code == 201
    assert get(server, key).content == b"content"


def test_an_upload_that_is_cut_off_leaves_nothing(start: Callable[..., Frontend]):
    server = start()
    key = f"{new_folder()}/a"
    with Wire(server) as wire:
        wire.send(request("PUT", f"/{key}", {**server.headers(), "Content-Length": 2 * MIB}), b"x" * MIB)
        wait_until(lambda: server.is_writing(key), SECONDS, "the upload's lock")
    wait_until_tidy(server)
    assert get(server, key).status_code == 404
