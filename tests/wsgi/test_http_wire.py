# SPDX-License-Identifier: LGPL-2.1-or-later
"""HTTP as bytes on a connection: hostile targets, early answers, connections that last and connections that break."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.support.harness import Server, running, wait_until
from tests.support.wire import (
    BOUNDARY,
    FORM_TYPE,
    SECONDS,
    Wire,
    access,
    assert_common_headers,
    assert_error,
    chunked,
    exchange,
    form,
    get,
    keys,
    new_folder,
    part,
    put,
    request,
    stored_by_another_program,
    temporary_files,
    wait_until_tidy,
)

GIB = 1 << 30

# Targets


@pytest.mark.parametrize(
    "target",
    [
        b"/../config.toml",
        b"/..",
        b"/.",
        b"/%2e%2e/config.toml",
        b"/%2E%2e%2Fconfig.toml",
        b"/a/../../config.toml",
        b"/a/%2e%2e/b",
        b"/a/./b",
        b"//a",
        b"///etc/passwd",
        b"/a//b",
        b"/a/",
        b"/%00",
        b"/a%00b",
        b"/a%0ab",
        b"/a%0d%0ab",
        b"/a%7fb",
        b"/a%c2%85b",
        b"/%5c",
        b"/..%5cconfig.toml",
        b"/%ff",
        b"/a%c3",
        b"/%ed%a0%80",
        b"/%c0%ae%c0%ae/config.toml",
        b"/.kci/meta",
        b"/.kci/tmp/x",
        b"/%2ekci/lock",
        b"/upload",
        b"/v1",
        b"/v1/nothing",
        b"/v1/../config.toml",
        b"/" + b"a" * 256,
        b"/" + b"a/" * 254 + b"a",
        b"/" + b"/".join([b"a" * 200] * 6),
        b"/" + b"%F0%9F%8E%89" * 1025,
        b"/%",
        b"/%zz",
        b"http://elsewhere/../config.toml",
    ],
    ids=repr,
)
def test_a_hostile_target_is_not_found(server: Server, target: bytes):
    assert_error(exchange(server, request("GET", target)), 404, server)
    assert exchange(server, request("HEAD", target)).status == 404


def test_internal_files_are_no_objects(local_server: Server):
    put(local_server, f"{new_folder()}/a", b"content")
    internal = [path for path in (local_server.storage_path / ".kci").rglob("*") if path.is_file()]
    assert internal  # else this would show nothing
    for path in internal:
        assert exchange(local_server, request("GET", f"/{path.relative_to(local_server.storage_path)}")).status == 404


def test_the_longest_key_works_and_a_longer_target_is_refused(server: Server):
    segment = "🎉" * 63  # 252 bytes, of the 255 that a segment may have
    key = "/".join([segment] * 16)  # 1,023 characters
    quoted = requests.utils.quote(key)
    assert len(quoted) > 12_000
    assert put(server, quoted, b"deep").status_code == 201
    assert exchange(server, request("GET", "/" + quoted)).body == b"deep"
    assert get(server, quoted).content == b"deep"
    assert requests.delete(f"{server.url}/{quoted}", headers=server.headers(), timeout=SECONDS).status_code == 204
    assert exchange(server, request("GET", "/" + "a" * 20_000)).status in (404, 414)


def test_the_target_may_be_a_whole_url(server: Server):
    assert exchange(server, request("GET", b"http://elsewhere:1234/")).body == b"KernelCI Proxy Server"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"get / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xc3 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"G\xc3\x89T / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET /a\x01b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 2\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    ],
    ids=repr,
)
def test_what_is_no_http_is_refused_and_ends_the_connection(local_server: Server, data: bytes):
    with Wire(local_server) as wire:
        wire.send(data, b"GET / HTTP/1.1\r\nHost: smuggled\r\n\r\n")
        answer = wire.answer()
        assert_error(answer, 501 if b"xchunked" in data else 400, local_server)
        assert answer.headers["Connection"] == "close"
        assert wire.rest() == b""  # no second answer
    assert access(local_server, answer)["error"].startswith("malformed_request")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("GET", "/" + "a" * 20_000), 414),
        (request("GET", "/", {"Authorization": "x" * 20_000}), 431),
        (request("GET", "/", {f"X-{number}": "x" for number in range(200)}), 431),
        (request("PUT", "/a", {"Expect": "nonsense"}, b""), 417),
    ],
    ids=["path", "header", "headers", "expectation"],
)
def test_what_is_too_much_is_refused(local_server: Server, data: bytes, status: int):
    assert_error(exchange(local_server, data), status, local_server)


@pytest.mark.parametrize(("size", "end"), [(20_000, b"\r\n"), (70_000, b"")], ids=["whole", "endless"])
def test_a_refused_heads_accept_and_request_id_are_used(local_server: Server, size: int, end: bytes):
    """A refused head may have named the preferred form of the response, and the request ID."""
    said = {"Accept": "application/json", "X-Request-ID": new_folder()}
    head = request("GET", "/", {**said, "Padding": "x" * size}).removesuffix(b"\r\n") + end
    answer = exchange(local_server, head)
    assert (answer.status, answer.headers["Content-Type"]) == (431, "application/problem+json")
    assert_common_headers(answer)
    assert json.loads(answer.body)["title"] == "Request Header Fields Too Large"
    assert answer.headers["X-Request-ID"] == said["X-Request-ID"]
    assert access(local_server, answer)["status"] == "431"
    with Wire(local_server) as wire:
        wire.send(head.replace(b"GET", b"HEAD"))
        assert wire.answer("HEAD").status == 431
        assert wire.rest() == b""


NO_HOST = b"GET %b HTTP/1.1\r\n%b\r\n"


@pytest.mark.parametrize("target", [b"/v1/health", b"/there", b"http://storage/there"])
@pytest.mark.parametrize(
    "fields",
    [b"", b"Host:\r\n", b"Host: a b\r\n", b"Host: a/b\r\n", b"Host: [::1\r\n", b"Host: a:b\r\n", b"Host: a@b\r\n"],
)
def test_a_request_names_its_host(local_server: Server, target: bytes, fields: bytes):
    put(local_server, "there", b"content")
    with Wire(local_server) as wire:
        wire.send(NO_HOST % (target, fields))
        answer = wire.answer()
        assert_error(answer, 400, local_server, says=["Host"])
        assert wire.rest() == b""
    assert access(local_server, answer)["error"].startswith("malformed_request")


@pytest.mark.parametrize("host", ["storage", "a.b-c_d:80", "192.0.2.1:3000", "[2001:db8::1]:3000", "a:", "STORAGE."])
def test_a_host_may_be_any_name(local_server: Server, host: str):
    assert exchange(local_server, request("GET", "/v1/health", {"Host": host})).status == 200


@pytest.mark.parametrize(
    ("method", "target", "fields", "status", "error"),
    [
        ("PUT", "/{key}", {}, 411, "length_required"),
        ("POST", "/upload", FORM_TYPE, 411, "length_required"),
        ("POST", "/v1/file", FORM_TYPE, 411, "length_required"),
        ("POST", "/v1/archive", FORM_TYPE, 411, "length_required"),
        ("PUT", "/{key}", {"Transfer-Encoding": "gzip, chunked"}, 501, "transfer_coding"),
        ("PUT", "/{key}", {"Transfer-Encoding": "identity, chunked"}, 501, "transfer_coding"),
        ("POST", "/upload", {**FORM_TYPE, "Transfer-Encoding": "deflate, chunked"}, 501, "transfer_coding"),
        ("PUT", "/{key}", {"Transfer-Encoding": "br"}, 501, "malformed_request"),
        ("PUT", "/{key}", {"Content-Encoding": "gzip", "Content-Length": "3"}, 415, "content_encoding"),
        ("PUT", "/{key}", {"Content-Encoding": "x", "Transfer-Encoding": "chunked"}, 415, "content_encoding"),
    ],
)
def test_a_body_that_cannot_be_taken_changes_nothing(
    local_server: Server, method: str, target: str, fields: dict[str, str], status: int, error: str
):
    key = f"{new_folder()}/a"
    put(local_server, key, b"as it was")
    with Wire(local_server) as wire:
        wire.send(request(method, target.format(key=key), {**local_server.headers(), **fields}))
        answer = wire.answer()
        assert_error(answer, status, local_server)
        assert answer.headers["Connection"] == "close"
        assert wire.rest() == b""
    assert answer.headers.get("Accept-Encoding") == ("identity" if status == 415 else None)
    assert access(local_server, answer)["error"].startswith(f"{error}:")
    assert get(local_server, key).content == b"as it was"


def test_a_body_that_is_not_encoded_may_say_so(local_server: Server):
    assert put(local_server, f"{new_folder()}/a", b"content", Content_Encoding="identity").status_code == 201


def test_a_malformed_header_shows_no_token(local_server: Server):
    token = local_server.token()
    for line in (f"Authorization Bearer {token}", f"Authorization : Bearer {token}", f"Authorization: {token}\x01"):
        answer = exchange(local_server, f"GET / HTTP/1.1\r\nHost: x\r\n{line}\r\n\r\n".encode())
        assert_error(answer, 400, local_server)
        access(local_server, answer)
    assert token not in local_server.log()


# Common headers


def answers(server: Server) -> Iterator[tuple[int, bytes]]:
    """One response from each part of the server that makes responses: the status, and the request."""
    key, write = new_folder(), server.headers()
    yield 201, request("PUT", f"/{key}", write, b"content")
    yield 200, request("GET", f"/{key}")
    yield 206, request("GET", f"/{key}", {"Range": "bytes=1-2"})
    yield 304, request("GET", f"/{key}", {"If-None-Match": "*"})
    yield 412, request("GET", f"/{key}", {"If-Match": '"another"'})
    yield 416, request("GET", f"/{key}", {"Range": "bytes=7-"})
    yield 200, request("HEAD", f"/{key}")
    yield 204, request("DELETE", f"/{key}", write)
    yield 404, request("GET", f"/{key}")
    yield 401, request("DELETE", f"/{key}")
    yield 400, request("PUT", "/v1/mine", write, b"content")
    yield 400, request("POST", "/v1/archive", write, b"content")
    yield 405, request("POST", f"/{key}", write, b"content")
    yield 405, request("POST", "/", write, b"content")
    yield 403, request("GET", f"/{key}", {"User-Agent": "GPTBot/1.2"})
    yield 411, request("PUT", f"/{key}", write)
    yield 501, request("PUT", f"/{key}", {**write, "Transfer-Encoding": "gzip, chunked"})
    yield 308, request("GET", "/v1/browse")
    yield 200, request("OPTIONS", f"/{key}")
    for path in (
        "/",
        "/v1/health",
        "/v1/ready",
        "/v1/list",
        "/v1/browse/",
        "/metrics",
        "/robots.txt",
        "/favicon.ico",
    ):
        yield 200, request("GET", path)
    yield 400, b"nonsense\r\n\r\n"
    yield 414, request("GET", "/" + "a" * 20_000)
    yield 417, request("PUT", "/a", {"Expect": "nonsense"}, b"")
    yield 431, request("GET", "/", {f"X-{number}": "x" for number in range(200)})


def test_every_answer_has_the_same_headers_and_its_line(local_server: Server):
    for status, data in answers(local_server):
        answer = exchange(local_server, data)
        assert answer.status == status, data
        assert_common_headers(answer)
        assert access(local_server, answer)["status"] == str(status)


def test_a_browser_may_ask_with_any_headers(local_server: Server):
    said = {
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "cache-control, x-requested-with",
    }
    answer = exchange(local_server, request("OPTIONS", "/k", said))
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Headers"] == "cache-control, x-requested-with"
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, HEAD"
    for nonsense in ("", "a b", "a,,b", "a: b", "a\xff"):
        answer = exchange(
            local_server, request("OPTIONS", "/k", {**said, "Access-Control-Request-Headers": nonsense})
        )
        assert "If-None-Match" in answer.headers["Access-Control-Allow-Headers"]


def test_a_redirect_names_a_path(local_server: Server):
    """Only the client knows under which name, and through which proxy, it reaches this server."""
    answer = exchange(local_server, request("GET", "/v1/browse?marker=a%20b", {"Host": "elsewhere:1"}))
    assert (answer.status, answer.headers["Location"]) == (308, "/v1/browse/?marker=a%20b")
    assert b"elsewhere" not in answer.body


# Persistent connections


def put_request(server: Server, key: str, body: bytes, **headers: str) -> bytes:
    return request("PUT", f"/{key}", {**server.headers(), **headers}, body)


def post_request(server: Server, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    return request("POST", "/upload", {**server.headers(), **FORM_TYPE, **(headers or {})}, body)


def test_a_connection_serves_many_requests(server: Server):
    folder = new_folder()
    with Wire(server) as wire:
        wire.send(put_request(server, f"{folder}/a", b"first"))
        assert wire.answer().status == 201
        wire.send(request("GET", f"/{folder}/a"))
        assert wire.answer().body == b"first"
        wire.send(post_request(server, form(part("path", folder.encode()), part("file0", b"second", "b"))))
        assert wire.answer().status == 200
        wire.send(request("HEAD", f"/{folder}/b"))
        assert wire.answer("HEAD").headers["Content-Length"] == "6"
        wire.send(request("GET", f"/{folder}/b", {"Range": "bytes=1-2"}))
        assert wire.answer().body == b"ec"
        wire.send(request("GET", f"/{folder}/b", {"If-None-Match": "*"}))
        assert wire.answer().status == 304
        wire.send(request("GET", f"/{folder}/none"))
        assert wire.answer().status == 404
        wire.send(request("DELETE", f"/{folder}/b", server.headers()))
        assert wire.answer().status == 204
        wire.send(request("GET", "/"))
        assert wire.answer().body == b"KernelCI Proxy Server"


def test_requests_may_come_before_the_answers(server: Server):
    folder = new_folder()
    with Wire(server) as wire:
        wire.send(
            put_request(server, f"{folder}/a", b"x" * 300_000),
            request("GET", f"/{folder}/a"),
            post_request(server, form(part("path", folder.encode()), part("file0", b"y" * 300_000, "b"))),
            request("HEAD", f"/{folder}/b"),
            request("GET", f"/{folder}/b"),
        )
        assert wire.answer().status == 201
        assert wire.answer().body == b"x" * 300_000
        assert wire.answer().status == 200
        assert wire.answer("HEAD").status == 200
        assert wire.answer().body == b"y" * 300_000


def test_http_1_0_is_answered(local_server: Server):
    with Wire(local_server) as wire:
        wire.send(b"GET / HTTP/1.0\r\n\r\n")
        assert wire.rest().endswith(b"\r\n\r\nKernelCI Proxy Server")


def test_an_empty_body_says_so(server: Server):
    folder = new_folder()
    with Wire(server) as wire:
        wire.send(put_request(server, f"{folder}/empty", b""), request("GET", f"/{folder}/empty"))
        assert wire.answer().status == 201
        answer = wire.answer()
        assert (answer.status, answer.headers["Content-Length"]) == (200, "0")


@pytest.mark.parametrize("value", ["close", "TE, close", "Close , TE", "keep-alive,\tclose"])
def test_a_client_that_will_leave_is_let_go(local_server: Server, value: str):
    with Wire(local_server) as wire:
        wire.send(request("GET", "/v1/health", {"Connection": value}), request("GET", "/v1/health"))
        assert wire.answer().headers["Connection"] == "close"
        assert wire.rest() == b""


# 100 Continue, and answers that come before the body


EXPECT = {"Expect": "100-continue"}


def test_an_upload_that_waits_for_100_continue_gets_it(server: Server):
    folder = new_folder()
    body = form(part("path", folder.encode()), part("file0", b"by form", "b"))
    for head, content in (
        (put_request(server, f"{folder}/a", b"by put", **EXPECT), b"by put"),
        (post_request(server, body, EXPECT), body),
    ):
        with Wire(server) as wire:
            wire.send(head.removesuffix(content))
            assert wire.head().status == 100
            wire.send(content)
            assert wire.answer().status in (200, 201)
    assert get(server, f"{folder}/a").content == b"by put"
    assert get(server, f"{folder}/b").content == b"by form"


def test_a_client_that_does_not_wait_for_100_continue_is_served(server: Server):
    folder = new_folder()
    with Wire(server) as wire:
        wire.send(put_request(server, f"{folder}/a", b"content", **EXPECT), request("GET", f"/{folder}/a"))
        answer = wire.head()
        if answer.status == 100:
            answer = wire.answer()
        else:
            wire.read(int(answer.headers["Content-Length"]))
        assert answer.status == 201
        assert wire.answer().body == b"content"


def refusals(server: Server) -> Iterator[tuple[int, str, str, dict[str, str]]]:
    """Uploads that are refused before their body is read: the status, and the request."""
    allowed, bad = server.headers("limited@example.com"), {"Authorization": "Bearer nonsense"}
    yield 401, "PUT", "/allowed/a", {}
    yield 401, "PUT", "/allowed/a", bad
    yield 401, "POST", "/upload", {**bad, **FORM_TYPE}
    yield 401, "POST", "/v1/file", {**bad, **FORM_TYPE}
    yield 403, "PUT", "/elsewhere/a", allowed
    yield 400, "PUT", "/allowed//a", allowed
    yield 400, "PUT", "/allowed/a", {**allowed, "Content-MD5": "nonsense"}
    yield 400, "PUT", "/allowed/a", {**allowed, "Content-Range": "bytes 0-9/10"}
    yield 400, "PUT", "/allowed/a", {**allowed, "Content-Type-Upstream": "nonsense"}
    yield 415, "PUT", "/allowed/a", {**allowed, "Content-Encoding": "gzip"}
    yield 400, "POST", "/upload", allowed
    yield 412, "PUT", "/allowed/a", {**allowed, "If-Match": '"none"'}
    yield 413, "PUT", "/allowed/a", allowed
    yield 413, "POST", "/upload", {**allowed, **FORM_TYPE}
    yield 405, "POST", "/allowed/a", allowed
    yield 405, "PUT", "/", allowed
    yield 404, "GET", "/allowed/a", {}


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a size limit for uploads, and a user with permission for one folder only."""
    document = {
        "server": {"max_upload_bytes": 20 * GIB},
        "users": [{"name": "limited@example.com", "prefixes": ["allowed"]}],
    }
    with running(Server(tmp_path_factory.mktemp("strict"), document)) as server:
        yield server


@pytest.mark.parametrize("expect", [{}, EXPECT], ids=["sent at once", "after 100 Continue"])
def test_a_refused_upload_costs_nothing(strict_server: Server, expect: dict[str, str]):
    for status, method, target, headers in refusals(strict_server):
        length = 21 * GIB if status == 413 else 4 * GIB
        with Wire(strict_server) as wire:  # without any byte of the body
            wire.send(request(method, target, {**headers, **expect, "Content-Length": length}))
            answer = wire.answer()
            assert answer.status == status, (method, target, headers)
            assert answer.headers["Connection"] == "close"
            wire.end()
            assert wire.rest() == b""
        assert "Traceback" not in answer.body.decode()


def test_what_follows_a_refused_body_is_not_the_next_request(strict_server: Server):
    for status, method, target, headers in refusals(strict_server):
        if status == 413:
            continue
        with Wire(strict_server) as wire:
            wire.send(request(method, target, headers, request("GET", "/v1/health") * 3))
            assert wire.answer().status == status
            assert wire.rest() == b""


def test_a_client_that_sends_a_refused_body_still_gets_the_answer(strict_server: Server):
    """If the client stops within some MiB, it gets the response: a reset would discard that before it was read."""
    with Wire(strict_server) as wire:
        wire.send(request("PUT", "/allowed/a", {"Content-Length": 3_000_000}), b"x" * 3_000_000)
        assert wire.answer().status == 401


FIRST_KIB = b"x" * 1024


def test_permission_is_refused_before_the_files_content(strict_server: Server):
    """``path`` comes first. The server reads a form's first KiB at once; the rest is never sent."""
    headers = {**strict_server.headers("limited@example.com"), **FORM_TYPE, "Content-Length": GIB}
    with Wire(strict_server) as wire:
        wire.send(request("POST", "/upload", headers), part("path", b"elsewhere"), part("file0", FIRST_KIB, "a"))
        assert_error(wire.answer(), 403, strict_server, says=["permission"])


def test_a_file_that_cannot_be_stored_is_refused_before_its_content(strict_server: Server):
    headers = {**strict_server.headers("limited@example.com"), **FORM_TYPE, "Content-Length": GIB}
    for path, filename in ((b"allowed", "../a"), (b"allowed/..", "a"), (b"", "v1/a")):
        with Wire(strict_server) as wire:
            wire.send(request("POST", "/upload", headers), part("path", path), part("file0", FIRST_KIB, filename))
            assert_error(wire.answer(), 400, strict_server)


# Connections that break


CUT_SIZE = 700_000  # bytes of content; the server reads 256 KiB at a time


def by_put(server: Server, key: str, content: bytes) -> bytes:
    return put_request(server, key, content)


def by_put_in_chunks(server: Server, key: str, content: bytes) -> bytes:
    head = request("PUT", f"/{key}", {**server.headers(), "Transfer-Encoding": "chunked"})
    return head + chunked(content[:1000], content[1000:300_000], content[300_000:])


def by_form(server: Server, key: str, content: bytes) -> bytes:
    folder, _, name = key.rpartition("/")
    return post_request(server, form(part("path", folder.encode()), part("file0", content, name)))


def by_form_with_its_path_last(server: Server, key: str, content: bytes) -> bytes:
    folder, _, name = key.rpartition("/")
    return post_request(server, form(part("file0", content, name), part("path", folder.encode())))


def by_form_in_chunks(server: Server, key: str, content: bytes) -> bytes:
    folder, _, name = key.rpartition("/")
    body = form(part("path", folder.encode()), part("file0", content, name))
    head = request("POST", "/upload", {**server.headers(), **FORM_TYPE, "Transfer-Encoding": "chunked"})
    return head + chunked(body[:1000], body[1000:300_000], body[300_000:])


WAYS = [by_put, by_put_in_chunks, by_form, by_form_with_its_path_last, by_form_in_chunks]


def cuts(upload: bytes) -> Iterator[bytes]:
    """The upload, cut off at many points of its body."""
    start = upload.index(b"\r\n\r\n") + 4
    body = upload[start:]
    points = {0, 1, 2, 10, 60, 100, 130, 200, 262_143, 262_144, 300_000, 650_000}
    points |= {len(body) - back for back in (1, 2, 3, 4, 5, 8, len(BOUNDARY) + 2, len(BOUNDARY) + 8, 200)}
    if upload.startswith(b"POST") and b"chunked" not in upload[:start]:
        points -= {len(body) - 1, len(body) - 2}  # only the last line's end is missing, so it is still a form
        points |= {len(body) - 1}
    return (upload[: start + point] for point in sorted(points) if 0 <= point < len(body))


@pytest.mark.parametrize("way", WAYS)
def test_an_upload_that_is_cut_off_leaves_what_was_there(server: Server, way: Callable[[Server, str, bytes], bytes]):
    folder = new_folder()
    old, new = os.urandom(100_000), os.urandom(CUT_SIZE)
    put(server, f"{folder}/old", old)
    for number, upload in enumerate(cuts(way(server, f"{folder}/old", new))):
        request_id = f"{folder}-{number}"
        upload = upload.replace(b"\r\n", f"\r\nX-Request-ID: {request_id}\r\n".encode(), 1)
        with Wire(server) as wire:
            wire.send(upload)
            if number % 2:
                wire.reset()
            else:
                wire.end()
                assert_error(wire.answer(), 400, server)
        line = access(server, request_id)
        assert (line["status"], line["error"].partition(":")[0]) == ("400", "client_disconnected")
    wait_until_tidy(server)
    answer = get(server, f"{folder}/old")
    assert (answer.content, answer.headers["X-Cache"]) == (old, "hit")
    assert keys(server, folder) == [f"{folder}/old"]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_uploads_whole_replace_what_was_there(server: Server, way: Callable[[Server, str, bytes], bytes]):
    """Without this, the tests of cut uploads would prove nothing."""
    folder = new_folder()
    new = os.urandom(CUT_SIZE)
    put(server, f"{folder}/old", b"old")
    assert exchange(server, way(server, f"{folder}/old", new)).status == 200
    assert get(server, f"{folder}/old").content == new


def test_a_first_upload_that_is_cut_off_leaves_nothing(server: Server):
    folder = new_folder()
    for way in WAYS:
        upload = way(server, f"{folder}/{way.__name__}", os.urandom(CUT_SIZE))
        with Wire(server) as wire:
            wire.send(upload[:-3])
            wire.end()
            assert wire.answer().status == 400
    wait_until_tidy(server)
    assert keys(server, folder) == []
    assert get(server, f"{folder}/{WAYS[0].__name__}").status_code == 404


def test_an_upload_is_not_visible_before_its_end(server: Server):
    folder = new_folder()
    content = os.urandom(CUT_SIZE)
    body = form(part("path", folder.encode()), part("file0", content, "a"), part("file1", content, "b"))
    put(server, f"{folder}/b", b"old")
    with Wire(server) as wire:
        wire.send(post_request(server, body)[:-6])  # both files are complete, but the closing boundary is missing
        wait_for_parts(server)
        assert keys(server, folder) == [f"{folder}/b"]
        assert get(server, f"{folder}/b").content == b"old"
        wire.send(body[-6:])
        assert wire.answer().status == 200
    for name in "ab":
        assert get(server, f"{folder}/{name}").content == content


def wait_for_parts(server: Server) -> None:
    wait_until(lambda: any(map(size_of, temporary_files(server))), SECONDS, "something of an upload on the disk")


def size_of(path: Path) -> int:
    """A file's size in bytes; 0: it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def test_a_broken_chunked_body_is_refused(server: Server):
    folder = new_folder()
    head = request("PUT", f"/{folder}/a", {**server.headers(), "Transfer-Encoding": "chunked"})
    for body in (b"nonsense\r\n", b"5\r\nabc\r\n0\r\n\r\n", b"-1\r\n\r\n", b"5\r\nabcdef\r\n0\r\n\r\n", b"\r\n\r\n"):
        with Wire(server) as wire:
            wire.send(head, body)
            wire.end()
            assert_error(wire.answer(), 400, server)
    assert keys(server, folder) == []


# Clients without progress


@pytest.fixture(scope="module")
def impatient_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that drops a client after two seconds without progress."""
    with running(Server(tmp_path_factory.mktemp("impatient"), {"server": {"send_timeout": 2}})) as server:
        yield server


@pytest.mark.parametrize("way", WAYS)
def test_a_client_that_stops_in_an_upload_is_dropped(
    impatient_server: Server, way: Callable[[Server, str, bytes], bytes]
):
    key = f"{new_folder()}/a"
    put(impatient_server, key, b"old")
    upload = way(impatient_server, key, os.urandom(CUT_SIZE))
    with Wire(impatient_server) as wire:
        wire.send(upload[: len(upload) // 2])
        answer = wire.answer()
        assert_error(answer, 400, impatient_server)
        assert wire.rest() == b""
    assert access(impatient_server, answer)["error"].startswith("client_disconnected")
    wait_until_tidy(impatient_server)
    assert get(impatient_server, key).content == b"old"


def test_a_client_that_stops_in_a_download_is_dropped(impatient_server: Server):
    key, content = f"{new_folder()}/a", bytes(64 << 20)
    stored_by_another_program(impatient_server, key, content)
    with Wire(impatient_server, receive_buffer=64 * 1024) as wire:
        wire.send(request("GET", f"/{key}"))
        answer = wire.head()
        line = access(impatient_server, answer)  # it is written when the server has given up
        assert int(line["bytes"]) < len(content)
        assert len(wire.rest()) < len(content)
