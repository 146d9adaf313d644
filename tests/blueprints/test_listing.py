# SPDX-License-Identifier: LGPL-2.1-or-later
"""``GET /v1/list`` over HTTP."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
import requests

from tests.support.harness import Server, running
from tests.support.wire import (
    SECONDS,
    Wire,
    assert_error,
    exchange,
    get,
    keys,
    new_folder,
    put,
    request,
    stored_by_another_program,
    wait_until_tidy,
)


def listed(server: Server, headers: dict[str, str] | None = None, **parameters: str) -> requests.Response:
    response = requests.get(f"{server.url}/v1/list", params=parameters, headers=headers or {}, timeout=SECONDS)
    assert response.status_code == 200
    return response


def store(server: Server, *names: str) -> str:
    """Store files in a new folder, each with its name as its content."""
    folder = new_folder()
    for name in names:
        assert put(server, quote(f"{folder}/{name}"), name.encode()).status_code == 201
    return folder


def test_one_key_a_line(server: Server):
    folder = store(server, "b", "a/b/c", "ä 文", "z")
    response = listed(server, prefix=folder)
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.content.decode() == "".join(f"{folder}/{name}\n" for name in sorted(["b", "a/b/c", "ä 文", "z"]))
    everything = listed(server).text.splitlines()
    assert [key for key in everything if key.startswith(folder)] == response.text.splitlines()


@pytest.mark.parametrize(
    ("headers", "parameters"),
    [
        ({}, {"format": "json"}),
        ({"Accept": "application/json"}, {}),
        ({"Accept": "text/plain;q=0.1, application/json"}, {}),
    ],
)
def test_one_object_a_line_as_json(server: Server, headers: dict[str, str], parameters: dict[str, str]):
    folder = store(server, "a", 'ä "b"')
    response = listed(server, headers, prefix=folder, **parameters)
    assert response.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.content.decode().split("\n")[:-1]]
    assert [line["path"] for line in lines] == [f"{folder}/a", f'{folder}/ä "b"']
    for line in lines:
        answer = get(server, quote(line["path"]))
        assert line == {
            "path": line["path"],
            "size": len(answer.content),
            "etag": answer.headers["ETag"],
            "last_modified": answer.headers["Last-Modified"],
        }


@pytest.mark.parametrize("accept", ["*/*", "text/plain", "text/html,*/*;q=0.8", "text/plain, application/json;q=0.5"])
def test_text_is_the_default(server: Server, accept: str):
    assert listed(server, {"Accept": accept}).headers["Content-Type"].startswith("text/plain")


def test_a_prefix_is_plain_text(server: Server):
    folder = store(server, "path1/a", "path10/a", "path1x", "other")
    assert keys(server, f"{folder}/path1") == [f"{folder}/{key}" for key in ("path1/a", "path10/a", "path1x")]
    assert keys(server, f"{folder}/path1/") == [f"{folder}/path1/a"]
    assert keys(server, f"{folder}/path1/a") == [f"{folder}/path1/a"]
    assert keys(server, f"{folder}/nothing") == []
    assert keys(server, f"{folder}/path1/a/b") == []


@pytest.mark.parametrize(
    "prefix", ["../", "..", ".", "/", "//", ".kci", ".kci/", "a\x00b", "\n", "\\", "x" * 3000, "%", "*"]
)
def test_a_hostile_prefix_shows_nothing(server: Server, prefix: str):
    store(server, "a")
    answer = exchange(server, request("GET", f"/v1/list?prefix={quote(prefix, safe='')}"))
    assert (answer.status, answer.body) == (200, b"")


def test_a_prefix_that_is_not_utf_8(server: Server):
    answer = exchange(server, request("GET", "/v1/list?prefix=%ff%fe"))
    assert (answer.status, answer.body) == (200, b"")


def test_only_get_lists(server: Server):
    assert_error(requests.post(f"{server.url}/v1/list", timeout=SECONDS), 405, server)
    assert requests.head(f"{server.url}/v1/list", timeout=SECONDS).status_code == 200


def test_what_is_deleted_or_replaced(server: Server):
    folder = store(server, "a", "b/c")
    put(server, f"{folder}/a", b"another version")
    assert requests.delete(f"{server.url}/{folder}/b/c", headers=server.headers(), timeout=SECONDS).status_code == 204
    lines = listed(server, prefix=folder, format="json").text.splitlines()
    assert [(line["path"], line["size"]) for line in map(json.loads, lines)] == [(f"{folder}/a", 15)]


def test_an_upload_in_progress_is_not_shown(server: Server):
    folder = store(server, "a")
    with Wire(server) as wire:
        wire.send(request("PUT", f"/{folder}/b", {**server.headers(), "Content-Length": 1_000_000}), bytes(500_000))
        wire.wait_until_taken()
        assert keys(server, folder) == [f"{folder}/a"]
        assert not [key for key in keys(server, "") if key.startswith(".kci")]
        wire.reset()
    wait_until_tidy(server)
    assert keys(server, folder) == [f"{folder}/a"]


def test_internal_files_are_not_shown(local_server: Server):
    store(local_server, "a")
    assert any(path.is_file() for path in (local_server.storage_path / ".kci").rglob("*"))
    assert not [key for key in keys(local_server, "") if key.startswith(".kci")]


def test_files_that_cannot_be_downloaded_are_not_listed(local_server: Server):
    """Files that were stored by hand under names that are no keys do not break the list either."""
    folder = store(local_server, "a")
    root = local_server.storage_path / folder
    for name in (b"new\nline", b"back\\slash", b"not utf-8 \xff", b"bell\x07"):
        (root / os.fsdecode(name)).write_bytes(b"")
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    os.symlink(root / "nowhere", root / "dangling")
    stored_by_another_program(local_server, "robots.txt", b"")
    (root / "by hand").write_bytes(b"by hand")
    for answer in (listed(local_server, prefix=folder), listed(local_server, prefix=folder, format="json")):
        assert len(answer.content.splitlines()) == 2
    assert keys(local_server, folder) == [f"{folder}/a", f"{folder}/by hand"]
    assert keys(local_server, "robots") == []


# Many keys


MANY = 25_000
NAME = "a name of a hundred characters, so that the list is far larger than what a connection holds by itself "


@pytest.fixture(scope="module")
def full_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with many files in its folder."""
    server = Server(tmp_path_factory.mktemp("full"), {})
    for folder in range(MANY // 1000):
        path = server.storage_path / f"folder{folder:03}"
        path.mkdir(parents=True)
        for number in range(1000):
            (path / f"{NAME}{number:03}").touch()
    with running(server):
        yield server


def test_every_key_of_many_once_and_in_order(full_server: Server):
    expected = [f"folder{folder:03}/{NAME}{number:03}" for folder in range(MANY // 1000) for number in range(1000)]
    assert keys(full_server, "") == expected
    assert keys(full_server, "folder013/") == expected[13_000:14_000]
    assert keys(full_server, "folder01") == expected[10_000:20_000]
    lines = listed(full_server, format="json", prefix="folder00").text.splitlines()
    assert [json.loads(line)["path"] for line in lines] == expected[:10_000]


def test_the_list_is_streamed(full_server: Server):
    """The first lines arrive before the last ones are known: a file that is stored meanwhile is listed."""
    with Wire(full_server, receive_buffer=16 * 1024) as wire:
        wire.send(request("GET", "/v1/list?format=json"))
        head = wire.head()
        assert head.status == 200 and head.headers["Transfer-Encoding"] == "chunked"
        assert int(wire.line(), 16) > 0
        assert json.loads(wire.line())["path"] == f"folder000/{NAME}000"
        late = stored_by_another_program(full_server, "later/than the first line", b"")
        try:
            assert b"later/than the first line" in wire.rest_of_chunks()
        finally:
            late.unlink()
            late.parent.rmdir()


def test_a_client_that_leaves_a_list(full_server: Server):
    with Wire(full_server) as wire:
        wire.send(request("GET", "/v1/list?format=json"))
        wire.head()
        wire.reset()
    assert len(keys(full_server, "folder000/")) == 1000


def test_keys_that_another_program_stored(azure_server: Server, azurite: Any):
    folder = new_folder()
    with azurite.client(azure_server.document["azure"]["container"]) as container:
        for name in ("a", "b/c", "d//e", ".kci"):
            container.upload_blob(f"{folder}/{name}", b"content")
        assert keys(azure_server, folder) == [f"{folder}/.kci", f"{folder}/a", f"{folder}/b/c"]


def test_a_backend_that_is_away_is_no_list_that_ends(start_server: Callable[..., Server]):
    server = start_server("azure")
    server.stop()
    server.document["azure"]["container"] = "no-such-container"
    server.start()
    assert_error(get(server, "v1/list"), 502, server)
