# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects that other programs have stored in the container, by their own lights."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import requests
from azure.storage.blob import ContentSettings

from tests.support.cold import MIB, Bench
from tests.support.wire import SECONDS, get, new_folder

SIZES = [1000, 9 * MIB]
WRONG = {"md5": "0" * 32, "sha256": "0" * 64}


def store(bench: Bench, content: bytes, algorithm: str = "", own: bool = False, **settings: Any) -> str:
    """Store an object, maybe with a wrong digest; its key.

    :param own: whether it looks as if this server had stored it.
    """
    key = f"{new_folder()}/file.bin"
    metadata = {"sha256": WRONG["sha256"]} if algorithm == "sha256" else {}
    if own:
        metadata["uploadid"] = "1"
    blob = bench.container.upload_blob(key, content, metadata=metadata, content_settings=ContentSettings(**settings))
    if algorithm == "md5":  # while it is uploaded, it would be compared
        blob.set_http_headers(ContentSettings(content_md5=bytearray.fromhex(WRONG["md5"])))
    return key


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", WRONG)
def test_a_wrong_digest_of_another_program_is_reported_and_the_object_served(
    bench: Bench, algorithm: str, size: int
) -> None:
    content = os.urandom(size)
    key = store(bench, content, algorithm)
    before, log = bench.metric("kci_storage_wrong_digests_total"), len(bench.server.log())
    for cache in ("miss", "hit"):
        answer = get(bench.server, key)
        assert (answer.status_code, answer.headers["X-Cache"], answer.content) == (200, cache, content)
        assert "Repr-Digest" not in answer.headers, "it is not known to be right"
    assert bench.metric("kci_storage_wrong_digests_total") == before + 1
    assert f"event=wrong_digest key='{key}' algorithm={algorithm}" in bench.server.log()[log:]


def test_a_right_digest_of_another_program_is_no_news(bench: Bench) -> None:
    content = os.urandom(1000)
    before = bench.metric("kci_storage_wrong_digests_total")
    key = store(bench, content, content_md5=bytearray(hashlib.md5(content).digest()))
    assert get(bench.server, key).content == content
    assert bench.metric("kci_storage_wrong_digests_total") == before


@pytest.mark.expected_errors("sent a damaged object|CorruptObject|event=error")
@pytest.mark.parametrize("algorithm", WRONG)
def test_a_wrong_digest_of_this_server_keeps_a_small_object_from_being_served(bench: Bench, algorithm: str) -> None:
    """An error with its own status, since nothing has been sent."""
    key = store(bench, os.urandom(1000), algorithm, own=True)
    answer = get(bench.server, key)
    assert (answer.status_code, "damaged" in answer.text) == (502, True)


@pytest.mark.expected_errors("sent a damaged object|CorruptObject|event=error")
@pytest.mark.parametrize("algorithm", WRONG)
def test_any_digest_binds_if_that_is_wanted(new_bench: Callable[..., Bench], algorithm: str) -> None:
    bench = new_bench(azure={"verify": "all"})
    assert get(bench.server, store(bench, os.urandom(1000), algorithm)).status_code == 502


def test_a_stored_content_encoding_is_passed_on(bench: Bench) -> None:
    text = b"text\n" * 1000
    key = store(bench, gzip.compress(text), content_type="text/plain", content_encoding="gzip")
    url = f"{bench.server.url}/{key}"
    for cache in ("miss", "hit"):
        answer = requests.get(url, timeout=SECONDS)
        assert (answer.headers["X-Cache"], answer.headers["Content-Encoding"], answer.content) == (
            cache,
            "gzip",
            text,
        )
    headers = {"Range": "bytes=0-9"}
    with requests.get(url, headers=headers, stream=True, timeout=SECONDS) as part:
        assert (part.status_code, part.headers["Content-Encoding"]) == (206, "gzip")
        assert part.raw.read(decode_content=False) == gzip.compress(text)[:10]
    assert requests.head(url, timeout=SECONDS).headers["Content-Encoding"] == "gzip"


@pytest.mark.parametrize("encoding", ["identity", "", 'gzip\t"odd"'])
def test_what_is_no_content_encoding_is_not_sent(bench: Bench, encoding: str) -> None:
    key = store(bench, b"content", content_encoding=encoding)
    answer = get(bench.server, key)
    assert (answer.content, answer.headers.get("Content-Encoding")) == (b"content", None)
