# SPDX-License-Identifier: LGPL-2.1-or-later
"""Downloads have the SHA-256 of the whole file if the backend knows it (RFC 9530)."""

from __future__ import annotations

import base64
import gzip
import hashlib
import secrets

import pytest
import requests

from tests.support.cold import Bench
from tests.support.harness import Server
from tests.support.wire import SECONDS, get, new_folder, put, stored_by_another_program, wait_until_tidy

CONTENT = secrets.token_bytes(3000)


def repr_digest(content: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("wanted", [None, "bytes=10-19", "bytes=0-0,-1"], ids=["all", "part", "parts"])
def test_every_answer_with_content_says_the_digest_of_the_whole(server: Server, method: str, wanted: str | None):
    key = f"{new_folder()}/file.bin"
    put(server, key, CONTENT)
    headers = {"Range": wanted} if wanted else {}
    answer = requests.request(method, f"{server.url}/{key}", headers=headers, timeout=SECONDS)
    assert answer.status_code == (206 if wanted and method == "GET" else 200)
    assert answer.headers["Repr-Digest"] == repr_digest(CONTENT)
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert "Repr-Digest" in exposed


def test_it_is_that_of_the_version_that_is_sent(server: Server):
    key = f"{new_folder()}/file.bin"
    for content in (b"old", b"new", b"old"):
        put(server, key, content)
        assert get(server, key).headers["Repr-Digest"] == repr_digest(content)


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"If-None-Match": "*"}, 304), ({"If-Match": '"other"'}, 412), ({"Range": "bytes=3000-"}, 416)],
)
def test_responses_without_the_content_have_no_digest(server: Server, headers: dict[str, str], status: int):
    """The last response has another body, for which this digest would be wrong."""
    key = f"{new_folder()}/file.bin"
    put(server, key, CONTENT)
    answer = get(server, key, headers)
    assert answer.status_code == status
    assert "Repr-Digest" not in answer.headers


def test_an_unpacked_view_has_the_digest_of_the_sent_content(server: Server):
    """The content coding belongs to the representation."""
    key, packed = f"{new_folder()}/build.log.gz", gzip.compress(b"a log")
    put(server, key, packed)
    answer = get(server, f"{key}?view=1")
    assert (answer.headers["Content-Encoding"], answer.content) == ("gzip", b"a log")
    assert answer.headers["Repr-Digest"] == repr_digest(packed)


@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_misses_and_hits_have_the_same_digest(bench: Bench, digest: str):
    """Another program has stored the object, with or without its SHA-256 in the metadata."""
    key = bench.store(CONTENT, digest=digest)
    expected = repr_digest(CONTENT) if digest == "sha256" else None
    for cache in ("miss", "hit"):
        answer = get(bench.server, key)
        assert (answer.headers["X-Cache"], answer.content) == (cache, CONTENT)
        assert answer.headers.get("Repr-Digest") == expected
        wait_until_tidy(bench.server)  # the copy is published after the miss's last byte


def test_a_file_that_was_put_there_by_hand_has_none(local_server: Server):
    key = f"{new_folder()}/file.bin"
    stored_by_another_program(local_server, key, CONTENT)
    assert "Repr-Digest" not in get(local_server, key).headers
