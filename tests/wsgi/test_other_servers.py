# SPDX-License-Identifier: LGPL-2.1-or-later
"""The application under other WSGI servers, without sendfile or with their own: the answers are the same."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator

import pytest
import requests

from tests.support.azurite import Azurite
from tests.support.harness import Server, running
from tests.support.wire import FORM_TYPE, SECONDS, access, form, new_folder, part, put

APPLICATIONS = {
    "waitress": "import waitress; waitress.serve(create_app(), host='127.0.0.1', port={port}, threads=8)",
    "werkzeug": (
        "from werkzeug.serving import run_simple; run_simple('127.0.0.1', {port}, create_app(), threaded=True)"
    ),
}
CONTENT = os.urandom(3 << 20) + b"end"


class OtherServer(Server):
    """The application in one process of another WSGI server.

    :param name: which.
    """

    name = ""

    def _command(self) -> list[str]:
        serve = APPLICATIONS[self.name].format(port=self.port)
        return [sys.executable, "-c", f"from kci_storage.app import create_app; {serve}"]

    def _is_up(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{self.url}/v1/health", timeout=SECONDS).status_code == 200
        return False


@pytest.fixture(scope="module", params=sorted(APPLICATIONS))
def other_server(
    request: pytest.FixtureRequest, azurite: Azurite, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Each of the other servers, with Azurite as the backend."""
    container = azurite.new_container()
    azure = {"account": azurite.account, "key": azurite.key, "endpoint": azurite.endpoint, "container": container}
    server = OtherServer(tmp_path_factory.mktemp(request.param), {"driver": "azure", "azure": azure})
    server.name = request.param
    with running(server):
        yield server


@pytest.fixture
def session() -> Iterator[requests.Session]:
    """A client with a persistent connection: the next response shows whether the last one had the right length."""
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"
        yield session


@pytest.fixture(params=["hit", "cold"])
def key(request: pytest.FixtureRequest, other_server: Server, azurite: Azurite) -> str:
    """An object that is in the cache, or in the backend alone."""
    key = f"{new_folder()}/file.bin"
    if request.param == "hit":
        assert put(other_server, key, CONTENT).status_code == 201
    else:
        with azurite.client(other_server.document["azure"]["container"]) as container:
            container.upload_blob(key, CONTENT)
    return key


def test_a_whole_object(other_server: Server, session: requests.Session, key: str) -> None:
    for _ in range(2):
        answer = session.get(f"{other_server.url}/{key}", timeout=SECONDS)
        assert (answer.status_code, answer.headers["Content-Length"]) == (200, str(len(CONTENT)))
        assert answer.content == CONTENT
        line = access(other_server, answer)
        assert (line["status"], line["bytes"], "error" in line) == ("200", str(len(CONTENT)), False)


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [("0-0", 0, 1), ("100-299999", 100, 300_000), ("1000000-", 1_000_000, None), ("-5", -5, None)],
)
def test_a_range(
    other_server: Server, session: requests.Session, key: str, wanted: str, start: int, stop: int | None
) -> None:
    for _ in range(2):
        answer = session.get(f"{other_server.url}/{key}", headers={"Range": f"bytes={wanted}"}, timeout=SECONDS)
        assert answer.status_code == 206
        assert answer.content == CONTENT[start:stop]
        assert access(other_server, answer)["bytes"] == str(len(answer.content))


def test_several_ranges(other_server: Server, session: requests.Session, key: str) -> None:
    for _ in range(2):
        headers = {"Range": "bytes=10-19,300000-399999,-7"}
        answer = session.get(f"{other_server.url}/{key}", headers=headers, timeout=SECONDS)
        assert answer.status_code == 206
        parts = multipart(answer)
        assert [content for _, content in parts] == [CONTENT[10:20], CONTENT[300_000:400_000], CONTENT[-7:]]
        assert f"Content-Range: bytes 10-19/{len(CONTENT)}".encode() in parts[0][0]
        assert access(other_server, answer)["bytes"] == str(len(answer.content))


def multipart(answer: requests.Response) -> list[tuple[bytes, bytes]]:
    """The parts of an answer: their headers, and their content (RFC 2046, 5.1.1)."""
    boundary = answer.headers["Content-Type"].partition("boundary=")[2].encode()
    parts = (piece[2:-2].partition(b"\r\n\r\n") for piece in answer.content.split(b"--" + boundary)[1:-1])
    return [(head, content) for head, _, content in parts]


def test_no_body_where_there_is_none(other_server: Server, session: requests.Session, key: str) -> None:
    url = f"{other_server.url}/{key}"
    head = session.head(url, timeout=SECONDS)
    assert (head.status_code, head.headers["Content-Length"], head.content) == (200, str(len(CONTENT)), b"")
    assert access(other_server, head)["bytes"] == "0"
    unchanged = session.get(url, headers={"If-None-Match": head.headers["ETag"]}, timeout=SECONDS)
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    failed = session.get(url, headers={"If-Match": '"other"'}, timeout=SECONDS)
    assert (failed.status_code, failed.content) == (412, b"")
    beyond = session.get(url, headers={"Range": f"bytes={len(CONTENT)}-"}, timeout=SECONDS)
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(CONTENT)}")
    missing = session.get(f"{url}x", timeout=SECONDS)
    assert (missing.status_code, missing.text) == (404, "no such file\n")


def test_uploads(other_server: Server, session: requests.Session) -> None:
    folder, headers = new_folder(), other_server.headers()
    with_length = session.put(f"{other_server.url}/{folder}/a", CONTENT, headers=headers, timeout=SECONDS)
    chunks = (CONTENT[position : position + 100_000] for position in range(0, len(CONTENT), 100_000))
    in_chunks = session.put(f"{other_server.url}/{folder}/b", chunks, headers=headers, timeout=SECONDS)
    assert (with_length.status_code, in_chunks.status_code) == (201, 201)
    body = form(part("path", folder.encode()), part("file0", CONTENT, "c"), part("file1", b"", "d"))
    url = f"{other_server.url}/upload"
    stored = session.post(url, body, headers={**headers, **FORM_TYPE}, timeout=SECONDS)
    assert stored.status_code == 200
    assert [file["path"] for file in json.loads(stored.content)["files"]] == [f"{folder}/c", f"{folder}/d"]
    for name, content in (("a", CONTENT), ("b", CONTENT), ("c", CONTENT), ("d", b"")):
        answer = session.get(f"{other_server.url}/{folder}/{name}", timeout=SECONDS)
        assert (answer.content, answer.headers["X-Cache"]) == (content, "hit")
    refused = session.put(f"{other_server.url}/{folder}/a", CONTENT, timeout=SECONDS)
    assert (refused.status_code, refused.text) == (401, "Unauthorized")
    listed = requests.get(f"{other_server.url}/v1/list", params={"prefix": folder}, timeout=SECONDS)
    assert listed.text.splitlines() == [f"{folder}/{name}" for name in "abcd"]
    deleted = requests.delete(f"{other_server.url}/{folder}/a", headers=headers, timeout=SECONDS)
    assert deleted.status_code == 204


def test_the_page_of_metrics_shows_what_was_counted(other_server: Server) -> None:
    page = requests.get(f"{other_server.url}/metrics", timeout=SECONDS).text
    assert 'kci_storage_http_requests_total{method="GET",route="health",status="200"}' in page
