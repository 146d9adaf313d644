# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every error over HTTP: its status, and one line of text or problem details without the server's internals."""

from __future__ import annotations

import base64
import html
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from kci_storage.errors import TABLE, StorageError
from tests.support import azurite
from tests.support.disks import fill_up, small_disk
from tests.support.harness import Server, running, wait_until
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Wire,
    access,
    assert_common_headers,
    assert_error,
    form,
    get,
    keys,
    part,
    put,
    request,
    temporary_files,
    wait_until_tidy,
)

MIB = 1 << 20
LIMITED = "limited@example.com"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"

Headers = dict[str, str]


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with low limits and short time-outs; it has the file ``there`` of 7 bytes."""
    document = {
        "server": {"max_upload_bytes": MIB, "lock_timeout": 0.2},
        "users": [
            {"name": "user@example.com", "prefixes": [""]},
            {"name": LIMITED, "prefixes": ["allowed"]},
        ],
    }
    with running(Server(tmp_path_factory.mktemp("strict"), document)) as server:
        put(server, "there", b"content")
        yield server


# Errors of clients


def sent(server: Server, method: str, path: str, headers: Headers, body: bytes | None = None) -> requests.Response:
    """The response to a request with a valid token, unless the headers have another one."""
    headers = {**server.headers(), **headers}
    return requests.request(method, f"{server.url}/{path}", data=body, headers=headers, timeout=SECONDS)


def bad_form(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "POST", "upload", {**FORM_TYPE, **headers}, b"nonsense")


def no_file(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "POST", "upload", {**FORM_TYPE, **headers}, form(part("path", b"allowed")))


def bad_key(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "PUT", "v1/mine", headers, b"content")


def failed_digest(server: Server, headers: Headers) -> requests.Response:
    digest = base64.b64encode(bytes(16)).decode()
    return sent(server, "PUT", "a", {"Content-MD5": digest, **headers}, b"content")


def bad_content_type(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "PUT", "a", {"Content-Type-Upstream": "nonsense", **headers}, b"content")


def no_permission(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "PUT", "elsewhere/a", {**server.headers(LIMITED), **headers}, b"content")


def nothing_there(server: Server, headers: Headers) -> requests.Response:
    return get(server, "nothing/there", headers)


def nothing_to_delete(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "DELETE", "nothing/there", headers)


def bad_key_asked_for(server: Server, headers: Headers) -> requests.Response:
    return get(server, "v1/nothing", headers)


def post_to_a_key(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "POST", "some/key", headers)


def a_file_in_the_way(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "PUT", "there/below", headers, b"content")


def another_upload(server: Server, headers: Headers) -> requests.Response:
    with Wire(server) as first:
        first.send(request("PUT", "/contested", {**server.headers(), "Content-Length": 10}), b"first")
        wait_until(server.is_writing, SECONDS, "the upload's lock")
        response = sent(server, "PUT", "contested", headers, b"second")
        first.send(b"-done")
        assert first.answer().status in (200, 201)
    return response


def another_version(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "PUT", "there", {"If-Match": '"another"', **headers}, b"content")


def too_large(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "PUT", "a", headers, bytes(MIB + 1))


def encoded_body(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "PUT", "a", {"Content-Encoding": "gzip", **headers}, b"content")


def encoded_form(server: Server, headers: Headers) -> requests.Response:
    return sent(server, "POST", "upload", {**FORM_TYPE, "Content-Encoding": "gzip", **headers}, b"content")


def another_spelling_of_a_route(server: Server, headers: Headers) -> requests.Response:
    return get(server, "/metrics", headers)


def range_behind_the_end(server: Server, headers: Headers) -> requests.Response:
    return get(server, "there", {"Range": "bytes=7-", **headers})


MISTAKES: list[tuple[Callable[[Server, Headers], requests.Response], int, str, str]] = [
    (bad_form, 400, "Bad Form", "form"),
    (no_file, 400, "Bad Form", "no file"),
    (bad_key, 400, "Bad Key", "reserved"),
    (failed_digest, 400, "Digest Mismatch", "Content-MD5"),
    (bad_content_type, 400, "Bad Request", "Content-Type-Upstream"),
    (no_permission, 403, "Forbidden", "permission"),
    (nothing_there, 404, "Not Found", "no such file"),
    (nothing_to_delete, 404, "Not Found", "no such file"),
    (bad_key_asked_for, 404, "Not Found", "no such file"),
    (post_to_a_key, 405, "Method Not Allowed", ""),
    (a_file_in_the_way, 409, "Conflict", "there"),
    (another_upload, 409, "Conflict", "upload"),
    (another_version, 412, "Precondition Failed", "version"),
    (too_large, 413, "Content Too Large", str(MIB)),
    (encoded_body, 415, "Unsupported Media Type", "Content-Encoding"),
    (encoded_form, 415, "Unsupported Media Type", "Content-Encoding"),
    (another_spelling_of_a_route, 404, "Not Found", "no such file"),
    (range_behind_the_end, 416, "Range Not Satisfiable", "7 bytes"),
]


@pytest.mark.parametrize(("mistake", "status", "title", "says"), MISTAKES)
def test_a_mistake_is_told_in_one_line(
    strict_server: Server, mistake: Callable[[Server, Headers], requests.Response], status: int, title: str, says: str
):
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "text/plain"}, {"Accept": "image/png,*/*;q=0.8"}):
        response = mistake(strict_server, accept)
        line = assert_error(response, status, strict_server, says=[says])
    for accept in ("application/json", "application/problem+json", "text/plain;q=0.5, application/json"):
        response = mistake(strict_server, {"Accept": accept})
        assert response.status_code == status
        assert response.headers["Content-Type"] == "application/problem+json"
        assert response.json() == {"type": "about:blank", "title": title, "status": status, "detail": line}
        assert_common_headers(response)
    assert access(strict_server, response)["status"] == str(status)
    response = mistake(strict_server, {"Accept": BROWSER})
    assert_page(response, status, line)
    assert access(strict_server, response)["status"] == str(status)
    wait_until_tidy(strict_server)


def assert_page(response: requests.Response, status: int, line: str) -> None:
    """Check that the page has the message, and the request ID for an operator."""
    assert response.status_code == status
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none';")
    assert response.headers["Vary"] == "Accept"
    assert_common_headers(response)
    page = html.unescape(response.text)
    assert f"<p>{line}</p>" in page
    assert page.count(f"{status} ") >= 2  # its title and its heading
    assert f"<code>{response.headers['X-Request-ID']}</code>" in page
    assert '<a href="/v1/browse/">' in page


def test_the_page_leads_to_the_folder(strict_server: Server):
    for path, folder in (("a/b", "./"), ("a/b/", "../"), ("a%2Fb/c", "./"), ("a", None), ("v1/nothing/x", None)):
        response = get(strict_server, path, {"Accept": BROWSER})
        assert response.status_code == 404
        links = re.findall(r'href="([^"]*)"', response.text)
        assert links == ([folder] if folder else []) + ["/v1/browse/"]


def test_the_page_escapes_what_a_client_says(strict_server: Server):
    key = "v1/%3Cscript%3Ealert(1)%3C%2Fscript%3E"  # the answer quotes it
    response = sent(strict_server, "PUT", key, {"Accept": BROWSER}, b"content")
    assert response.status_code == 400
    assert "alert(1)" in response.text
    assert "<script" not in response.text


def test_no_token(strict_server: Server):
    """The body is exactly this word: existing clients compare it."""
    for method, path in (("GET", "v1/checkauth"), ("PUT", "a"), ("DELETE", "there"), ("POST", "upload")):
        response = requests.request(method, f"{strict_server.url}/{path}", timeout=SECONDS)
        assert_error(response, 401, strict_server)
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="kci-storage"'
        accept = {"Accept": "application/json"}
        response = requests.request(method, f"{strict_server.url}/{path}", headers=accept, timeout=SECONDS)
        assert (response.status_code, response.json()["detail"]) == (401, "Unauthorized")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "", {"GET", "HEAD"}),
        ("DELETE", "", {"GET", "HEAD"}),
        ("PUT", "", {"GET", "HEAD"}),
        ("POST", "some/key", {"GET", "HEAD", "PUT", "DELETE"}),
        ("PATCH", "some/key", {"GET", "HEAD", "PUT", "DELETE"}),
        ("TRACE", "some/key", {"GET", "HEAD", "PUT", "DELETE"}),
        ("MKCOL", "some/key", {"GET", "HEAD", "PUT", "DELETE"}),
        ("POST", "v1/list", {"GET", "HEAD"}),
        ("POST", "v1/health", {"GET", "HEAD"}),
        ("POST", "metrics", {"GET", "HEAD"}),
        ("PATCH", "upload", {"POST"}),
    ],
)
def test_another_method_is_told_which_there_are(strict_server: Server, method: str, path: str, allowed: set[str]):
    response = sent(strict_server, method, path, {})
    assert_error(response, 405, strict_server)
    assert allowed <= set(response.headers["Allow"].split(", "))


def test_errors_without_a_body(strict_server: Server):
    for path, status in (("nothing/there", 404), ("v1/nothing", 404), ("v1/checkauth", 401)):
        with Wire(strict_server) as wire:
            wire.send(request("HEAD", f"/{path}"), request("GET", "/v1/health"))
            assert wire.answer("HEAD").status == status
            assert wire.answer().body == b"ok"


# Errors of the backend


SIGNED_URL = "https://account.blob.example/container/a?sig=SIGNATURE"
DRIVER = f'''
from kci_storage import errors
from kci_storage.drivers.base import Driver, ObjectInfo, ObjectWriter, Page


def fail(key):
    """By the error that the key is named after."""
    name = key.rpartition("/")[2]
    if name == "Defect":
        raise RuntimeError("{SIGNED_URL}")
    raise getattr(errors, name)("the backend says no", detail="{SIGNED_URL}", retry_after=7)


class Writer(ObjectWriter):
    def __init__(self, key):
        self.key = key

    def write(self, data):
        pass

    def flush(self):
        pass

    def commit(self, digests, expected=None, replay=None):
        fail(self.key)

    def abort(self):
        pass


class Failing(Driver):
    @classmethod
    def from_config(cls, config):
        return cls()

    def stat(self, key):
        fail(key)

    def read(self, key, start=0, stop=None, etag=None):
        fail(key)

    def writer(self, key, content_type, tags=None):
        return Writer(key)

    def delete(self, key):
        fail(key)

    def list(self, prefix="", delimiter="", marker=None, details=True):
        fail(prefix)

    def probe(self):
        fail("BackendTimeout")

    def close(self):
        pass
'''


@pytest.fixture(scope="module")
def failing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a third party's driver, all of whose methods fail."""
    package = tmp_path_factory.mktemp("package")
    metadata = package / "failing_driver-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: failing-driver\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[kci_storage.drivers]\nfailing = failing_driver:Failing\n")
    (package / "failing_driver.py").write_text(DRIVER)
    environ = {"PYTHONPATH": f"{package}:{os.environ.get('PYTHONPATH', '')}"}
    server = Server(tmp_path_factory.mktemp("failing"), {"driver": "failing"}, environ)
    server.expected_errors += [r"internal_error", r"fill_crashed"]
    with running(server):
        yield server


FAILURES = {
    "BackendError": 502,
    "BackendThrottled": 503,
    "BackendTimeout": 504,
    "ObjectChanged": 502,
    "Overloaded": 503,
    "InsufficientStorage": 507,
    "Defect": 500,
}


def requests_for(server: Server, key: str, headers: Headers) -> Iterator[requests.Response]:
    """All requests that need the backend."""
    folder, _, name = key.rpartition("/")
    body = form(part("path", folder.encode()), part("file0", b"content", name))
    yield get(server, key, headers)
    yield get(server, key, {"Range": "bytes=0-9", **headers})
    yield sent(server, "PUT", key, headers, b"content")
    yield sent(server, "PUT", key, {"If-Match": "*", **headers}, b"content")
    yield sent(server, "DELETE", key, headers)
    yield sent(server, "POST", "upload", {**FORM_TYPE, **headers}, body)
    yield get(server, f"v1/list?prefix={key}", headers)
    yield get(server, f"v1/list?prefix={key}&format=json", headers)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_backend(failing_server: Server, failure: str):
    """The log has the details, the answer does not."""
    status = FAILURES[failure]
    for response in requests_for(failing_server, f"a/{failure}", {}):
        assert_error(response, status, failing_server, says=["internal error" if status == 500 else "says no"])
        assert "SIGNATURE" not in response.text
        assert response.headers.get("Retry-After") == (None if failure == "Defect" else "7")
        if failure != "Defect":
            assert SIGNED_URL in access(failing_server, response)["error"]
    for response in requests_for(failing_server, f"b/{failure}", {"Accept": "application/json"}):
        assert response.headers["Content-Type"] == "application/problem+json"
        assert response.json()["status"] == response.status_code == status
        assert "SIGNATURE" not in response.text
    response = requests.head(f"{failing_server.url}/c/{failure}", timeout=SECONDS)
    assert (response.status_code, response.content) == (status, b"")
    wait_until_tidy(failing_server)


@pytest.mark.parametrize("failure", ["KeyConflict", "WriteConflict"])
def test_a_conflict_that_the_backend_finds(failing_server: Server, failure: str):
    assert_error(put(failing_server, f"a/{failure}", b"content"), 409, failing_server, says=["says no"])


def test_readiness_says_why_not(failing_server: Server):
    response = get(failing_server, "v1/ready")
    assert_error(response, 503, failing_server, says=["the backend says no"])
    assert "SIGNATURE" not in response.text
    assert get(failing_server, "v1/health").text == "ok"


def test_every_row_of_the_table_has_a_status_that_clients_know():
    assert {row.status for row in TABLE.values()} == {
        400, 401, 403, 404, 409, 411, 412, 413, 415, 429, 500, 501, 502, 503, 504, 507
    }  # fmt: skip
    assert all(issubclass(kind, StorageError) for kind in TABLE)


# Health


def test_health_and_readiness(server: Server):
    for path in ("v1/health", "v1/ready"):
        response = get(server, path)
        assert (response.status_code, response.text) == (200, "ok")
    assert get(server, "").text == "KernelCI Proxy Server"
    assert get(server, "").headers["Content-Type"].startswith("text/plain")


# A backend that does not answer


def test_copies_are_served_while_the_backend_is_away(tmp_path: Path):
    """All other requests are answered with an error within a time that a client can wait."""
    (tmp_path / "azurite").mkdir()
    (tmp_path / "server").mkdir()
    with azurite.running_azurite(tmp_path / "azurite") as service:
        document = {"account": service.account, "key": service.key, "endpoint": service.endpoint}
        server = Server(
            tmp_path / "server", {"driver": "azure", "azure": {**document, "container": service.new_container()}}
        )
        with running(server):
            put(server, "copied", b"content")
            etag = get(server, "copied").headers["ETag"]
            service.kill()
            assert_copies_are_served(server, etag)
            assert_all_else_is_refused(server)
            assert_copies_are_served(server, etag)


def assert_copies_are_served(server: Server, etag: str) -> None:
    answer = get(server, "copied")
    assert (answer.status_code, answer.content, answer.headers["X-Cache"]) == (200, b"content", "hit")
    assert get(server, "copied", {"Range": "bytes=1-2"}).content == b"on"
    assert get(server, "copied", {"If-None-Match": etag}).status_code == 304


def assert_all_else_is_refused(server: Server) -> None:
    asked: list[Callable[[], requests.Response]] = [
        lambda: get(server, "cold"),
        lambda: get(server, "cold/range", {"Range": "bytes=0-9"}),
        lambda: put(server, "new", b"content"),
        lambda: put(server, "large", bytes(20 * MIB)),
        lambda: put(server, "copied", b"new", If_Match='"x"'),
        lambda: sent(server, "DELETE", "cold", {}),
        lambda: sent(server, "POST", "upload", FORM_TYPE, form(part("path", b"x"), part("file0", b"y", "z"))),
        lambda: get(server, "v1/list"),
    ]
    # Each request gives up after SECONDS; with the SDK's default settings an answer would take 84 s.
    with ThreadPoolExecutor(len(asked) + 1) as pool:
        readiness = pool.submit(get, server, "v1/ready")
        for response in pool.map(lambda ask: ask(), asked):
            assert response.status_code in (502, 504), response.text
            assert_error(response, response.status_code, server)
            assert "127.0.0.1" not in response.text
        assert_error(readiness.result(), 503, server)
    assert get(server, "v1/health").text == "ok"
    wait_until_tidy(server)


# A disk that is full


def test_an_upload_that_finds_the_disk_full_is_refused(tmp_path: Path):
    """The previous file stays, and with room the next upload succeeds."""
    with small_disk(tmp_path / "storage", 4 * MIB) as storage:
        (tmp_path / "server").mkdir()
        server = Server(tmp_path / "server", {"local": {"storage_path": storage}})
        server.storage_path = storage
        with running(server):
            put(server, "a", b"old")
            for response in (
                put(server, "a", bytes(6 * MIB)),
                sent(server, "POST", "upload", FORM_TYPE, form(part("path"), part("file0", bytes(6 * MIB), "a"))),
            ):
                assert_error(response, 507, server, says=["room"])
            ballast = fill_up(storage)
            assert_error(put(server, "b", b"new"), 507, server)
            assert get(server, "a").content == b"old"
            ballast.unlink()
            wait_until(lambda: not temporary_files(server), SECONDS, "the end of temporary files")
            assert put(server, "a", b"new").status_code == 200
            assert keys(server, "") == ["a"]


def test_a_form_whose_path_comes_last_needs_room_in_the_cache(tmp_path: Path):
    with small_disk(tmp_path / "cache", 4 * MIB) as cache:
        (tmp_path / "server").mkdir()
        server = Server(tmp_path / "server", {"cache": {"directory": cache}})
        server.cache_directory = cache
        with running(server):
            large = part("file0", bytes(6 * MIB), "a")
            response = sent(server, "POST", "upload", FORM_TYPE, form(large, part("path", b"x")))
            assert_error(response, 507, server, says=["room"])
            assert sent(server, "POST", "upload", FORM_TYPE, form(part("path", b"x"), large)).status_code == 200
            assert len(get(server, "x/a").content) == 6 * MIB


def test_a_full_cache_fails_neither_uploads_nor_downloads(start_server: Callable[..., Server], tmp_path: Path):
    """With Azure, uploads and downloads do not depend on the copy."""
    with small_disk(tmp_path / "cache", 4 * MIB) as cache:
        server = start_server("azure", cache={"directory": cache, "low_disk_percent": 0, "recover_disk_percent": 0})
        server.cache_directory = cache
        content = secrets.token_bytes(6 * MIB)
        assert put(server, "large", content).status_code == 201
        assert get(server, "large").content == content
        assert get(server, "large", {"Range": "bytes=-1000"}).content == content[-1000:]
        put(server, "small", b"old")
        assert get(server, "small").headers["X-Cache"] == "hit"
        server.stop()
        server.assert_clean()
