# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests as real clients write them: unusual, but allowed, so they are answered like the usual ones."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import pytest
import requests

from tests.support.harness import Server
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Wire,
    assert_error,
    exchange,
    form,
    get,
    new_folder,
    part,
    put,
    request,
)

HEAD = b"Host: storage\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"\r\nGET /{key} HTTP/1.1\r\n",
        b"GET /{key} HTTP/1.2\r\n",
        b"GET /{key} HTTP/1.9\r\n",
        b"GET /{key} HTTP/1.1\r\nExpect:\r\n",
        b"GET /{key} HTTP/1.1\r\nExpect: \r\nConnection: TE\r\n",
        b"GET /{key} HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
        b"GET /{key} HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        b"GET http://storage/{key} HTTP/1.1\r\n",
        b"GET /./{key} HTTP/1.1\r\n",
        b"GET /{folder}/./a HTTP/1.1\r\n",
        b"GET /{folder}/././a HTTP/1.1\r\n",
        b"GET /{folder}/%2e/a HTTP/1.1\r\n",
        b"GET /{folder}/./a?x=/./ HTTP/1.1\r\n",
    ],
    ids=repr,
)
def test_an_unusual_request_gets_the_usual_answer(server: Server, head: bytes):
    folder = new_folder()
    put(server, f"{folder}/a", b"content")
    data = head.replace(b"{key}", f"{folder}/a".encode()).replace(b"{folder}", folder.encode()) + HEAD
    with Wire(server) as wire:
        for _ in range(2):  # on one connection, which is kept
            wire.send(data)
            answer = wire.answer()
            assert (answer.status, answer.body, answer.headers["Connection"]) == (200, b"content", "keep-alive")
        wire.send(data.replace(b"GET", b"HEAD"))
        assert wire.answer("HEAD").headers["Content-Length"] == "7"


def test_an_absolute_target_without_a_path_is_the_root(local_server: Server):
    for target in (b"http://storage", b"http://storage/", b"http://storage?x"):
        assert exchange(local_server, b"GET " + target + b" HTTP/1.1\r\n" + HEAD).body == b"KernelCI Proxy Server"


@pytest.mark.parametrize("name", ["ü.txt", "u\u0308.txt", "文件", "🎉b"])
def test_a_path_may_be_utf_8_as_it_is(server: Server, name: str):
    """busybox wget and lftp leave the percent-encoding to the server."""
    folder = new_folder()
    put(server, f"{folder}/{quote(name)}", b"content")
    raw = f"/{folder}/{name}".encode()
    for method in ("GET", "HEAD"):
        answer = exchange(server, method.encode() + b" " + raw + b" HTTP/1.1\r\n" + HEAD)
        assert (answer.status, answer.headers["Content-Length"]) == (200, "7")
    with Wire(server) as wire:  # by a method that writes, and with an empty line before it
        wire.send(b"\r\n" + request("PUT", raw, server.headers(), b"another"))
        assert wire.answer().status == 200
        wire.send(b"GET " + raw + b" HTTP/1.1\r\nX-Name: \xfc\r\n" + HEAD)
        assert wire.answer().body == b"another"


@pytest.mark.parametrize("path", [b"/\xfc.txt", b"/a\xc3", b"/\xed\xa0\x80", b"/\xff"])
def test_a_path_that_is_neither_encoded_nor_utf_8_is_refused(local_server: Server, path: bytes):
    with Wire(local_server) as wire:
        wire.send(b"GET " + path + b" HTTP/1.1\r\n" + HEAD)
        assert_error(wire.answer(), 400, local_server, says=["UTF-8"])
        assert wire.rest() == b""


def test_a_folder_may_have_dot_segments(local_server: Server):
    folder = new_folder()
    put(local_server, f"{folder}/a", b"content")
    for path in (f"/{folder}/.", f"/{folder}/./", f"/./{folder}/"):
        answer = exchange(local_server, request("GET", path, {"Accept": "application/json"}))
        assert answer.status == 200, path
        assert f"{folder}/a".encode() in answer.body


@pytest.mark.parametrize(
    "path",
    [
        "//metrics", "/%2fmetrics", "/%2Fmetrics", "///metrics", "/./metrics", "/%2e/metrics", "//v1/list",
        "/v1//list", "/v1/./list", "/v1/list/.", "//upload", "//robots.txt", "/./", "/.", "//",
        "/v1/browse//", "//v1/browse/", "/./v1/browse/", "/%76%31/../metrics",
    ],
)  # fmt: skip
def test_the_servers_own_routes_have_one_spelling(local_server: Server, path: str):
    """A proxy in front decides by the path who may read the metrics."""
    for method in ("GET", "HEAD"):
        assert exchange(local_server, request(method, path)).status == 404


def test_doubled_slashes_are_redirected_if_there_is_such_a_file(server: Server):
    folder = new_folder()
    put(server, f"{folder}/b/{quote('ü 1')}", b"content")
    for path in (f"//{folder}/b/%C3%BC%201", f"/{folder}//b/%C3%BC%201", f"/{folder}///b//%C3%BC%201"):
        answer = exchange(server, request("GET", path + "?download=1", {"Host": "elsewhere"}))
        assert (answer.status, answer.headers["Location"]) == (308, f"/{folder}/b/%C3%BC%201?download=1")
        assert exchange(server, request("HEAD", path)).status == 308
    for path in (f"//{folder}/none", f"/{folder}//b/", f"/{folder}/b//..//b"):
        assert exchange(server, request("GET", path)).status == 404


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=x", "text/plain; version=", "*/*;version=9"]
)
def test_metrics_in_an_unknown_version_are_the_default_ones(local_server: Server, accept: str):
    answer = get(local_server, "metrics", {"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")


def test_a_user_who_may_write_nothing_is_refused_before_the_body(start_server: Callable[..., Server]):
    server = start_server(users=[{"name": "user@example.com", "prefixes": [""]}, {"name": "none", "prefixes": []}])
    body = form(part("file0", b"content", "a"), part("path", b"x"))
    for email in ("none", "somebody@example.com"):
        for target in ("/upload", "/v1/file", "/v1/archive"):
            headers = {**server.headers(email), **FORM_TYPE, "Content-Length": len(body), "Expect": "100-continue"}
            with Wire(server) as wire:
                wire.send(request("POST", target, headers))
                assert wire.answer().status == 403  # without 100 Continue
    response = requests.post(f"{server.url}/upload", body, headers={**server.headers(), **FORM_TYPE}, timeout=SECONDS)
    assert response.status_code == 200
