# SPDX-License-Identifier: LGPL-2.1-or-later
"""What uploads and downloads cost: the requests to the backend, which is paid for each. docs/performance.md has them.

They are counted by a proxy between the server and Azurite.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import requests

from kci_storage.drivers.azure.driver import BLOCK_SIZE
from kci_storage.drivers.azure.reads import READ_SIZE
from tests.support.cold import MIB, Bench
from tests.support.wire import SECONDS, new_folder, part, post, put

PUT_BLOB, PUT_BLOCK, PUT_BLOCK_LIST = "PUT", "PUT block", "PUT blocklist"
GET_BLOB, PROPERTIES = "GET", "HEAD"

SMALL = [0, 16 * 1024, BLOCK_SIZE]
LARGE = [BLOCK_SIZE + 1, 9 * MIB, 100 * MIB]


def cost(bench: Bench, key: str, act: Callable[[], Any]) -> Counter[str]:
    """The requests about a key that something makes the server send."""
    before = len(bench.proxy.requests)
    act()
    return Counter(each.operation for each in bench.proxy.requests[before:] if each.key == key)


def get(bench: Bench, key: str, method: str = "GET", **headers: str) -> requests.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(method, f"{bench.server.url}/{key}", headers=names, timeout=SECONDS)


def send(bench: Bench, way: str, key: str, content: bytes) -> None:
    """Upload by a form, or by PUT."""
    if way == "PUT":
        assert put(bench.server, key, content).ok
    else:
        folder, _, name = key.rpartition("/")
        assert post(bench.server, part("path", folder.encode()), part("file0", content, name)).ok


def of_an_upload(size: int) -> Counter[str]:
    """One request for what fits into a block; else one for each block, and one for their list."""
    if size <= BLOCK_SIZE:
        return Counter({PUT_BLOB: 1})
    return Counter({PUT_BLOCK: math.ceil(size / BLOCK_SIZE), PUT_BLOCK_LIST: 1})


@pytest.mark.parametrize("size", [*SMALL, *LARGE])
@pytest.mark.parametrize("way", ["form", "PUT"])
def test_an_upload(bench: Bench, way: str, size: int):
    """With its type, MD5, SHA-256 and the condition that there is nothing yet. It is a hit at once."""
    key, content = f"{new_folder()}/file.bin", os.urandom(size)
    assert cost(bench, key, lambda: send(bench, way, key, content)) == of_an_upload(size)
    assert cost(bench, key, lambda: get(bench, key)) == Counter()


@pytest.mark.parametrize("size", [16 * 1024, 9 * MIB])
@pytest.mark.parametrize("way", ["form", "PUT"])
def test_an_upload_over_what_is_cached(bench: Bench, way: str, size: int):
    key = f"{new_folder()}/file.bin"
    send(bench, "form", key, b"previous")
    assert cost(bench, key, lambda: send(bench, way, key, os.urandom(size))) == of_an_upload(size)


@pytest.mark.parametrize("way", ["form", "PUT"])
def test_an_upload_over_what_is_not_cached(bench: Bench, way: str):
    """It is tried as a new object, and refused once: each upload names the version that it replaces."""
    key = bench.store(b"previous")
    more = Counter({PUT_BLOB: 1, PROPERTIES: 1})
    assert cost(bench, key, lambda: send(bench, way, key, b"next")) == of_an_upload(4) + more


def test_a_deletion(bench: Bench):
    """It names the version, too: that of the copy, or the one that it finds."""
    url = f"{bench.server.url}/{bench.store(b'content')}"
    headers = bench.server.headers()
    key = url.removeprefix(bench.server.url + "/")
    assert cost(bench, key, lambda: requests.delete(url, headers=headers, timeout=SECONDS)) == {
        PROPERTIES: 1,
        "DELETE": 1,
    }
    send(bench, "PUT", key, b"content")
    assert cost(bench, key, lambda: requests.delete(url, headers=headers, timeout=SECONDS)) == {"DELETE": 1}


def test_the_files_of_a_form(bench: Bench):
    """Each is a request of its own: it is an object of its own."""
    folder = new_folder()
    parts = [part(f"file{number}", b"content", f"{number}") for number in range(5)]
    before = len(bench.proxy.requests)
    assert post(bench.server, part("path", folder.encode()), *parts).ok
    sent = [each for each in bench.proxy.requests[before:] if each.key.startswith(folder)]
    assert Counter(each.operation for each in sent) == {PUT_BLOB: 5}


def test_a_refused_upload(bench: Bench):
    key = f"{new_folder()}/file.bin"
    url = f"{bench.server.url}/{key}"
    assert cost(bench, key, lambda: requests.put(url, b"content", timeout=SECONDS)) == Counter()


@pytest.mark.parametrize("size", [1, 16 * 1024, 8 * MIB, READ_SIZE, READ_SIZE + 1, 100 * MIB])
def test_a_cold_download(bench: Bench, size: int):
    """The first answer says what the object is, so nothing is asked before; then it is a hit.

    What is more than one range costs one request more, or several if the connection is slow.
    """
    key = bench.store(os.urandom(size))
    requests = cost(bench, key, lambda: get(bench, key))
    most = math.ceil(size / READ_SIZE)
    assert requests.keys() == {GET_BLOB} and min(most, 2) <= requests[GET_BLOB] <= most
    assert cost(bench, key, lambda: get(bench, key)) == Counter()


def test_a_cold_download_of_nothing(bench: Bench):
    """A range of nothing is refused, and only then is it asked what there is."""
    key = bench.store(b"")
    assert cost(bench, key, lambda: get(bench, key)) == {GET_BLOB: 1, PROPERTIES: 1}


@pytest.mark.parametrize(
    ("method", "headers", "status", "expected"),
    [
        ("HEAD", {}, 200, {PROPERTIES: 1}),
        ("GET", {"If_None_Match": "*"}, 304, {PROPERTIES: 1}),
        ("GET", {"If_Match": '"another"'}, 412, {PROPERTIES: 1}),
        ("GET", {"Range": "bytes=1000000-1000099"}, 206, {GET_BLOB: 1}),
        ("GET", {"Range": "bytes=-100"}, 206, {PROPERTIES: 1, GET_BLOB: 1}),
        ("GET", {"Range": "bytes=90000000-90000099"}, 416, {PROPERTIES: 1, GET_BLOB: 1}),
        ("GET", {"Range": "bytes=90000000-"}, 416, {PROPERTIES: 1}),
    ],
    ids=["HEAD", "304", "412", "range", "last bytes", "beyond", "416"],
)
def test_a_cold_request_for_less(bench: Bench, method: str, headers: dict[str, str], status: int, expected: Any):
    key = bench.store(os.urandom(2 * MIB))
    answers = []
    assert cost(bench, key, lambda: answers.append(get(bench, key, method, **headers))) == expected
    assert [answer.status_code for answer in answers] == [status]


@pytest.mark.parametrize(("method", "expected"), [("GET", {GET_BLOB: 1}), ("HEAD", {PROPERTIES: 1})])
def test_a_missing_key(bench: Bench, method: str, expected: dict[str, int]):
    key = f"{new_folder()}/missing"
    assert cost(bench, key, lambda: get(bench, key, method)) == expected
