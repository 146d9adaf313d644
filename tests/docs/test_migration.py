# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/migration.md: a store that an earlier server has left, under this one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.support.harness import Server
from tests.support.wire import SECONDS

FILES = {
    "mainline/v6.12/Image": "application/x-kernel",
    "mainline/v6.12/dmesg": "text/plain",
    "küche/日本語": "image/png",
}


def side_file(storage: Path, key: str) -> Path:
    """Where the earlier server recorded what it knew of a key."""
    return storage / ".metadata" / f"{hashlib.sha512(key.encode()).hexdigest()}.headers"


def leave(storage: Path, key: str, headers: str) -> None:
    """A file and its side file, as the earlier server left them."""
    path = storage / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"content of {key}")
    side_file(storage, key).parent.mkdir(exist_ok=True)
    side_file(storage, key).write_text(headers)


@pytest.fixture
def migrated(start_server: Callable[..., Server], tmp_path: Path) -> Server:
    """A server over the store of another one, with such a configuration as that one had."""
    for key, content_type in FILES.items():
        leave(tmp_path, key, f"content-type:{content_type}\ntag-owner:builder@example.com\n")
    leave(tmp_path, "bare.log", "tag-owner:builder@example.com\n")
    leave(tmp_path, "broken.log", "content-type:no type\x01at all\n")
    return start_server(local={"storage_path": str(tmp_path)}, cache={"cleanup_chunk_size": 100_000})


def content_type(server: Server, key: str) -> str:
    response = requests.get(f"{server.url}/{key}", timeout=SECONDS)
    assert response.status_code == 200
    return response.headers["Content-Type"]


def test_files_have_the_content_types_that_were_recorded(migrated: Server) -> None:
    assert content_type(migrated, "mainline/v6.12/Image") == "application/x-kernel"
    assert content_type(migrated, "mainline/v6.12/dmesg") == "text/plain; charset=utf-8"
    assert content_type(migrated, "küche/日本語") == "image/png"


def test_without_a_usable_one_the_name_says_the_type(migrated: Server) -> None:
    assert content_type(migrated, "bare.log") == content_type(migrated, "broken.log") == "text/plain; charset=utf-8"


def test_side_files_are_hidden(migrated: Server) -> None:
    name = side_file(Path(), "bare.log")
    listed = requests.get(f"{migrated.url}/v1/list", timeout=SECONDS).text.split()
    assert sorted(listed) == sorted([*FILES, "bare.log", "broken.log"])
    top = requests.get(f"{migrated.url}/v1/browse/", headers={"Accept": "application/json"}, timeout=SECONDS).json()
    assert [folder["name"] for folder in top["folders"]] == ["küche/", "mainline/"]
    for path in (name, ".metadata/", ".metadata/x"):
        assert requests.get(f"{migrated.url}/{path}", timeout=SECONDS).status_code == 404
        assert requests.head(f"{migrated.url}/{path}", timeout=SECONDS).status_code == 404
    for method in ("PUT", "DELETE"):
        response = requests.request(method, f"{migrated.url}/{name}", headers=migrated.headers(), timeout=SECONDS)
        assert response.status_code == (400 if method == "PUT" else 404)
    assert (migrated.document["local"]["storage_path"] / name).is_file()


def test_an_upload_replaces_the_type_too(migrated: Server) -> None:
    key = "mainline/v6.12/dmesg"
    headers = {**migrated.headers(), "Content-Type-Upstream": "application/json"}
    assert requests.put(f"{migrated.url}/{key}", data=b"{}", headers=headers, timeout=SECONDS).status_code == 200
    assert content_type(migrated, key) == "application/json"
    assert requests.delete(f"{migrated.url}/{key}", headers=migrated.headers(), timeout=SECONDS).status_code == 204
    assert requests.get(f"{migrated.url}/{key}", timeout=SECONDS).status_code == 404
