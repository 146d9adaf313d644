# SPDX-License-Identifier: LGPL-2.1-or-later
"""Downloads over HTTP: of local files, of copies in the cache, and of objects that only the backend has.

What RFC 9110 says is decided by pure functions, whose tables are in ``test_http_semantics.py``; here it is shown that
the decisions arrive on the wire, the same for each kind of object.
"""

from __future__ import annotations

import email.utils
import gzip
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
import requests
from azure.storage.blob import ContainerClient, ContentSettings

from tests.deploy.nginx import nginx
from tests.support.harness import Server, running, wait_until
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Wire,
    access,
    assert_error,
    form,
    get,
    keys,
    new_folder,
    part,
    put,
    request,
    stored_by_another_program,
    wait_until_tidy,
)

MIB = 1 << 20
GIB = 1 << 30


@dataclass
class Source:
    """Where objects are that a test downloads.

    :param cache: what ``X-Cache`` says to the first request for one.
    :param container: for objects that the server has never seen; None: they are uploaded through it.
    """

    server: Server
    cache: str
    container: ContainerClient | None

    def store(self, content: bytes, name: str = "file.bin", content_type: str | None = None) -> str:
        """Store a new object; returns its key."""
        key = f"{new_folder()}/{name}"
        if self.container is not None:
            settings = ContentSettings(content_type=content_type) if content_type else None
            self.container.upload_blob(key, content, content_settings=settings)
        else:
            headers = {"Content_Type_Upstream": content_type} if content_type else {}
            assert put(self.server, quote(key), content, **headers).status_code == 201
        return key


@pytest.fixture(scope="module")
def behind_nginx(azurite: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose hits are sent by nginx."""
    name = azurite.new_container()
    azure = {"account": azurite.account, "key": azurite.key, "endpoint": azurite.endpoint, "container": name}
    document = {"driver": "azure", "azure": azure, "server": {"accel_redirect": "/_cache/", "trusted_proxies": 1}}
    with (
        running(Server(tmp_path_factory.mktemp("server"), document)) as server,
        nginx(tmp_path_factory.mktemp("nginx"), server) as frontend,
    ):
        yield frontend


KINDS = ["local file", "hit", "miss"]


@pytest.fixture(params=[*KINDS, "hit through nginx"])
def source(request: pytest.FixtureRequest) -> Iterator[Source]:
    """Each kind of server."""
    yield from source_of(request.param, request)


@pytest.fixture(params=KINDS)
def direct_source(request: pytest.FixtureRequest) -> Iterator[Source]:
    """The servers that send the content themselves, without nginx."""
    yield from source_of(request.param, request)


def source_of(kind: str, request: pytest.FixtureRequest) -> Iterator[Source]:
    """A server of this kind."""
    if kind == "miss":
        server, azurite = request.getfixturevalue("azure_server"), request.getfixturevalue("azurite")
        with azurite.client(server.document["azure"]["container"]) as container:
            yield Source(server, "miss", container)
    else:
        fixture = {"local file": "local_server", "hit": "azure_server", "hit through nginx": "behind_nginx"}[kind]
        yield Source(request.getfixturevalue(fixture), "hit", None)


def head(server: Server, key: str, headers: dict[str, str] | None = None) -> requests.Response:
    fields = {"Accept-Encoding": "identity", **(headers or {})}
    return requests.head(f"{server.url}/{key}", headers=fields, timeout=SECONDS)


# Conditions and ranges (RFC 9110, sections 13 and 14)


CONTENT = bytes(range(256)) * 4  # 1,024 bytes, line ends and NULs among them
SIZE = len(CONTENT)
RANGES = list[tuple[int, int]]  # first and last byte


def bytes_of(positions: Iterable[int]) -> str:
    """A Range header for single bytes."""
    return "bytes=" + ",".join(f"{position}-{position}" for position in positions)


TABLE: dict[str, tuple[dict[str, str], int, RANGES | None]] = {
    # the range, the status, and the parts of the content in the response; None: all of it
    "nothing special": ({}, 200, None),
    "a first part": ({"Range": "bytes=0-99"}, 206, [(0, 99)]),
    "one byte": ({"Range": "bytes=500-500"}, 206, [(500, 500)]),
    "the last byte": ({"Range": f"bytes={SIZE - 1}-"}, 206, [(SIZE - 1, SIZE - 1)]),
    "from somewhere to the end": ({"Range": "bytes=1000-"}, 206, [(1000, SIZE - 1)]),
    "all, as a range": ({"Range": "bytes=0-"}, 206, [(0, SIZE - 1)]),
    "an end": ({"Range": "bytes=-10"}, 206, [(SIZE - 10, SIZE - 1)]),
    "an end longer than the file": ({"Range": "bytes=-99999"}, 206, [(0, SIZE - 1)]),
    "beyond the end, clamped": ({"Range": "bytes=1000-99999"}, 206, [(1000, SIZE - 1)]),
    "in capitals, with blanks": ({"Range": "BYTES= 0-9 "}, 206, [(0, 9)]),
    "behind the end": ({"Range": f"bytes={SIZE}-"}, 416, []),
    "far behind the end": ({"Range": f"bytes={'9' * 40}-"}, 416, []),
    "an end of nothing": ({"Range": "bytes=-0"}, 416, []),
    "several behind the end": ({"Range": "bytes=9999-,8888-9000"}, 416, []),
    "a range backwards": ({"Range": "bytes=9-0"}, 200, None),
    "no range": ({"Range": "bytes="}, 200, None),
    "no number": ({"Range": "bytes=a-b"}, 200, None),
    "another unit": ({"Range": "lines=0-9"}, 200, None),
    "malformed": ({"Range": "0-9"}, 200, None),
    "two ranges": ({"Range": "bytes=0-9,100-109"}, 206, [(0, 9), (100, 109)]),
    "ranges in another order": ({"Range": "bytes=-5, 20-29, 0-9"}, 206, [(SIZE - 5, SIZE - 1), (20, 29), (0, 9)]),
    "some behind the end": ({"Range": "bytes=0-9,9999-,20-29"}, 206, [(0, 9), (20, 29)]),
    "all but one behind the end": ({"Range": "bytes=0-9,9999-"}, 206, [(0, 9)]),
    "overlapping ranges": ({"Range": "bytes=0-99,50-149,200-209"}, 206, [(0, 149), (200, 209)]),
    "ranges that touch": ({"Range": "bytes=0-9,10-19"}, 206, [(0, 19)]),
    "64 ranges": ({"Range": bytes_of(range(0, 128, 2))}, 206, [(n, n) for n in range(0, 128, 2)]),
    "65 ranges": ({"Range": bytes_of(range(0, 130, 2))}, 200, None),
    "ranges of more than the file": ({"Range": "bytes=0-,0-,0-"}, 200, None),
    "If-Match": ({"If-Match": "{etag}"}, 200, None),
    "If-Match, any": ({"If-Match": "*"}, 200, None),
    "If-Match, a list": ({"If-Match": '"x", {etag}, "y"'}, 200, None),
    "If-Match, another": ({"If-Match": '"x"'}, 412, []),
    "If-Match, weak": ({"If-Match": "W/{etag}"}, 412, []),
    "If-Match, another, and a range": ({"If-Match": '"x"', "Range": "bytes=0-9"}, 412, []),
    "If-Match and a range": ({"If-Match": "{etag}", "Range": "bytes=0-9"}, 206, [(0, 9)]),
    "If-Unmodified-Since, now": ({"If-Unmodified-Since": "{modified}"}, 200, None),
    "If-Unmodified-Since, before": ({"If-Unmodified-Since": "{before}"}, 412, []),
    "If-Unmodified-Since, nonsense": ({"If-Unmodified-Since": "nonsense"}, 200, None),
    "If-Match before If-Unmodified-Since": ({"If-Match": "{etag}", "If-Unmodified-Since": "{before}"}, 200, None),
    "If-None-Match": ({"If-None-Match": "{etag}"}, 304, []),
    "If-None-Match, weak": ({"If-None-Match": "W/{etag}"}, 304, []),
    "If-None-Match, any": ({"If-None-Match": "*"}, 304, []),
    "If-None-Match, a list": ({"If-None-Match": '"x", W/"y", {etag}'}, 304, []),
    "If-None-Match, another": ({"If-None-Match": '"x"'}, 200, None),
    "If-None-Match and a range": ({"If-None-Match": "{etag}", "Range": "bytes=0-9"}, 304, []),
    "If-None-Match, another, and a range": ({"If-None-Match": '"x"', "Range": "bytes=0-9"}, 206, [(0, 9)]),
    "If-Match and If-None-Match": ({"If-Match": "{etag}", "If-None-Match": "{etag}"}, 304, []),
    "If-Modified-Since, now": ({"If-Modified-Since": "{modified}"}, 304, []),
    "If-Modified-Since, later": ({"If-Modified-Since": "{after}"}, 304, []),
    "If-Modified-Since, before": ({"If-Modified-Since": "{before}"}, 200, None),
    "If-None-Match before If-Modified-Since": ({"If-None-Match": '"x"', "If-Modified-Since": "{after}"}, 200, None),
    "If-Range": ({"If-Range": "{etag}", "Range": "bytes=0-9"}, 206, [(0, 9)]),
    "If-Range, another": ({"If-Range": '"x"', "Range": "bytes=0-9"}, 200, None),
    "If-Range, weak": ({"If-Range": "W/{etag}", "Range": "bytes=0-9"}, 200, None),
    "If-Range, the date": ({"If-Range": "{modified}", "Range": "bytes=0-9"}, 206, [(0, 9)]),
    "If-Range, a later date": ({"If-Range": "{after}", "Range": "bytes=0-9"}, 200, None),
    "If-Range, another, and a range behind the end": ({"If-Range": '"x"', "Range": "bytes=9999-"}, 200, None),
    "If-Range without a range": ({"If-Range": '"x"'}, 200, None),
}  # fmt: skip


def filled_in(headers: dict[str, str], known: requests.Response) -> dict[str, str]:
    """The headers, with the values of this HEAD response filled in."""
    modified = email.utils.parsedate_to_datetime(known.headers["Last-Modified"]).timestamp()
    values = {
        "{etag}": known.headers["ETag"],
        "{modified}": known.headers["Last-Modified"],
        "{before}": email.utils.formatdate(modified - 3600, usegmt=True),
        "{after}": email.utils.formatdate(modified + 3600, usegmt=True),
    }
    for name, value in values.items():
        headers = {field: text.replace(name, value) for field, text in headers.items()}
    return headers


def parts_of(answer: requests.Response) -> tuple[list[str], list[bytes]]:
    """The Content-Ranges and the contents of a ``multipart/byteranges`` body."""
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    parts = BytesParser().parsebytes(head + answer.content).get_payload()
    assert all(part["Content-Type"] == "application/octet-stream" for part in parts)
    return [part["Content-Range"] for part in parts], [part.get_payload(decode=True) for part in parts]


@pytest.mark.parametrize("case", TABLE)
def test_conditions_and_ranges(source: Source, case: str):
    asked, status, ranges = TABLE[case]
    key = source.store(CONTENT)
    known = head(source.server, key)  # it does not fetch what is not here
    answer = get(source.server, key, filled_in(asked, known))
    assert answer.status_code == status
    assert answer.headers["ETag"] == known.headers["ETag"]
    assert answer.headers["Last-Modified"] == known.headers["Last-Modified"]
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["X-Cache"] == source.cache
    assert_public(answer)
    if status == 200:
        assert answer.content == CONTENT
        assert answer.headers["Content-Length"] == str(SIZE)
        assert "Content-Range" not in answer.headers
    elif status == 206:
        assert_parts(answer, ranges or [])
    elif status == 416:
        assert answer.headers["Content-Range"] == f"bytes */{SIZE}"
        assert_error(answer, 416, source.server)
    else:
        assert answer.content == b""
        assert answer.headers.get("Content-Length", "0") == "0"
        assert "Content-Type" not in answer.headers


def assert_parts(answer: requests.Response, ranges: RANGES) -> None:
    assert answer.headers["Content-Length"] == str(len(answer.content))
    said = [f"bytes {first}-{last}/{SIZE}" for first, last in ranges]
    contents = [CONTENT[first : last + 1] for first, last in ranges]
    if len(ranges) == 1:
        assert ([answer.headers["Content-Range"]], [answer.content]) == (said, contents)
    else:
        assert answer.headers["Content-Type"].startswith("multipart/byteranges; boundary=")
        assert "Content-Range" not in answer.headers
        assert answer.content.startswith(b"\r\n--")  # zsync does not end without the line break
        assert parts_of(answer) == (said, contents)


def assert_public(answer: requests.Response) -> None:
    """Check that scripts of any site may read the response, and caches may keep it if they revalidate before use."""
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Cache-Control"] == "public, no-cache"
    assert answer.headers["X-Content-Type-Options"] == "nosniff" or answer.status_code == 304
    exposed = answer.headers["Access-Control-Expose-Headers"].replace(" ", "").lower().split(",")
    for name in (
        "ETag", "Last-Modified", "Content-Length", "Accept-Ranges", "Content-Disposition", "X-Cache", "Content-Range"
    ):  # fmt: skip
        assert name.lower() in exposed


@pytest.mark.parametrize("case", TABLE)
def test_head_is_get_without_a_body_and_ignores_ranges(source: Source, case: str):
    asked, status, _ = TABLE[case]
    key = source.store(CONTENT)
    headers = filled_in(asked, head(source.server, key))
    answer = head(source.server, key, headers)
    assert answer.status_code == (200 if status in (206, 416) else status)
    headers.pop("Range", None)
    assert comparable(answer) == comparable(get(source.server, key, headers))


def comparable(answer: requests.Response) -> dict[str, str]:
    """The headers that are the same in the response to each request."""
    return {name: text for name, text in answer.headers.items() if name not in ("Date", "X-Request-ID")}


def test_head_sends_no_body(source: Source):
    """The next response on the connection shows it."""
    key = source.store(CONTENT)
    with Wire(source.server) as wire:
        wire.send(request("HEAD", f"/{key}"), request("HEAD", f"/{key}x"), request("GET", "/v1/health"))
        assert wire.answer("HEAD").headers["Content-Length"] == str(SIZE)
        assert wire.answer("HEAD").status == 404
        assert wire.answer().body == b"ok"


def test_an_empty_file(source: Source):
    key = source.store(b"")
    for headers in ({}, {"Range": "bytes=0-"}, {"Range": "bytes=-5"}, {"Range": "bytes=0-0,2-3"}):
        answer = get(source.server, key, headers)
        assert (answer.status_code, answer.content, answer.headers["Content-Length"]) == (200, b"", "0")
    assert head(source.server, key).headers["Content-Length"] == "0"


@pytest.mark.parametrize("size", [1, 262_144, 262_145, 1_048_576, 33 * MIB])
def test_every_byte_arrives(source: Source, size: int):
    content = os.urandom(size)
    key = source.store(content)
    answer = get(source.server, key)
    assert answer.headers["Content-Length"] == str(size)
    assert answer.content == content
    again = wait_until(lambda: hit(source.server, key), SECONDS, "the copy in the cache")
    assert again.content == content
    start = size * 2 // 3
    assert get(source.server, key, {"Range": f"bytes={start}-"}).content == content[start:]
    assert comparable(again) | {"X-Cache": source.cache} == comparable(answer)


def hit(server: Server, key: str) -> requests.Response | None:
    answer = get(server, key)
    return answer if answer.headers["X-Cache"] == "hit" else None


def test_a_cold_object_becomes_a_hit_on_every_worker(azure_server: Server, azurite: Any):
    content = os.urandom(100_000)
    with azurite.client(azure_server.document["azure"]["container"]) as container:
        key = f"{new_folder()}/a"
        container.upload_blob(key, content)
    assert get(azure_server, key).headers["X-Cache"] == "miss"
    wait_until(lambda: hit(azure_server, key), SECONDS, "the copy in the cache")
    for _ in range(8):
        answer = get(azure_server, key)
        assert (answer.headers["X-Cache"], answer.content) == ("hit", content)


def test_a_range_of_a_cold_object_fetches_no_more_than_that(azure_server: Server, azurite: Any):
    """A crawler that reads the end of every image must not fill the cache."""
    content = os.urandom(5 * MIB)
    with azurite.client(azure_server.document["azure"]["container"]) as container:
        key = f"{new_folder()}/a"
        container.upload_blob(key, content)
    for _ in range(4):
        answer = get(azure_server, key, {"Range": "bytes=-1000"})
        assert (answer.headers["X-Cache"], answer.content) == ("miss", content[-1000:])
        assert head(azure_server, key).headers["X-Cache"] == "miss"


def test_many_clients_of_one_cold_object(azure_server: Server, azurite: Any):
    content = os.urandom(10 * MIB)
    with azurite.client(azure_server.document["azure"]["container"]) as container:
        key = f"{new_folder()}/a"
        container.upload_blob(key, content)
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(get(azure_server, key).content)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [content] * 12


def test_a_miss_during_an_upload_is_answered_from_it(azure_server: Server):
    key = f"{new_folder()}/a"
    with Wire(azure_server) as uploader, Wire(azure_server) as reader:
        uploader.send(request("PUT", f"/{key}", {**azure_server.headers(), "Content-Length": 10}), b"first")
        wait_until(azure_server.is_writing, SECONDS, "the upload's lock")
        reader.send(request("GET", f"/{key}"))
        reader.wait_until_taken()
        uploader.send(b"-done")
        assert uploader.answer().status == 201
        assert reader.answer().body == b"first-done"


def test_a_miss_does_not_wait_for_an_upload_for_ever(start_server: Callable[..., Server]):
    server = start_server("azure", server={"lock_timeout": 0.3})
    key = f"{new_folder()}/a"
    with Wire(server) as uploader:
        uploader.send(request("PUT", f"/{key}", {**server.headers(), "Content-Length": 10}), b"first")
        wait_until(server.is_writing, SECONDS, "the upload's lock")
        answer = get(server, key)
        assert_error(answer, 503, server)
        assert int(answer.headers["Retry-After"]) > 0
        uploader.send(b"-done")
        assert uploader.answer().status == 201
    assert get(server, key).content == b"first-done"


# Headers


@pytest.mark.parametrize(
    ("name", "stored_type", "sent_type", "disposition"),
    [
        ("build.log", None, "text/plain; charset=utf-8", 'inline; filename="build.log"'),
        ("A.TXT", None, "text/plain; charset=utf-8", 'inline; filename="A.TXT"'),
        (".config", None, "text/plain; charset=utf-8", 'inline; filename=".config"'),
        ("a.dts", None, "text/plain; charset=utf-8", 'inline; filename="a.dts"'),
        ("a.yaml", None, "text/plain; charset=utf-8", 'inline; filename="a.yaml"'),
        ("results.json", None, "application/json", 'inline; filename="results.json"'),
        ("a.png", None, "image/png", 'inline; filename="a.png"'),
        ("a.pdf", None, "application/pdf", 'inline; filename="a.pdf"'),
        ("a.html", None, "text/html; charset=utf-8", 'attachment; filename="a.html"'),
        ("a.svg", None, "image/svg+xml", 'attachment; filename="a.svg"'),
        ("a.xml", None, "application/xml", 'attachment; filename="a.xml"'),
        ("boot.log.gz", None, "application/gzip", 'attachment; filename="boot.log.gz"'),
        ("modules.tar.xz", None, "application/x-xz", 'attachment; filename="modules.tar.xz"'),
        ("a.zst", None, "application/zstd", 'attachment; filename="a.zst"'),
        ("a.dtb", None, "application/octet-stream", 'attachment; filename="a.dtb"'),
        ("Image", None, "application/octet-stream", 'attachment; filename="Image"'),
        ("a.bin", "text/x-log", "text/x-log; charset=utf-8", 'attachment; filename="a.bin"'),
        ("a.bin", "text/plain", "text/plain; charset=utf-8", 'inline; filename="a.bin"'),
        ("a.txt", "text/html", "text/html; charset=utf-8", 'attachment; filename="a.txt"'),
        ("a b.log", None, "text/plain; charset=utf-8", 'inline; filename="a b.log"'),
        ("ä.log", None, "text/plain; charset=utf-8", "inline; filename=\"_.log\"; filename*=UTF-8''%C3%A4.log"),
        ('a".log', None, "text/plain; charset=utf-8", 'inline; filename="a\\".log"; filename*=UTF-8\'\'a%22.log'),
    ],
)
def test_type_and_disposition(source: Source, name: str, stored_type: str | None, sent_type: str, disposition: str):
    if source.cache == "miss" and stored_type is None:
        stored_type = "application/octet-stream" if sent_type == "application/octet-stream" else sent_type
    key = quote(source.store(b"content", name, stored_type))
    answer = get(source.server, key)
    assert answer.headers["Content-Type"] == sent_type
    assert answer.headers["Content-Disposition"] == disposition
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Content-Encoding" not in answer.headers
    saved = get(source.server, f"{key}?download=1")
    assert saved.headers["Content-Disposition"] == disposition.replace("inline", "attachment")
    assert saved.content == b"content"


@pytest.mark.parametrize(
    ("name", "stored_type", "shown_as"),
    [
        ("boot.log.gz", None, "text/plain; charset=utf-8"),
        ("boot.LOG.GZ", None, "text/plain; charset=utf-8"),
        ("a.txt.gz", "application/x-gzip", "text/plain; charset=utf-8"),
        (".config.gz", None, "text/plain; charset=utf-8"),
        ("results.json.gz", "application/gzip", "application/json"),
        ("page.html.gz", None, None),
        ("image.svg.gz", None, None),
        ("modules.tar.gz", None, None),
        ("gz", None, None),
        ("Image.gz", None, None),
        ("boot.log", None, None),
        ("boot.log.xz", None, None),
        ("a.txt.gz", "text/html", None),
        ("a.txt.gz", "text/plain", None),
    ],
)
def test_a_compressed_text_can_be_read_in_the_browser(
    source: Source, name: str, stored_type: str | None, shown_as: str | None
):
    text = b"[    0.000000] Booting Linux\n" * 1000
    stored = gzip.compress(text)
    key = source.store(stored, name, stored_type)
    shown = get(source.server, f"{key}?view=1")
    plain = get(source.server, key)
    assert plain.content == stored
    assert "Content-Encoding" not in plain.headers
    if shown_as is None:
        assert shown.content == stored
        assert shown.headers["Content-Type"] == plain.headers["Content-Type"]
        assert shown.headers["Content-Disposition"] == plain.headers["Content-Disposition"]
        assert "Content-Encoding" not in shown.headers
    else:
        assert shown.content == text
        assert shown.headers["Content-Encoding"] == "gzip"
        assert shown.headers["Content-Type"] == shown_as
        assert shown.headers["Content-Disposition"] == f'inline; filename="{name[:-3]}"'
        assert shown.headers["X-Content-Type-Options"] == "nosniff"
        assert shown.headers["ETag"] == plain.headers["ETag"]
        unchanged = get(source.server, f"{key}?view=1", {"If-None-Match": shown.headers["ETag"]})
        assert unchanged.status_code == 304
    assert get(source.server, f"{key}?view=1&download=1").content == stored
    assert get(source.server, f"{key}?view=0").content == stored


def test_a_query_of_any_size_is_no_error(source: Source):
    key = source.store(b"content", "a.log")
    answer = get(source.server, f"{key}?{'a&' * 2000}download=1")
    assert answer.headers["Content-Disposition"].startswith("attachment")


def test_caches_are_told_what_the_operator_wants(start_server: Callable[..., Server]):
    server = start_server(server={"cache_control": "public, max-age=60"})
    key = f"{new_folder()}/a"
    put(server, key, b"content")
    etag = get(server, key).headers["ETag"]
    for headers, status in (({}, 200), ({"Range": "bytes=0-1"}, 206), ({"If-None-Match": etag}, 304)):
        answer = get(server, key, headers)
        assert (answer.status_code, answer.headers["Cache-Control"]) == (status, "public, max-age=60")
    assert get(server, f"{key}x").headers["Cache-Control"] == "public, no-cache"


def test_public_errors_may_be_read_by_scripts(server: Server):
    for answer in (get(server, f"{new_folder()}/none"), get(server, "v1/nothing"), head(server, "none/at/all")):
        assert answer.status_code == 404
        assert_public(answer)


def test_a_browser_may_ask_first(server: Server):
    answer = requests.options(f"{server.url}/any/key", timeout=SECONDS)
    assert answer.status_code in (200, 204)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "GET" in answer.headers["Access-Control-Allow-Methods"]
    assert "Range" in answer.headers["Access-Control-Allow-Headers"]


def test_the_request_id_is_the_clients_or_a_new_one(source: Source):
    key = source.store(CONTENT)
    for sane in ("a", "0b1c-2d_3.4:5/6+7=8", "x" * 128):
        assert get(source.server, key, {"X-Request-ID": sane}).headers["X-Request-ID"] == sane
    new = {get(source.server, key).headers["X-Request-ID"] for _ in range(3)}
    for insane in ("", "a b", 'a"b', "a\tb", "é", "x" * 129, "a=b;c"):
        headers = {"X-Request-ID": insane.encode("latin-1")}
        new.add(requests.get(f"{source.server.url}/{key}", headers=headers, timeout=SECONDS).headers["X-Request-ID"])
    assert len(new) == 10 and all(len(request_id) >= 16 for request_id in new)
    for path in ("", "none", "v1/checkauth", "v1/list", "metrics", "v1/health", "v1/ready"):
        assert get(source.server, path, {"X-Request-ID": "mine"}).headers["X-Request-ID"] == "mine"


# Keys


ODD = [
    "a b",
    " leading and trailing ",
    "tilde~",
    "!$&'()*+,;=:@",
    "percent%",
    "percent%41",
    "question?mark",
    "hash#tag",
    "[brackets]{braces}",
    "quote\"'`",
    "less<more>",
    "pipe|caret^",
    "...x",
    "..a",
    "a..b",
    "-",
    "~",
    "文件",
    "e\u0301 is not é",
    "🎉",
    "\u200fright to left",
    "\xa0",
    "\ufeff",
    "\U0010ffff",
    "CON",
    "x" * 255,
    "文" * 85,
    ".hidden/file",
    "V1/a",
    "a/upload",
    "a/v1/b",
    "metrics/a",
    "upload/a",
]


def test_odd_keys_go_round(server: Server):
    folder = new_folder()
    for name in ODD:
        assert put(server, quote(f"{folder}/{name}"), name.encode()).status_code == 201, name
    assert sorted(keys(server, folder)) == sorted(f"{folder}/{name}" for name in ODD)
    for name in ODD:
        answer = get(server, quote(f"{folder}/{name}"))
        assert answer.content == name.encode(), name
        everything_quoted = "".join(f"%{byte:02X}" for byte in f"{folder}/{name}".encode())
        assert get(server, everything_quoted).content == name.encode(), name


def test_every_printable_character_goes_round(server: Server):
    folder = new_folder()
    name = "".join(chr(code) for code in range(32, 127) if chr(code) not in '/\\"')
    (file,) = requests.post(
        f"{server.url}/upload",
        form(part("path", folder.encode()), part("file0", b"content", name)),
        headers={**server.headers(), **FORM_TYPE},
        timeout=SECONDS,
    ).json()["files"]
    assert file["path"] == f"{folder}/{name}"
    assert requests.get(server.url + file["url"], timeout=SECONDS).content == b"content"
    assert keys(server, folder) == [f"{folder}/{name}"]


# Connections


def test_a_range_deep_in_a_large_file_costs_nothing(local_server: Server):
    """The file is not read from its beginning."""
    key = f"{new_folder()}/disk.img"
    path = stored_by_another_program(local_server, key, b"start")
    with path.open("r+b") as file:
        file.truncate(9 * GIB)
        file.seek(8 * GIB)
        file.write(b"deep")
    before = processor_seconds(local_server)
    for _ in range(30):
        answer = get(local_server, key, {"Range": f"bytes={8 * GIB}-{8 * GIB + 9}"})
        assert (answer.status_code, answer.content) == (206, b"deep" + bytes(6))
        assert get(local_server, key, {"Range": "bytes=-5"}).content == bytes(5)
    several = get(local_server, key, {"Range": f"bytes=0-4,{8 * GIB}-{8 * GIB + 3}"})
    assert b"start" in several.content and b"deep" in several.content
    assert processor_seconds(local_server) - before < 2  # reading 8 GiB once takes about as long


def processor_seconds(server: Server) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in server.worker_pids()]
    return sum(time.user + time.system for time in times)


def test_a_client_that_leaves(direct_source: Source):
    """The log has the number of sent bytes, and the next client gets the whole file."""
    content = os.urandom(MIB) * 64
    key = direct_source.store(content)
    with Wire(direct_source.server, receive_buffer=64 * 1024) as wire:
        wire.send(request("GET", f"/{key}"))
        answer = wire.head()
        assert wire.read(MIB) == content[:MIB]
        wire.reset()
    line = access(direct_source.server, answer)
    assert line["status"] == "200"
    assert MIB <= int(line["bytes"]) < len(content)
    assert hashlib.sha256(get(direct_source.server, key).content).digest() == hashlib.sha256(content).digest()
    wait_until_tidy(direct_source.server)


def test_all_clients_are_counted_in_full(direct_source: Source):
    key = direct_source.store(CONTENT * 1000)
    for headers, size in (({}, SIZE * 1000), ({"Range": "bytes=5-14"}, 10), ({"If-None-Match": "*"}, 0)):
        line = access(direct_source.server, get(direct_source.server, key, headers))
        assert line["bytes"] == str(size)
    assert access(direct_source.server, head(direct_source.server, key))["bytes"] == "0"


def test_a_file_that_shrinks_while_it_is_sent_ends_the_connection(local_server: Server):
    """The client must neither wait for the rest, nor take the next response for it."""
    key = f"{new_folder()}/growing.log"
    path = stored_by_another_program(local_server, key, os.urandom(MIB) * 64)
    with Wire(local_server, receive_buffer=64 * 1024) as wire:
        wire.send(request("GET", f"/{key}"), request("GET", "/v1/health"))
        answer = wire.head()
        assert len(wire.read(MIB)) == MIB
        os.truncate(path, 16 * MIB)
        rest = wire.rest()
    assert len(rest) <= 15 * MIB and b"HTTP/1.1" not in rest
    assert int(access(local_server, answer)["bytes"]) <= 16 * MIB


def test_a_file_put_there_by_hand_is_served(local_server: Server):
    key = f"{new_folder()}/deep/er/by hand.log"
    path = stored_by_another_program(local_server, key, b"by hand")
    answer = get(local_server, quote(key))
    assert (answer.content, answer.headers["Content-Type"]) == (b"by hand", "text/plain; charset=utf-8")
    assert get(local_server, quote(key), {"If-None-Match": answer.headers["ETag"]}).status_code == 304
    path.write_bytes(b"changed by hand")
    changed = get(local_server, quote(key), {"If-None-Match": answer.headers["ETag"]})
    assert (changed.status_code, changed.content) == (200, b"changed by hand")
    path.unlink()
    assert get(local_server, quote(key)).status_code == 404


def test_what_is_no_file_is_not_found(local_server: Server, tmp_path: Path):
    folder = new_folder()
    stored_by_another_program(local_server, f"{folder}/folder/a", b"content")
    root = local_server.storage_path / folder
    os.mkfifo(root / "pipe")
    os.symlink(root / "nowhere", root / "dangling")
    os.symlink("loop", root / "loop")
    for name in ("folder", "folder/a/b", "pipe", "dangling", "loop"):
        assert_error(get(local_server, f"{folder}/{name}"), 404, local_server)
