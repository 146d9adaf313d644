# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Azure driver, over Azurite; and what it does when the backend fails, over a proxy that fails on request."""

from __future__ import annotations

import contextlib
import http.client
import logging
import multiprocessing
import os
import socket
import threading
import time
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob import BlobBlock, ContainerClient, ContentSettings, generate_container_sas

from kci_storage.config.settings import Config
from kci_storage.drivers.azure import driver as azure
from kci_storage.drivers.azure import foreign_blocks, listing, outcomes, reads, service, signature
from kci_storage.drivers.azure.driver import AzureDriver
from kci_storage.drivers.azure.writer import BLOCKS_IN_FLIGHT
from kci_storage.drivers.base import Driver, ObjectInfo
from kci_storage.drivers.guard import GuardedDriver
from kci_storage.errors import (
    TABLE,
    BackendError,
    BackendThrottled,
    BackendTimeout,
    KeyConflict,
    ObjectBlocked,
    ObjectChanged,
    ObjectNotFound,
    OutcomeUnknown,
    PreconditionFailed,
    StorageError,
    WriteConflict,
    meaning,
)
from tests.drivers.contract import (
    KIB,
    SOME,
    DriverContract,
    at_once,
    commit_over_anything,
    content_of,
    delete,
    digests_of,
    etag_of,
    get,
    in_pieces,
    listed,
    put,
)
from tests.support.azurite import Azurite, running_azurite
from tests.support.harness import Server, wait_until
from tests.support.wire import get as get_over_http
from tests.support.wire import new_folder
from tests.support.wire import put as put_over_http

BLOCK = 64 * KIB
SECONDS = 60  # for which a test waits for what comes sooner


@pytest.fixture
def small_sizes(monkeypatch):
    """A few hundred KiB are many ranges, some dozens of objects many pages; and no test waits for a retry."""
    monkeypatch.setattr(service, "RETRY_WAIT", 0.01)
    monkeypatch.setattr(reads, "READ_SIZE", 64 * KIB)
    monkeypatch.setattr(reads, "LONG_READ_SIZE", 64 * KIB)
    monkeypatch.setattr(listing, "LIST_SIZE", 7)
    monkeypatch.setattr(listing, "NAMES_SIZE", 7)


@contextlib.contextmanager
def closing(driver: AzureDriver) -> Iterator[AzureDriver]:
    """A driver that is closed at the end."""
    try:
        yield driver
    finally:
        driver.close()


class TestAzureDriver(DriverContract):
    @pytest.fixture
    def driver(self, azurite, small_sizes):
        with closing(AzureDriver(azurite.settings(), block_size=BLOCK)) as driver:
            yield driver

    @pytest.fixture
    def production_driver(self, driver, monkeypatch):
        monkeypatch.undo()
        with closing(AzureDriver(driver._settings)) as production_driver:
            yield production_driver

    def begin_read(self, driver, key):
        # Azurite 3.35 gives, for a moment, the previous version's content under the next one's headers (it takes
        # these after the content). Asked for a certain version, the driver sees it.
        return driver.read(key, etag=driver.stat(key).etag)

    def leftovers(self, driver):
        return listed(driver, details=False)


# A proxy between the driver and Azurite


@dataclass
class Request:
    """A request that came through."""

    method: str
    path: str  # with the query
    headers: http.client.HTTPMessage = field(repr=False)
    number: int  # of all that came through, from 0

    def __str__(self) -> str:
        return f"{self.method} {next((part for part in self.path.split('?')[-1].split('&') if 'comp=' in part), '')}"


@dataclass
class Answer:
    """What the backend said, to be changed by a fault."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    cut: int | None = None  # bytes of the body after which the connection breaks; -1: before the head


class Proxy:
    """Passes requests on, and remembers them. ``before`` and ``after`` are what a test wants to go wrong."""

    def __init__(self, azurite: Azurite):
        self.requests: list[Request] = []
        self.before: Callable[[Request], Answer | None] = lambda request: None  # an answer instead of the backend's
        self.after: Callable[[Request, Answer], None] = lambda request, answer: None  # changes the backend's answer
        self.pause: Callable[[], None] = lambda: None  # called for each 64 KiB of a request's body
        self.upstream = urlsplit(azurite.endpoint)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(), bind_and_activate=False)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # a connection that the driver broke off
        self.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        self.server.request_queue_size = 128  # else connections time out that come while a busy machine accepts none
        self.server.server_bind()
        self.server.server_activate()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.endpoint = self.url + self.upstream.path

    def seen(self) -> list[str]:
        """The requests so far, each as its method and its ``comp`` parameter."""
        return [str(request).strip() for request in self.requests]

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                request = Request(self.command, self.path, self.headers, len(proxy.requests))
                proxy.requests.append(request)
                body = self._body()
                answer = proxy.before(request)
                if answer is None:
                    answer = self._ask(body)
                    proxy.after(request, answer)
                self._send(answer)

            do_PUT = do_HEAD = do_DELETE = do_GET

            def _body(self) -> bytes:
                body = bytearray()
                while len(body) < int(self.headers.get("Content-Length", 0)):
                    body += self.rfile.read(min(64 * KIB, int(self.headers["Content-Length"]) - len(body)))
                    proxy.pause()
                return bytes(body)

            def _ask(self, body: bytes) -> Answer:
                connection = http.client.HTTPConnection(proxy.upstream.netloc)
                with contextlib.closing(connection):
                    target = urlsplit(self.path)
                    connection.putrequest(
                        self.command, target._replace(scheme="", netloc="").geturl(), skip_host=True,
                        skip_accept_encoding=True,
                    )  # fmt: skip
                    for name, value in self.headers.items():  # Host, too, which is not signed
                        connection.putheader(name, proxy.upstream.netloc if name == "Host" else value)
                    connection.endheaders(body)
                    response = connection.getresponse()
                    return Answer(response.status, response.getheaders(), response.read())

            def _send(self, answer: Answer) -> None:
                if answer.cut == -1:
                    self.close_connection = True
                    return
                self.send_response_only(answer.status)
                for name, value in answer.headers:
                    if name.lower() != "transfer-encoding":
                        self.send_header(name, value)
                if self.command != "HEAD" and not any(name.lower() == "content-length" for name, _ in answer.headers):
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut])
                self.close_connection = answer.cut is not None

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def proxy(azurite: Azurite) -> Iterator[Proxy]:
    """A proxy in front of the emulator."""
    proxy = Proxy(azurite)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield proxy
    proxy.server.shutdown()
    thread.join()
    proxy.server.server_close()


@pytest.fixture
def driver(azurite: Azurite, proxy: Proxy, small_sizes: None) -> Iterator[AzureDriver]:
    """A driver that goes through the proxy."""
    with closing(AzureDriver(azurite.settings(endpoint=proxy.endpoint), block_size=BLOCK)) as driver:
        yield driver


@pytest.fixture
def other(azurite: Azurite, driver: AzureDriver) -> Iterator[ContainerClient]:
    """Another program that uses the same container, by the SDK."""
    with azurite.client(driver._settings.container) as client:
        yield client


def lose_answers(proxy: Proxy, wanted: str) -> None:
    """Have the first answer to such a request lost on its way."""

    def after(request: Request, answer: Answer) -> None:
        if proxy.seen().count(wanted) == 1 and str(request).strip() == wanted:
            answer.cut = -1

    proxy.after = after


# How many requests it takes


def test_slow_uploads_are_in_no_downloads_way(proxy, driver, monkeypatch):
    """They use all threads for blocks; a download has its own for reading ahead."""
    content = content_of(8 * BLOCK)
    put(driver, "a", content)
    proxy.requests.clear()
    monkeypatch.setattr(reads, "PATIENCE_SECONDS", 0)
    held = threading.Event()
    proxy.before = lambda request: held.wait(SECONDS) and None if str(request) == "PUT comp=block" else None
    uploads = [threading.Thread(target=put, args=(driver, f"b{number}", content)) for number in range(40)]
    for upload in uploads:
        upload.start()

    def blocks() -> int:
        return proxy.seen().count("PUT comp=block")

    wait_until(lambda: blocks() == azure.UPLOAD_THREADS, SECONDS, "all threads to be busy")
    assert get(driver, "a") == content
    assert blocks() == azure.UPLOAD_THREADS, "the download has waited for a thread"
    held.set()
    for upload in uploads:
        upload.join()


def test_a_small_upload_is_one_request(driver, proxy):
    put(driver, "a", content_of(BLOCK), "text/plain", None)
    assert proxy.seen() == ["PUT"]
    sent = proxy.requests[0].headers
    assert (sent["x-ms-blob-content-type"], sent["If-None-Match"]) == ("text/plain", "*")


def test_a_large_upload_is_its_blocks_and_one_commit(driver, proxy):
    put(driver, "a", content_of(4 * BLOCK + 1))
    assert sorted(proxy.seen()) == 5 * ["PUT comp=block"] + ["PUT comp=blocklist"]
    assert proxy.seen()[-1] == "PUT comp=blocklist"


def test_a_small_download_is_one_request(driver, proxy):
    put(driver, "a", content_of(1000))
    proxy.requests.clear()
    get(driver, "a")
    get(driver, "a", 5, 10)
    assert proxy.seen() == ["GET", "GET"]


def test_a_large_download_is_its_ranges_each_pinned_to_the_version(driver, proxy):
    etag = put(driver, "a", content_of(4 * BLOCK)).etag
    proxy.requests.clear()
    get(driver, "a")
    assert proxy.seen() == ["GET"] * 4
    assert [request.headers["If-Match"] for request in proxy.requests] == [None] + [f'"{etag}"'] * 3
    assert {request.headers["x-ms-range"] for request in proxy.requests} == {
        f"bytes={start}-{start + BLOCK - 1}" for start in range(0, 4 * BLOCK, BLOCK)
    }


def test_a_reader_that_is_closed_early_asks_for_no_more(driver, proxy):
    put(driver, "a", content_of(40 * BLOCK))
    proxy.requests.clear()
    with driver.read("a") as reader:
        next(iter(reader))
    assert proxy.seen() == ["GET"]


def test_a_look_and_a_probe_are_one_request_each(driver, proxy):
    driver.probe()
    with pytest.raises(ObjectNotFound):
        driver.stat("nothing")
    with pytest.raises(ObjectNotFound):
        driver.read("nothing")
    assert proxy.seen() == ["HEAD", "HEAD", "GET"]


def test_blocks_in_flight_are_few(driver, proxy):
    release, full = threading.Event(), threading.Event()
    counting = threading.Lock()
    in_flight, most = [], []

    def hold(request: Request) -> None:
        if str(request) == "PUT comp=block":
            with counting:
                in_flight.append(request)
                most.append(len(in_flight))
            if len(in_flight) == BLOCKS_IN_FLIGHT:
                full.set()
            release.wait(SECONDS)
            with counting:
                in_flight.remove(request)

    proxy.before = hold
    content = content_of(20 * BLOCK)
    upload = threading.Thread(target=put, args=(driver, "a", content))
    upload.start()
    assert full.wait(SECONDS)
    upload.join(0.2)
    assert upload.is_alive(), "it was not held back"
    release.set()
    upload.join()
    assert max(most) == BLOCKS_IN_FLIGHT
    assert get(driver, "a") == content


# Another program in the same container


@pytest.mark.parametrize("other_size", [10, 3 * BLOCK])
def test_blocks_that_another_commit_dropped_are_staged_again(driver, other, other_size):
    content = content_of(SOME)
    other_content = content_of(other_size, 9)
    with driver.writer("a", "text/plain") as writer:
        for piece in in_pieces(content):
            writer.write(piece)
        wait_for_blocks(other, "a", (SOME - 1) // BLOCK)
        stage_and_commit(other, "a", other_content)
        info = commit_over_anything(driver, "a", writer, content)
    assert get(driver, "a") == content
    assert driver.stat("a") == info


def wait_for_blocks(container: ContainerClient, key: str, count: int) -> None:
    """Wait until the backend has that many blocks of an upload."""
    blob = container.get_blob_client(key)

    def arrived() -> bool:
        with contextlib.suppress(ResourceNotFoundError):
            return len(blob.get_block_list("uncommitted")[1]) == count
        return False

    wait_until(arrived, SECONDS, f"{count} blocks")


def stage_and_commit(container: ContainerClient, key: str, content: bytes) -> None:
    """An upload of another program, in blocks."""
    blob = container.get_blob_client(key)
    ids = [f"{number:048}" for number in range(0, len(content), BLOCK)]
    for number, block_id in enumerate(ids):
        blob.stage_block(block_id, content[number * BLOCK : (number + 1) * BLOCK])
    blob.commit_block_list([BlobBlock(block_id) for block_id in ids])


def test_dropped_blocks_without_a_copy_to_send_again_are_a_conflict(driver, other):
    content = content_of(SOME)
    with driver.writer("a", "text/plain") as writer:
        writer.write(content)
        wait_for_blocks(other, "a", (SOME - 1) // BLOCK)
        stage_and_commit(other, "a", b"other")
        with pytest.raises(WriteConflict):
            commit_over_anything(driver, "a", writer, content, replay=False)
    assert get(driver, "a") == b"other"


def test_a_writer_that_is_overtaken_again_and_again_is_refused(driver, other, proxy):
    content = content_of(SOME)

    def overtake(request: Request) -> None:
        if str(request) == "PUT comp=blocklist":
            stage_and_commit(other, "a", b"other")

    proxy.before = overtake
    with driver.writer("a", "text/plain") as writer:
        writer.write(content)
        for _ in range(3):
            with pytest.raises(PreconditionFailed):
                writer.commit(digests_of(content), etag_of(driver, "a"), replay=lambda: in_pieces(content))
    assert get(driver, "a") == b"other"


@pytest.mark.parametrize("block_id", [b"\xff" * 9, b"12345678", b"x" * 20, b"y" * 64])
def test_blocks_that_another_program_left_are_in_nobodys_way(driver, other, block_id):
    leave_block(other, "a", block_id)
    content = content_of(10 * BLOCK)
    put(driver, "a", content)
    assert get(driver, "a") == content


def leave_block(container: ContainerClient, key: str, block_id: bytes) -> None:
    """An upload that another program gave up. The SDK's own method takes ids of text only; uploads use others."""
    stage_block = container.get_blob_client(key)._client.block_blob.stage_block
    stage_block(b64encode(block_id).decode(), 8, b"given up")


SHORT = pytest.mark.parametrize("block_id", [b"1", b"\xfe234", b"1234567"])


@SHORT
@pytest.mark.parametrize("old", [None, b"an object"], ids=["new", "replaced"])
def test_blocks_with_short_ids_are_in_nobodys_way_either(driver, other, proxy, block_id, old):
    """Azurite keeps them, so each upload meets them again."""
    if old is not None:
        put(driver, "a", old)
    leave_block(other, "a", block_id)
    for seed, size in enumerate([10 * BLOCK, 3 * BLOCK + 1, 10, 5 * BLOCK]):
        content = content_of(size, seed)
        info = put(driver, "a", content, "image/png")
        assert get(driver, "a") == content
        found = driver.stat("a")
        assert found == info
        assert (found.sha256, found.content_type) == (digests_of(content).sha256, "image/png")
    assert "PUT comp=blocklist" not in proxy.seen()


@SHORT
def test_of_two_uploads_over_such_blocks_one_is_stored_each_time(driver, other, block_id):
    """With ids of that length, each could commit blocks of the other one."""
    leave_block(other, "a", block_id)
    for number in range(5):
        contents = [content_of(4 * BLOCK, 2 * number), content_of(5 * BLOCK, 2 * number + 1)]
        stored = at_once(*(lambda content=content: put(driver, "a", content) for content in contents))
        assert get(driver, "a") in contents
        assert driver.stat("a") in stored


@SHORT
def test_over_such_blocks_a_condition_holds(driver, other, block_id):
    old = put(driver, "a", b"an object")
    leave_block(other, "a", block_id)
    for expected in (None, "0x8D0000000000000"):
        with pytest.raises(PreconditionFailed):
            put(driver, "a", content_of(SOME), expected=expected)
    assert driver.stat("a") == old
    delete(driver, "a")
    leave_block(other, "a", block_id)
    with pytest.raises(PreconditionFailed):
        put(driver, "a", content_of(SOME), expected=old.etag)
    assert put(driver, "a", content_of(SOME), expected=None) == driver.stat("a")


def test_a_whole_content_is_sent_again_when_its_answer_is_lost(driver, other, proxy):
    leave_block(other, "a", b"1")
    lose_answers(proxy, "PUT")
    content = content_of(SOME)
    info = put(driver, "a", content)
    assert get(driver, "a") == content
    assert driver.stat("a") == info


@pytest.mark.parametrize("length", [1, 20])
def test_without_a_copy_to_send_again_the_refusal_says_what_helps(driver, other, length):
    old = put(driver, "a", b"an object")
    leave_block(other, "a", length * b"1")
    with driver.writer("a", "text/plain") as writer:
        writer.write(content_of(SOME))
        with pytest.raises(WriteConflict, match="store a small file under this key"):
            writer.commit(digests_of(content_of(SOME)), old.etag)
    assert driver.stat("a") == old


def test_the_same_for_a_content_that_is_too_large_for_one_request(driver, other, monkeypatch):
    monkeypatch.setattr(foreign_blocks, "MAX_PUT_SIZE", SOME - 1)
    leave_block(other, "a", b"1")
    with pytest.raises(WriteConflict, match="store a small file under this key"):
        put(driver, "a", content_of(SOME))
    assert not listed(driver)


def test_a_whole_content_that_cannot_be_read_again_is_not_stored(driver, other):
    old = put(driver, "a", b"an object")
    leave_block(other, "a", b"1")
    content = content_of(SOME)
    with GuardedDriver(driver).writer("a", "text/plain") as writer:
        writer.write(content)
        with pytest.raises(BackendError):
            writer.commit(digests_of(content), old.etag, replay=lambda: [content[:-1]])
    assert driver.stat("a") == old
    assert get(driver, "a") == b"an object"


def test_a_server_stores_a_large_file_over_such_blocks(azure_server: Server, azurite: Azurite):
    key, content = f"{new_folder()}/large", content_of(9 * 1024 * KIB)
    with azurite.client(azure_server.document["azure"]["container"]) as container:
        leave_block(container, key, b"1")
        assert put_over_http(azure_server, key, content).status_code == 201
        assert put_over_http(azure_server, key, content[1:]).status_code == 200
        assert get_over_http(azure_server, key).content == content[1:]
        assert container.download_blob(key).readall() == content[1:]


def test_a_replayed_content_must_be_whole(driver, other):
    content = content_of(SOME)
    with GuardedDriver(driver).writer("a", "text/plain") as writer:
        writer.write(content)
        wait_for_blocks(other, "a", (SOME - 1) // BLOCK)
        stage_and_commit(other, "a", b"other")
        with pytest.raises(BackendError):
            writer.commit(digests_of(content), driver.stat("a").etag, replay=lambda: [content[:-1]])
    assert get(driver, "a") == b"other"


def lock(container: ContainerClient, key: str) -> None:
    container.upload_blob(key, b"old").acquire_lease(60)


def archive(container: ContainerClient, key: str) -> None:
    container.upload_blob(key, b"old").set_standard_blob_tier("Archive")


def refused(function: Callable[[], object]) -> str:
    """The message of the error that a function raises, which must not be counted as the backend's failure."""
    with pytest.raises(ObjectBlocked) as caught:
        function()
    assert meaning(caught.value) == (409, "Conflict", "object_blocked")
    return caught.value.message


@pytest.mark.parametrize(
    ("block", "helps", "size"),
    [(lock, "end its lease", 5), (lock, "end its lease", 4 * BLOCK), (archive, "access tier", 5)],
)
def test_what_cannot_be_replaced_says_so_and_what_helps(driver, other, block, helps, size):
    """Azurite replaces blobs of other types, and archived ones by blocks."""
    block(other, "a")
    before = driver.stat("a")
    assert helps in refused(lambda: put(driver, "a", content_of(size)))
    assert driver.stat("a") == before


def test_what_is_archived_cannot_be_read_but_looked_at_and_deleted(driver, other):
    archive(other, "a")
    assert driver.stat("a").size == 3
    assert "access tier" in refused(lambda: driver.read("a"))
    delete(driver, "a")


@pytest.mark.parametrize(
    ("status", "code", "helps"),
    [
        (409, "BlobImmutableDueToPolicy", "another name"),
        (409, "BlobBeingRehydrated", "try again then"),
        (409, "InvalidBlobType", "another name"),
        (409, "PendingCopyOperation", "try again"),
        (409, "BlobUsesCustomerSpecifiedEncryption", "key of its own"),
        (412, "LeaseIdMissing", "end its lease"),
    ],
)
def test_refusals_that_no_repetition_changes(driver, proxy, status, code, helps):
    info = put(driver, "a", b"content")
    proxy.before = fail_with(status, code)
    for function in (
        lambda: put(driver, "a", b"small"),
        lambda: put(driver, "a", content_of(SOME)),
        lambda: driver.delete("a", info.etag),
        lambda: driver.read("a"),
    ):
        proxy.requests.clear()
        assert helps in refused(function)


def test_snapshots_are_deleted_with_their_blob(driver, other):
    put(driver, "a", b"content")
    other.get_blob_client("a").create_snapshot()
    delete(driver, "a")
    assert listed(driver) == []


def test_what_another_program_stored_is_an_object_too(driver, other):
    content = content_of(SOME)
    md5 = digests_of(content).md5
    other.upload_blob("a", content, content_settings=ContentSettings("x/y", content_md5=bytearray(md5)))
    info = driver.stat("a")
    assert (info.content_type, info.md5, info.sha256) == ("x/y", None, None)
    assert info.claimed_digest == ("md5", md5.hex())
    with driver.read("a") as reader:
        assert reader.info == info
        assert b"".join(reader) == content


def test_a_digest_that_is_none_is_not_believed(driver, other):
    other.upload_blob("a", b"content", metadata={"sha256": "none"})
    assert driver.stat("a").sha256 is None


def test_a_stored_encoding_does_not_change_the_content(driver, other):
    content = b"\x1f\x8b not really gzip"
    other.upload_blob("a", content, content_settings=ContentSettings(content_encoding="gzip"))
    assert get(driver, "a") == content
    assert get(driver, "a", 2, 5) == content[2:5]


def test_invalid_keys_in_the_container_are_not_listed(driver, other):
    for name in ["a//b", "a/", "v1/x", ".kci/x", "upload", "x" * 256, "folder/good", "folder//bad", "good"]:
        other.upload_blob(name, b"")
    guarded = GuardedDriver(driver)
    assert listed(guarded) == listed(guarded, details=False) == ["folder/good", "good"]
    pages = [guarded.list(delimiter="/"), guarded.list(prefix="folder/", delimiter="/")]
    assert [page.folders for page in pages] == [("a/", "folder/"), ()]


def add_folder_markers(container: ContainerClient, prefix: str = "") -> None:
    """As accounts with a hierarchical namespace, Hadoop, and other programs show folders."""
    container.upload_blob(f"{prefix}hadoop", b"", metadata={"hdi_isfolder": "true"})
    container.upload_blob(f"{prefix}hadoop/file", b"content")
    container.upload_blob(f"{prefix}other/", b"")
    container.upload_blob(f"{prefix}other/file", b"content")


def test_folder_markers_are_no_objects(driver, other):
    add_folder_markers(other)
    guarded = GuardedDriver(driver)
    assert listed(guarded) == listed(guarded, details=False) == ["hadoop/file", "other/file"]
    page = guarded.list(delimiter="/")
    assert (page.objects, page.folders) == ((), ("hadoop/", "other/"))
    for key in ("hadoop", "other/"):
        for function in (guarded.stat, guarded.read, lambda key: guarded.delete(key, "etag")):
            with pytest.raises((ObjectNotFound, PreconditionFailed)):
                function(key)
        with pytest.raises(ObjectNotFound):
            guarded.read(key, 0, 10)


def test_a_folder_marker_is_not_replaced(driver, other):
    add_folder_markers(other)
    for content in (b"small", content_of(SOME)):
        with driver.writer("hadoop", "text/plain") as writer:
            writer.write(content)
            with pytest.raises(KeyConflict, match="folder"):
                commit_over_anything(driver, "hadoop", writer, content)
    assert other.get_blob_client("hadoop").get_blob_properties().metadata["hdi_isfolder"] == "true"


ODD_NAMES = ["a&b<c>\"d'", "a%20b", "a.", "a./b", "&lt;", "é", "e\u0301", "😀", "a b ", "~"]


def test_odd_names_are_listed_and_read(driver, other):
    for name in ODD_NAMES:
        other.upload_blob(name, name.encode())
    guarded = GuardedDriver(driver)
    assert sorted(listed(guarded)) == sorted(listed(guarded, details=False)) == sorted(ODD_NAMES)
    for name in ODD_NAMES:
        assert get(guarded, name) == name.encode()
        delete(guarded, name)
    assert listed(guarded) == []


def test_a_listing_of_the_service_itself_is_read(driver, proxy):
    """It sends names that XML cannot hold percent-encoded, where Azurite fails, and has further elements."""
    entry = (
        "<Properties><Creation-Time>x</Creation-Time><Last-Modified>Tue, 01 Dec 2026 10:00:00 GMT</Last-Modified>"
        "<Etag>0x8D1</Etag><Content-Length>7</Content-Length><Content-Type>text/plain</Content-Type><Content-MD5 />"
        "<ResourceType>file</ResourceType></Properties><Metadata><Name>no name</Name><NextMarker>none</NextMarker>"
        f"<uploadid>1</uploadid><sha256>{'0' * 64}</sha256></Metadata><OrMetadata />"
    )
    proxy.before = lambda request: Answer(
        200,
        [],
        '\ufeff<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="https://x/">'
        f'<Blobs><Blob><Name Encoded="true">a%EF%BF%BE%25</Name>{entry}</Blob><Blob><Name>b</Name>broken</Blob>'
        "<BlobPrefix><Name>c&amp;/</Name><Properties /></BlobPrefix></Blobs><NextMarker>2!92!M&amp;</NextMarker>"
        "</EnumerationResults>".encode(),
    )
    page = driver.list(delimiter="/")
    assert [(info.key, info.size, info.etag, info.sha256) for info in page.objects] == [
        ("a\ufffe%", 7, "0x8D1", "0" * 64)
    ]
    assert (page.folders, page.next_marker) == (("c&/",), "2!92!M&")


def test_a_server_among_other_programs_objects(azure_server: Server, azurite: Azurite, tmp_path: Path):
    """Pages, the list and downloads of a whole folder work."""
    folder = new_folder()
    with azurite.client(azure_server.document["azure"]["container"]) as container:
        add_folder_markers(container, f"{folder}/")
    answer = get_over_http(azure_server, f"v1/list?prefix={folder}")
    assert answer.text.splitlines() == [f"{folder}/hadoop/file", f"{folder}/other/file"]
    page = requests.get(
        f"{azure_server.url}/{folder}/", headers={"Accept": "application/json"}, timeout=SECONDS
    ).json()
    assert [entry["name"] for entry in page["folders"]] == ["hadoop/", "other/"]
    assert page["files"] == []
    assert get_over_http(azure_server, f"{folder}/hadoop/").status_code == 200
    assert get_over_http(azure_server, f"{folder}/hadoop").status_code == 404
    assert put_over_http(azure_server, f"{folder}/hadoop", b"content").status_code == 409
    for name in ("a.", "a./b", "%EF%BF%BF"):
        assert put_over_http(azure_server, f"{folder}/{name}", b"content").status_code == 400


# When the backend fails


def test_a_lost_answer_to_a_small_upload_is_no_failure(driver, proxy):
    lose_answers(proxy, "PUT")
    info = put(driver, "a", b"content", expected=None)
    assert proxy.seen() == ["PUT", "PUT", "HEAD"]
    assert driver.stat("a") == info


def test_a_lost_answer_to_a_commit_is_no_failure(driver, proxy):
    there = put(driver, "a", b"there")
    lose_answers(proxy, "PUT comp=blocklist")
    content = content_of(SOME)
    info = put(driver, "a", content, expected=there.etag)
    assert proxy.seen().count("PUT comp=blocklist") == 2
    assert driver.stat("a") == info
    assert get(driver, "a") == content


def put_unmet(driver: AzureDriver) -> ObjectInfo:
    return put(driver, "a", b"new", expected=None)


def delete_unmet(driver: AzureDriver) -> None:
    driver.delete("a", "0x8D0000000000000")


@pytest.mark.parametrize(("change", "wanted"), [(put_unmet, "PUT"), (delete_unmet, "DELETE")])
def test_a_lost_answer_is_known_if_what_is_stored_is_older(driver, proxy, monkeypatch, change, wanted):
    """Such as that of an idle connection that ended just then: the condition was not met at any time."""
    monkeypatch.setattr(outcomes, "CLOCK_SECONDS", 0)
    old = put(driver, "a", b"old")
    time.sleep(2.1)  # the service's times are whole seconds
    proxy.requests.clear()
    lose_answers(proxy, wanted)
    with pytest.raises(PreconditionFailed):
        change(driver)
    assert driver.stat("a") == old


@pytest.mark.parametrize(("change", "wanted"), [(put_unmet, "PUT"), (delete_unmet, "DELETE")])
def test_a_lost_answer_is_unknown_if_what_is_stored_is_as_new(driver, proxy, change, wanted):
    """The change may have been carried out, and its result replaced since."""
    put(driver, "a", b"old")
    proxy.requests.clear()
    lose_answers(proxy, wanted)
    with pytest.raises(OutcomeUnknown):
        change(driver)


def test_the_same_content_by_somebody_else_is_not_ours(driver):
    put(driver, "a", b"content")
    with pytest.raises(PreconditionFailed):
        put(driver, "a", b"content", expected=None)


def test_a_lost_answer_to_a_block_is_no_failure(driver, proxy):
    lose_answers(proxy, "PUT comp=block")
    content = content_of(SOME)
    put(driver, "a", content)
    assert get(driver, "a") == content


def test_a_lost_answer_to_a_read_is_no_failure(driver, proxy):
    put(driver, "a", content_of(2 * BLOCK))
    lose_answers(proxy, "GET")
    assert get(driver, "a") == content_of(2 * BLOCK)
    assert proxy.seen().count("GET") == 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_download_survives_broken_connections(driver, proxy, number):
    content = content_of(4 * BLOCK)
    put(driver, "a", content)
    proxy.requests.clear()

    def cut(request: Request, answer: Answer) -> None:
        if request.number == number:
            answer.cut = 1000

    proxy.after = cut
    assert get(driver, "a") == content
    assert len(proxy.requests) == 5


@pytest.mark.timeout(60)
def test_a_download_over_a_connection_that_always_breaks_fails(driver, proxy):
    put(driver, "a", content_of(4 * BLOCK))
    with driver.read("a") as reader:
        pieces = iter(reader)
        assert content_of(BLOCK).startswith(next(pieces))
        proxy.requests.clear()
        proxy.after = lambda request, answer: setattr(answer, "cut", 1000)
        with pytest.raises(BackendError):
            list(pieces)
    assert all(request.headers["If-Match"] for request in proxy.requests)


def test_a_broken_download_never_goes_on_with_another_version(driver, proxy, other):
    put(driver, "a", content_of(4 * BLOCK))

    def replace_and_cut(request: Request, answer: Answer) -> None:
        if request.headers["x-ms-range"] == f"bytes={BLOCK}-{2 * BLOCK - 1}" and not replaced:
            replaced.append(other.upload_blob("a", content_of(4 * BLOCK, 2), overwrite=True))
            answer.cut = 1000

    replaced: list[object] = []
    proxy.after = replace_and_cut
    with driver.read("a") as reader:
        pieces = iter(reader)
        assert content_of(BLOCK).startswith(next(pieces))
        with pytest.raises(ObjectChanged):
            list(pieces)
    assert replaced


def test_a_short_answer_is_an_error(driver, proxy):
    put(driver, "a", content_of(4 * BLOCK))

    def shorten(request: Request, answer: Answer) -> None:
        answer.body = answer.body[:-1]
        answer.headers = [header for header in answer.headers if header[0].lower() != "content-length"]

    proxy.after = shorten
    with pytest.raises(BackendError):
        get(driver, "a")


def test_an_answer_of_another_version_is_an_error(driver, proxy):
    info = put(driver, "a", content_of(BLOCK))

    def relabel(request: Request, answer: Answer) -> None:
        answer.headers = [(name, '"0x0"' if name.lower() == "etag" else value) for name, value in answer.headers]

    proxy.after = relabel
    with pytest.raises(ObjectChanged):
        get(driver, "a", etag=info.etag)


def fail_with(status: int, code: str = "", **headers: str) -> Callable[[Request], Answer]:
    """The backend answers everything with an error."""
    sent = [(name.replace("_", "-"), value) for name, value in headers.items()]
    if code:
        sent.append(("x-ms-error-code", code))
    return lambda request: Answer(status, sent, b"")


def attempts(driver: Driver) -> Iterator[Callable[[], object]]:
    """Everything that asks the backend, but for changes."""
    yield lambda: driver.stat("a")
    yield lambda: driver.read("a")
    yield lambda: driver.fence("a", "etag")
    yield driver.list
    yield lambda: driver.list(details=False)
    yield lambda: driver.list(delimiter="/")
    yield driver.probe
    yield lambda: put(driver, "a", content_of(SOME))  # it fails before its commit


def changes(driver: Driver) -> Iterator[Callable[[], object]]:
    """Everything that changes an object by one request."""
    yield lambda: driver.delete("a", "etag")
    yield lambda: put(driver, "a", b"small")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "", BackendError),
        (404, "ContainerNotFound", BackendError),
        (404, "ResourceNotFound", BackendError),
        (401, "NoAuthenticationInformation", BackendError),
        (403, "AuthenticationFailed", BackendError),
        (403, "AuthorizationFailure", BackendError),
        (409, "ContainerBeingDeleted", BackendError),
        (400, "InvalidHeaderValue", BackendError),
        (412, "LeaseIdMissing", ObjectBlocked),
        (429, "", BackendThrottled),
        (503, "ServerBusy", BackendThrottled),
        (500, "OperationTimedOut", BackendThrottled),
        (500, "InternalError", BackendError),
        (501, "", BackendError),
        (302, "", BackendError),
        (200, "", BackendError),
    ],
)
@pytest.mark.timeout(120)
def test_only_the_backends_own_word_means_that_an_object_is_missing(driver, proxy, status, code, expected):
    proxy.before = fail_with(status, code, Location="http://127.0.0.1:1/")
    for attempt in attempts(driver):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert meaning(caught.value) == TABLE[expected], caught.value.detail
    for change in changes(driver):
        with pytest.raises(StorageError) as caught:
            change()
        assert meaning(caught.value) == TABLE[OutcomeUnknown if status == 500 else expected], caught.value.detail


def test_redirections_are_not_followed(driver, proxy):
    """A signed request goes to the configured backend and nowhere else."""
    proxy.before = fail_with(307, Location=f"{proxy.url}/elsewhere")
    with pytest.raises(BackendError):
        driver.stat("a")
    assert len(proxy.requests) == 1


def test_a_throttling_backend_says_when_to_come_back(driver, proxy):
    proxy.before = fail_with(503, "ServerBusy", Retry_After="7")
    with pytest.raises(BackendThrottled) as caught:
        driver.stat("a")
    assert caught.value.retry_after == 7


def test_a_failing_backend_is_asked_again(driver, proxy):
    put(driver, "a", b"content")
    proxy.requests.clear()
    proxy.before = lambda request: Answer(500, [], b"") if request.number < service.RETRIES else None
    assert driver.stat("a").size == 7
    assert len(proxy.requests) == service.RETRIES + 1


def test_a_silent_backend_is_a_time_out_and_not_asked_again(azurite, proxy):
    never = threading.Event()
    proxy.before = lambda request: never.wait(SECONDS) and None
    with closing(AzureDriver(azurite.settings(endpoint=proxy.endpoint, read_timeout=1.0))) as driver:
        for attempt in (lambda: driver.stat("a"), lambda: driver.read("a"), lambda: put(driver, "a", b"content")):
            proxy.requests.clear()
            with pytest.raises(BackendTimeout):
                attempt()
            wait_until(lambda: proxy.requests, SECONDS, "the request, which a busy machine may read later than that")
            assert len(proxy.requests) == 1
    never.set()


@pytest.mark.timeout(120)
def test_a_backend_that_takes_no_connection_is_a_time_out(azurite):
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):  # fill its queue, so that the kernel answers no more
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}/testaccount"
        settings = azurite.settings(endpoint=endpoint, container="any", connect_timeout=0.3)
        with closing(AzureDriver(settings)) as driver, pytest.raises(BackendTimeout):
            driver.stat("a")


def test_a_slow_line_is_no_time_out(azurite, proxy):
    proxy.pause = lambda: threading.Event().wait(0.03)
    settings = azurite.settings(endpoint=proxy.endpoint, connect_timeout=1.0)
    content = content_of(8 * KIB * KIB)
    with closing(AzureDriver(settings)) as driver:
        put(driver, "a", content)
        assert driver.stat("a").size == len(content)


@pytest.mark.timeout(120)
def test_a_dead_backend_is_an_error(tmp_path, small_sizes):
    with running_azurite(tmp_path) as service, closing(AzureDriver(service.settings(), block_size=BLOCK)) as driver:
        put(driver, "a", content_of(20 * BLOCK))
        reader = driver.read("a")
        pieces = iter(reader)
        next(pieces)
        writer = driver.writer("b", "text/plain")
        writer.write(content_of(3 * BLOCK))
        service.kill()
        with pytest.raises(BackendError):
            list(pieces)
        with pytest.raises(BackendError):
            for piece in in_pieces(content_of(20 * BLOCK)):
                writer.write(piece)
        reader.close()
        writer.abort()
        for attempt in (*attempts(driver), *changes(driver)):
            with pytest.raises(BackendError) as caught:
                attempt()
            assert "127.0.0.1" not in caught.value.message


# Credentials


def sas_token(azurite: Azurite, container: str, permissions: str = "racwdl") -> str:
    """A token for one container."""
    expiry = datetime.now(UTC) + timedelta(hours=1)
    return generate_container_sas(azurite.account, container, azurite.key, permission=permissions, expiry=expiry)


class Clocks:
    """The machine's clocks, which a test turns on and back."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self) -> None:
        self.since_start, self.of_day = 1000.0, time.time()

    def clock_gettime(self, clock: int) -> float:
        return self.since_start

    def time(self) -> float:
        return self.of_day


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """The clocks by which signatures are renewed."""
    clocks = Clocks()
    monkeypatch.setattr(signature, "time", clocks)
    return clocks


def test_reads_are_authorised_for_reading_alone(azurite):
    token = signature.RenewedToken(azurite.settings(), "r")()
    assert parse_qs(token)["sp"] == ["r"]
    expires = datetime.fromisoformat(parse_qs(token)["se"][0])
    assert timedelta(0) < expires - datetime.now(UTC) <= timedelta(seconds=signature.SIGNATURE_SECONDS)


@pytest.mark.parametrize("clock", ["since_start", "of_day"], ids=["it got old, awake or asleep", "it was set right"])
def test_signatures_are_renewed_by_real_time(azurite, clocks, clock):
    renewed = signature.RenewedToken(azurite.settings(), "r")
    token = renewed()
    setattr(clocks, clock, getattr(clocks, clock) + signature.SIGNATURE_SECONDS / 2 - 1)
    assert renewed() is token
    setattr(clocks, clock, getattr(clocks, clock) + 2)
    assert renewed() is not token


def test_a_refused_signature_is_renewed_once_by_the_services_time(azurite, proxy, small_sizes, monkeypatch):
    """The machine's clock is three hours behind."""

    class Behind(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(hours=3)

    monkeypatch.setattr(signature, "datetime", Behind)
    with closing(AzureDriver(azurite.settings(endpoint=proxy.endpoint), block_size=BLOCK)) as driver:
        monkeypatch.setattr(signature.time, "time", lambda: datetime.now(UTC).timestamp() - 3 * 3600)
        put(driver, "a", content_of(SOME))
        assert get(driver, "a") == content_of(SOME)
        proxy.requests.clear()
        assert driver.stat("a").size == SOME
        assert len(proxy.requests) == 1, "the new signature is kept"


def test_a_signature_that_is_refused_for_another_reason_is_not_renewed_for_ever(azurite, proxy, small_sizes):
    settings = azurite.settings(endpoint=proxy.endpoint, key=b64encode(b"another key").decode())
    with closing(AzureDriver(settings)) as driver:
        for number in (1, 2):
            with pytest.raises(BackendError, match="credentials"):
                driver.stat("a")
            assert len(proxy.requests) == number


@pytest.mark.parametrize("mark", ["", "?"])
def test_a_sas_token_for_the_container_is_enough(azurite, mark):
    container = azurite.new_container()
    settings = azurite.settings(container=container, key="", sastoken=mark + sas_token(azurite, container))
    with closing(AzureDriver(settings, block_size=BLOCK)) as driver:
        driver.probe()
        for content in (b"small", content_of(SOME)):
            put(driver, "a?b#c", content)
            assert get(driver, "a?b#c") == content
            assert listed(driver) == ["a?b#c"]
            delete(driver, "a?b#c")


def test_a_token_that_may_only_read_passes_the_probe(azurite):
    container = azurite.new_container()
    settings = azurite.settings(container=container, key="", sastoken=sas_token(azurite, container, "r"))
    with closing(AzureDriver(settings)) as driver:
        driver.probe()
        with pytest.raises(BackendError, match="credentials"):
            put(driver, "a", b"content")


TAGS = {"retention": "30d", "owner": "a@b"}


def tagged(driver: AzureDriver, key: str, content: bytes) -> None:
    with driver.writer(key, "text/plain", TAGS) as writer:
        writer.write(content)
        writer.commit(digests_of(content), None)


def refuse_tags(status: int, code: str) -> Callable[[Request], Answer | None]:
    """As an account does that has a hierarchical namespace."""
    refuse = fail_with(status, code)
    return lambda request: refuse(request) if request.headers["x-ms-tags"] else None


REFUSALS = [(409, "FeatureNotYetSupportedForHierarchicalNamespaceAccounts"), (403, "AuthorizationPermissionMismatch")]


@pytest.fixture
def without_tags(azurite: Azurite, proxy: Proxy, small_sizes: None) -> Iterator[Callable[[str], AzureDriver]]:
    """Makes a driver with a SAS token that has no permission for tags."""
    container = azurite.new_container()
    token = sas_token(azurite, container)
    with contextlib.ExitStack() as stack:

        def make(tags: str) -> AzureDriver:
            settings = azurite.settings(
                container=container, endpoint=proxy.endpoint, key="", sastoken=token, tags=tags
            )
            return stack.enter_context(closing(AzureDriver(settings, block_size=BLOCK, sets_tags=True)))

        yield make


@pytest.mark.parametrize(("status", "code"), REFUSALS)
@pytest.mark.parametrize("size", [10, SOME])
def test_required_tags_that_are_refused_say_so(without_tags, proxy, status, code, size):
    proxy.before = refuse_tags(status, code)
    driver = without_tags("required")
    with pytest.raises(BackendError, match=r"does not take the tags that \[retention\] sets.*best effort"):
        tagged(driver, "a", content_of(size))
    assert driver.advice() == [
        "azure.sastoken: has no permission t, so that uploads fail with the tags that [retention] sets"
    ]


@pytest.mark.parametrize("size", [10, SOME])
def test_without_the_permission_tags_at_best_effort_are_not_sent(without_tags, proxy, size):
    driver = without_tags("best effort")
    tagged(driver, "a", content_of(size))
    assert not [request for request in proxy.requests if request.headers["x-ms-tags"]]
    assert get(driver, "a") == content_of(size)
    assert "without the tags" in driver.advice()[0]


@pytest.mark.parametrize("size", [10, SOME])
def test_tags_at_best_effort_that_an_account_refuses_are_left_out(azurite, proxy, small_sizes, caplog, size):
    proxy.before = refuse_tags(*REFUSALS[0])
    settings = azurite.settings(endpoint=proxy.endpoint, tags="best effort")
    with closing(AzureDriver(settings, block_size=BLOCK, sets_tags=True)) as driver:
        for key in ("a", "b"):
            tagged(driver, key, content_of(size))
            assert get(driver, key) == content_of(size)
        assert driver.advice() == []
    assert len([request for request in proxy.requests if request.headers["x-ms-tags"]]) == 1
    assert caplog.text.count("event=tags_refused") == 1


def test_another_refusal_is_not_taken_for_one_of_tags(azurite, proxy, small_sizes):
    """Of a request with the account's key, which may set tags."""
    proxy.before = fail_with(403, "AuthorizationFailure")
    for tags in ("required", "best effort"):
        with (
            closing(AzureDriver(azurite.settings(endpoint=proxy.endpoint, tags=tags))) as driver,
            pytest.raises(BackendError, match="credentials"),
        ):
            tagged(driver, "a", b"content")


def test_a_token_that_has_ended_is_named(azurite):
    container, end = azurite.new_container(), datetime.now(UTC) - timedelta(minutes=5)
    token = generate_container_sas(azurite.account, container, azurite.key, permission="racwdltx", expiry=end)
    settings = azurite.settings(container=container, key="", sastoken=token)
    with closing(AzureDriver(settings)) as driver:
        for function in (driver.probe, driver.list, lambda: put(driver, "a", b"content")):
            with pytest.raises(BackendError, match=f"the SAS token in .azure. ended at {end:%Y-%m-%d %H:%M} UTC"):
                function()
        assert driver.credential_end() == int(end.timestamp())


@pytest.mark.parametrize(("permissions", "lines"), [("racwdlt", 0), ("r", 3), ("rcwdl", 0), ("l", 3)])
def test_what_a_token_does_not_permit_is_known_before(azurite, permissions, lines):
    container = azurite.new_container()
    token = sas_token(azurite, container, permissions)
    with closing(AzureDriver(azurite.settings(container=container, key="", sastoken=token))) as driver:
        assert len(driver.advice()) == lines
    with closing(AzureDriver(azurite.settings(container=container, sastoken=token))) as driver:
        assert (driver.advice(), driver.credential_end()) == ([], None), "the key is used"


def test_no_credential_is_in_any_error_or_log(azurite, proxy, small_sizes, caplog):
    caplog.set_level(logging.DEBUG)
    container = azurite.new_container()
    token = sas_token(azurite, container, "r")
    secret_part = token.rpartition("sig=")[2].partition("&")[0]
    texts = []
    for endpoint in (azurite.endpoint, proxy.endpoint, "http://127.0.0.1:1/testaccount"):
        proxy.after = lambda request, answer: setattr(answer, "cut", -1)
        for credential in ({"key": "", "sastoken": token}, {"key": "d3Jvbmcga2V5", "sastoken": ""}):
            settings = azurite.settings(container=container, endpoint=endpoint, **credential)
            with closing(AzureDriver(settings, block_size=BLOCK)) as driver:
                for attempt in (*attempts(driver), *changes(driver)):
                    try:
                        attempt()
                    except StorageError as exc:
                        texts += [exc.message, exc.detail or "", *traceback.format_exception(exc)]
                        assert not set("?/\n") & set(exc.message)
    texts.append(caplog.text)
    assert len(texts) > 50
    for secret in (secret_part, "sig=", "d3Jvbmcga2V5"):
        assert not [text for text in texts if secret in text]


def test_netrc_and_proxies_of_the_environment(azurite, proxy, tmp_path, monkeypatch):
    """A proxy is used; a password for the backend's host in ``.netrc``, which requests would send, is not."""
    settings = azurite.settings(endpoint=f"http://azurite.example/{azurite.account}")
    (tmp_path / "netrc").write_text("machine azurite.example login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("http_proxy", proxy.url)
    with closing(AzureDriver(settings)) as driver:
        put(driver, "a", b"content")
        assert get(driver, "a") == b"content"
    assert proxy.seen() == ["PUT", "GET"]


# Processes and settings


def test_a_forked_process_has_connections_of_its_own(azurite):
    with closing(AzureDriver(azurite.settings())) as driver:
        contents = {f"object-{number}": content_of(1000, number) for number in range(4)}
        for key, content in contents.items():
            put(driver, key, content)
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=read_often, args=(driver, *item)) for item in contents.items()]
        for child in children:
            child.start()
        read_often(driver, *next(iter(contents.items())))
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        assert list(driver._processes) == [os.getpid()]


def read_often(driver: AzureDriver, key: str, content: bytes) -> None:
    for _ in range(30):
        assert get(driver, key) == content
    assert list(driver._processes)[-1] == os.getpid()


def test_it_is_made_from_the_configuration(azurite):
    config = Config(path=Path("config.toml"), azure=azurite.settings())
    with closing(AzureDriver.from_config(config)) as driver:
        put(driver, "a", b"content")
        driver.close()
        assert get(driver, "a") == b"content", "it may be used again after it was closed"


def test_the_default_endpoint_is_azures_own(azurite):
    settings = azurite.settings(endpoint="", account="someaccount", container="things")
    with closing(AzureDriver(settings)) as driver:
        assert (
            driver._process._container.get_blob_client("a b").url
            == "https://someaccount.blob.core.windows.net/things/a%20b"
        )
