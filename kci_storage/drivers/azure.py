"""Azure Blob Storage.

Each process has a client of its own, made after the fork: an inherited connection would give one process another's
answers. Time-outs, retries and sizes are set here, since the SDK's own are for batch jobs (a dead backend would be an
error after 84 seconds).

An upload stages blocks while it arrives, and commits their list at its end; a small one is a single request. Blocks
of an upload that was given up cannot be deleted; they are visible to nobody, and Azure removes them after a week.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import secrets
import threading
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any

import requests
import urllib3.exceptions
from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    HttpResponseError,
    ServiceRequestTimeoutError,
    ServiceResponseTimeoutError,
)
from azure.core.pipeline.transport import RequestsTransport
from azure.core.rest import HttpResponse
from azure.storage.blob import (
    BlobBlock,
    BlobClient,
    BlobPrefix,
    BlobProperties,
    ContainerClient,
    ContentSettings,
    LinearRetry,
)

from kci_storage.config import AzureConfig, Config
from kci_storage.drivers.base import Digests, Driver, Expectation, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.errors import (
    BackendError,
    BackendThrottled,
    BackendTimeout,
    BadRequest,
    ObjectChanged,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    WriteConflict,
)
from kci_storage.keys import MAX_CHARACTERS, is_valid

BLOCK_SIZE = 8 * 1024 * 1024  # bytes; at most 50,000 blocks make an object, so 390 GiB
BLOCKS_IN_FLIGHT = 4  # of one upload; it holds one block more in memory
READ_SIZE = 16 * 1024 * 1024  # bytes of each request of a download
READS_AHEAD = 2  # of one download, beside the one that is read
HELD_SIZE = 8 * 1024 * 1024  # bytes of each of them that may wait in memory
RETRIES = 2  # of a request that found no connection, or a failing server
RETRY_WAIT = 0.5  # seconds before each of them, give or take a half
RETRY_AFTER = 5  # seconds, when a throttling backend does not say it itself
SEND_SIZE = 256 * 1024  # bytes given to the socket at a time
RECEIVE_SIZE = 64 * 1024  # bytes taken from the socket at a time, at most; malloc() would map each larger one anew
BATCH_SIZE = 1024 * 1024  # bytes that one thread hands to another at a time, unless they are slow to come
BATCH_SECONDS = 0.005  # that they may wait for more of them
THREADS = 128  # of one process, for blocks and for reading ahead
CONNECTIONS = 128  # kept for later use, of one process
LIST_SIZE, NAMES_SIZE = 1000, 5000  # entries in one page of a listing; 0.2 ms and 0.04 ms of work each
BLOCK_ID_SIZE = 48  # bytes; 64 characters of base64, what most other clients use

_TIMEOUTS = (ServiceRequestTimeoutError, ServiceResponseTimeoutError, urllib3.exceptions.ReadTimeoutError)
_UPLOAD_ID = "uploadid"  # metadata: tells a writer whether what is there is its own
_PROBE_KEY = ".kci/probe"  # not a valid key: never there
_NOT_IN_URLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # nor in keys
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class AzureDriver(Driver):
    """Objects as block blobs in one container.

    :param settings: account, container, credential and time-outs.
    :param block_size: bytes of one block of an upload; also the largest upload that is made in one request.
    """

    wants_md5 = True

    def __init__(self, settings: AzureConfig, block_size: int = BLOCK_SIZE):
        self.block_size = block_size
        self._settings = settings
        self._processes: dict[int, _Process] = {}
        _quieten("azure", logging.WARNING)
        _quieten("urllib3", logging.ERROR)  # below that it logs URLs, with the signature of a SAS token

    @classmethod
    def from_config(cls, config: Config) -> AzureDriver:
        return cls(config.azure)

    @property
    def _process(self) -> _Process:
        """What this process has; made anew after a fork."""
        pid = os.getpid()
        found = self._processes.get(pid)
        return found or self._processes.setdefault(pid, _Process(self._settings))

    def blob(self, key: str) -> BlobClient:
        """The SDK's client for one object."""
        return self._process.container.get_blob_client(key)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call a function in one of this process's threads."""
        return self._process.threads.submit(function, *args)

    def stat(self, key: str) -> ObjectInfo:
        with _own_errors():
            return _info(key, self.blob(key).get_blob_properties(client_request_id=_request_id()))

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        first_stop = start + READ_SIZE if stop is None else min(stop, start + READ_SIZE)
        info, answer = self.ask(key, start, first_stop, etag)
        return _Reader(self, info, answer, start, info.size if stop is None else min(stop, info.size))

    def ask(self, key: str, start: int, stop: int, etag: str | None) -> tuple[ObjectInfo, HttpResponse | None]:
        """Ask for one range of an object.

        :param stop: bytes; beyond the end means the end, and not above ``start`` means nothing.
        :param etag: the only version wanted; None: the present one.
        :returns: the object's properties, and the answer, of which only the head is here; None: the range is empty.
        :raises ObjectNotFound: there is no such object.
        :raises ObjectChanged: the present version is not ``etag``.
        :raises BackendError: the backend failed.
        """
        answer = None
        with _own_errors():
            try:
                if stop > start:
                    answer = _ask(self._process.reading.get_blob_client(key), start, stop, etag)
            except HttpResponseError as exc:
                # The version is another one, or there is none; or ``start`` is not below the size, which may be 0.
                if _code(exc) not in ("ConditionNotMet", "InvalidRange"):
                    raise
            info = _info_of_range(key, answer) if answer else self.stat(key)
        # Azurite takes the headers later than the content, and does not compare them with the condition.
        if etag not in (None, info.etag) or (answer is None and start < min(stop, info.size)):
            raise ObjectChanged("the object was replaced")
        return info, answer

    def pieces(
        self, info: ObjectInfo, start: int, stop: int, answer: HttpResponse | None = None
    ) -> Generator[bytes, None, None]:
        """One range of one version as it arrives, taken up where it breaks off, a few times.

        :param answer: what it comes with at first; None: it is asked for.
        :raises ObjectChanged: the version is gone.
        """
        for broken in range(RETRIES + 1):
            try:
                if answer is None:
                    answer = self._ask_again(info, start, stop)
                for piece in _body(answer, start, stop):
                    start += len(piece)
                    yield piece
                return
            except (BackendTimeout, BackendThrottled, ObjectChanged):
                raise
            except BackendError:
                if broken == RETRIES:
                    raise
            answer = None
            time.sleep(broken * RETRY_WAIT)

    def _ask_again(self, info: ObjectInfo, start: int, stop: int) -> HttpResponse:
        try:
            _, answer = self.ask(info.key, start, stop, info.etag)
        except ObjectNotFound as exc:
            raise ObjectChanged("the object was deleted") from exc
        assert answer is not None
        return answer

    def writer(self, key: str, content_type: str) -> ObjectWriter:
        return _Writer(self, key, content_type)

    def delete(self, key: str) -> None:
        with _own_errors():
            self.blob(key).delete_blob(delete_snapshots="include")

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        if _NOT_IN_URLS.search(marker or ""):
            raise BadRequest("there is no such page of the listing")
        if _NOT_IN_URLS.search(prefix) or len(prefix) > MAX_CHARACTERS:
            return Page(())
        with _own_errors():
            pages = self._listing(prefix, delimiter, details).by_page(continuation_token=marker)
            try:
                items = list(next(pages))
            except HttpResponseError as exc:
                if marker is None or exc.status_code != 400:
                    raise
                raise BadRequest("there is no such page of the listing") from None
        return _page(items, pages.continuation_token)

    def _listing(self, prefix: str, delimiter: str, details: bool) -> Any:
        container, start = self._process.container, prefix or None
        if delimiter:
            return container.walk_blobs(start, delimiter=delimiter, results_per_page=LIST_SIZE)
        if details:
            return container.list_blobs(start, results_per_page=LIST_SIZE)
        return container.list_blob_names(name_starts_with=start, results_per_page=NAMES_SIZE)

    def probe(self) -> None:
        """Ask for an object that is never there: any credential that may read may do this."""
        with contextlib.suppress(ObjectNotFound):
            self.stat(_PROBE_KEY)

    def close(self) -> None:
        process = self._processes.pop(os.getpid(), None)
        if process is not None:
            process.close()


class _Process:
    """What must not be shared with a forked process: connections and threads."""

    def __init__(self, settings: AzureConfig):
        endpoint = settings.endpoint or f"https://{settings.account}.blob.core.windows.net"
        transport = _transport(endpoint, settings.connect_timeout, settings.read_timeout)
        self.container = _client(settings, endpoint, transport)
        # A hook that is given with a request would be lost when that is tried again.
        self.reading = _client(settings, endpoint, transport, raw_response_hook=_leave)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="azure")

    def close(self) -> None:
        """Let go of both; what is under way ends by itself."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.container.close()


def _client(settings: AzureConfig, endpoint: str, transport: RequestsTransport, **options: Any) -> ContainerClient:
    """A client with policies of its own: one that two clients share would lead from the one to the other."""
    key = {"account_name": settings.account, "account_key": settings.key}
    return ContainerClient(
        endpoint,
        settings.container,
        credential=key if settings.key else settings.sastoken,
        transport=transport,
        retry_policy=_Retry(RETRY_WAIT, RETRIES, random_jitter_range=RETRY_WAIT / 2),
        permit_redirects=False,
        max_single_put_size=2**63,  # the writer decides; what it gives in one piece is sent in one request
        **options,
    )


class _Retry(LinearRetry):
    """Tries again at once what got no connection or a server's error, but never what timed out.

    A backend that was silent for so long will be so again, and a thread would be held for a minute.
    """

    def increment(self, settings: Any, request: Any, response: Any = None, error: Any = None) -> bool:
        if isinstance(error, ServiceResponseTimeoutError):
            return False
        return super().increment(settings, request, response, error)


class _Adapter(requests.adapters.HTTPAdapter):
    """Sends bodies in pieces.

    urllib3 allows the *connect* time-out for each piece that it sends. A whole block in one piece would need a fast
    line; from bytes there is but one piece, from a file there are many.
    """

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, blocksize=SEND_SIZE, **kwargs)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        if isinstance(request.body, bytes):
            request.body = io.BytesIO(request.body)
        return super().send(request, *args, **kwargs)


def _transport(endpoint: str, connect_timeout: float, read_timeout: float) -> RequestsTransport:
    """The SDK's transport over a session of our own.

    The environment (proxies, CA bundle) is asked once, here. Left to requests it would be asked with every request,
    and a ``.netrc`` could replace the signature.
    """
    session = requests.Session()
    environment = session.merge_environment_settings(endpoint, {}, None, None, None)
    session.trust_env = False
    session.proxies = environment["proxies"]
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(pool_connections=2, pool_maxsize=CONNECTIONS))
    return RequestsTransport(
        session=session,
        connection_timeout=connect_timeout,
        read_timeout=read_timeout,
        connection_verify=environment["verify"],
    )


class _Reader(ObjectReader):
    """An object's content by ranged requests, a few of them ahead of the one that is read.

    Each but the first names the version (``If-Match``).
    """

    def __init__(self, driver: AzureDriver, info: ObjectInfo, answer: HttpResponse | None, start: int, stop: int):
        self.info = info
        self._driver = driver
        self._answer = answer
        self._first = driver.pieces(info, start, min(start + READ_SIZE, stop), answer)
        self._starts = iter(range(start + READ_SIZE, stop, READ_SIZE))
        self._size = stop - start
        self._stop = stop
        self._ahead: deque[_Ahead] = deque()

    def __iter__(self) -> Iterator[bytes]:
        if self._answer is not None:  # else the range is empty
            yield from self._begin()
        self._read_ahead()
        while self._ahead:
            arriving = self._ahead.popleft()
            self._read_ahead()
            with contextlib.closing(arriving):
                yield from arriving

    def _begin(self) -> Iterator[bytes]:
        """The first bytes, at once: threads and further requests would keep them from leaving."""
        for piece in self._first:
            yield piece
            if self._size > BATCH_SIZE:
                self._answer = None  # which is now another thread's, to close it too
                self._ahead.append(_Ahead(self._driver, self._first))
                break

    def _read_ahead(self) -> None:
        while len(self._ahead) < READS_AHEAD and (start := next(self._starts, None)) is not None:
            pieces = self._driver.pieces(self.info, start, min(start + READ_SIZE, self._stop))
            self._ahead.append(_Ahead(self._driver, pieces))

    def close(self) -> None:
        self._starts = iter(())
        while self._ahead:
            self._ahead.pop().close()
        if self._answer is not None:
            self._answer.close()


class _Ahead:
    """A range that the process's threads receive while another thread reads what has come of it.

    They hand over many pieces at a time: to wake a thread costs more than to copy them. While enough of them wait, no
    thread is held: a client that reads a range slowly must not keep the others from theirs.
    """

    def __init__(self, driver: AzureDriver, pieces: Generator[bytes, None, None]):
        self._driver = driver
        self._pieces = pieces
        self._arrived: deque[bytes] = deque()
        self._size = 0  # bytes in them
        self._wanted = BATCH_SIZE  # bytes that the reader is to be woken for
        self._paused = self._ended = self._closed = False
        self._changed = threading.Condition()
        self._go_on()

    def _go_on(self) -> None:
        self._paused = False
        self._received = self._driver.submit(self._receive)
        self._received.add_done_callback(self._end)

    def _receive(self) -> bool:
        """Receive until enough waits, or nobody wants it; whether it was all."""
        return all(map(self._add, self._pieces))

    def _add(self, piece: bytes) -> bool:
        """Take the next piece in; whether more is wanted now."""
        with self._changed:
            self._arrived.append(piece)
            self._size += len(piece)
            if self._size >= self._wanted:
                self._changed.notify()
            if self._size >= HELD_SIZE or self._closed:
                self._paused = True
            return not self._paused

    def _end(self, received: Future[bool]) -> None:
        with self._changed:
            if self._closed:
                self._pieces.close()
            if received.cancelled() or received.exception() is not None or received.result():
                self._ended = True
                self._changed.notify()

    def __iter__(self) -> Iterator[bytes]:
        while batch := self._take():
            yield batch
        self._received.result()

    def _take(self) -> bytes:
        """The next bytes: a batch, or what has come in :data:`BATCH_SECONDS`, or later; empty: that was all."""
        pieces, size = [], 0
        with self._changed:
            self._wait_for(BATCH_SIZE, BATCH_SECONDS)
            self._wait_for(1, None)
            while self._arrived and size < BATCH_SIZE:
                pieces.append(self._arrived.popleft())
                size += len(pieces[-1])
            self._size -= size
            if self._paused and self._size < HELD_SIZE // 2:
                self._go_on()
        return b"".join(pieces)

    def _wait_for(self, size: int, seconds: float | None) -> None:
        self._wanted = size
        self._changed.wait_for(lambda: self._size >= size or self._ended, seconds)

    def close(self) -> None:
        """Receive no more."""
        with self._changed:
            self._closed = True
            self._received.cancel()
            if self._received.done():
                self._pieces.close()


class _BlocksLost(Exception):
    """Staged blocks are gone, or are refused beside another client's: they must be staged again."""


class _Writer(ObjectWriter):
    """Blocks on their way to the backend, or, up to one block, just bytes in memory."""

    def __init__(self, driver: AzureDriver, key: str, content_type: str):
        self._driver = driver
        self._key = key
        self._content_type = content_type
        self._upload_id = secrets.token_hex(16)
        self._begin(BLOCK_ID_SIZE)

    def _begin(self, block_id_size: int) -> None:
        self._block_id_size = block_id_size
        self._size = 0  # bytes written
        self._block = io.BytesIO()  # the one that is being filled
        self._blocks: list[BlobBlock] = []
        self._in_flight: deque[Future[None]] = deque()
        self._lost = False

    def write(self, data: bytes | memoryview) -> None:
        self._size += len(data)
        rest = memoryview(data)
        while self._block.tell() + len(rest) > self._driver.block_size:
            room = self._driver.block_size - self._block.tell()
            self._block.write(rest[:room])
            rest = rest[room:]
            self._stage()
        self._block.write(rest)

    @property
    def held(self) -> int:
        return self._block.tell()

    def flush(self) -> None:
        if self.held:
            self._stage()
        while self._in_flight:  # what is on its way is in memory too
            self._settle()

    def _stage(self) -> None:
        """Send what is in memory as one block, as soon as few enough others are under way."""
        data, self._block = self._block.getvalue(), io.BytesIO()  # without a copy
        while len(self._in_flight) >= BLOCKS_IN_FLIGHT:
            self._settle()
        if not self._lost:
            block = BlobBlock(secrets.token_urlsafe(self._block_id_size)[: self._block_id_size])
            self._blocks.append(block)
            self._in_flight.append(self._driver.submit(self._send, block.id, data))

    def _send(self, block_id: str, data: bytes) -> None:
        with _own_errors(), _lost_blocks():
            self._driver.blob(self._key).stage_block(block_id, data, length=len(data))

    def _settle(self) -> None:
        try:
            self._in_flight.popleft().result()
        except _BlocksLost:
            self._lost = True

    def commit(
        self,
        digests: Digests,
        expected: str | Expectation = Expectation.ANYTHING,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        self._check_size(digests)
        conflict = WriteConflict("another upload of this file came in between; try again")
        for _ in range(3):
            try:
                return self._commit(digests, expected)
            except _BlocksLost as exc:
                if replay is None:
                    raise conflict from exc
            self._stage_again(replay)
            self._check_size(digests)
        raise conflict

    def _check_size(self, digests: Digests) -> None:
        if self._size != digests.size:
            raise BackendError("not all of the content was written", detail=f"{self._size} of {digests.size} B")

    def _commit(self, digests: Digests, expected: str | Expectation) -> ObjectInfo:
        try:
            with _own_errors(PreconditionFailed("the stored version is not the expected one")), _lost_blocks():
                answer = self._put(digests, expected)
        except (PreconditionFailed, _BlocksLost):
            landed = self._landed()
            if landed is None:
                raise
            return landed
        etag, modified = answer["etag"].strip('"'), int(answer["last_modified"].timestamp())
        return ObjectInfo(self._key, digests.size, etag, modified, self._content_type, digests.sha256, digests.md5)

    def _put(self, digests: Digests, expected: str | Expectation) -> Mapping[str, Any]:
        """The request that makes it the object's content."""
        options = {
            "content_settings": ContentSettings(
                content_type=self._content_type, content_md5=bytearray(digests.md5) if digests.md5 else None
            ),
            "metadata": {"sha256": digests.sha256, _UPLOAD_ID: self._upload_id},
            **_expecting(expected),
        }
        blob = self._driver.blob(self._key)
        if not self._blocks and not self._lost:
            return blob.upload_blob(self._block.getvalue(), length=self._size, overwrite=True, **options)
        if self.held:
            self._stage()
        while self._in_flight:
            self._settle()
        if self._lost:
            raise _BlocksLost
        return blob.commit_block_list(self._blocks, **options)

    def _landed(self) -> ObjectInfo | None:
        """The object, if it is of this writer: the answer to a commit may have been lost, and the SDK tried again."""
        try:
            with _own_errors():
                properties = self._driver.blob(self._key).get_blob_properties()
        except ObjectNotFound:
            return None
        return _info(self._key, properties) if properties.metadata.get(_UPLOAD_ID) == self._upload_id else None

    def _stage_again(self, replay: Callable[[], Iterable[bytes]]) -> None:
        self.abort()
        with _own_errors():
            self._begin(_others_block_id_size(self._driver.blob(self._key)) or BLOCK_ID_SIZE)
        for data in replay():
            self.write(data)

    def abort(self) -> None:
        while self._in_flight:
            self._in_flight.pop().cancel()
        self._block = io.BytesIO()


def _others_block_id_size(blob: BlobClient) -> int | None:
    """How many bytes the ids of the blocks have that others have staged for a blob; None: there are none.

    All uncommitted blocks of a blob must have ids of one length. Another program's, given up in mid-upload, stay for
    a week. (The SDK shows ids decoded or not, as they happen to be UTF-8; so they are taken from its answer.)
    """
    answers: list[str] = []
    with contextlib.suppress(HttpResponseError):
        blob.get_block_list(
            "uncommitted", raw_response_hook=lambda answer: answers.append(answer.http_response.text())
        )
    ids = re.findall("<Name>([^<]+)</Name>", "".join(answers))
    size = len(b64decode(ids[0])) if ids else 0
    return size if size >= 8 else None  # shorter random ids would meet


class _Answered(Exception):
    """The head of the answer to a read is here."""

    def __init__(self, answer: HttpResponse):
        super().__init__()
        self.answer = answer


def _ask(blob: BlobClient, start: int, stop: int, etag: str | None) -> HttpResponse:
    """The answer to a read, with its body still to come.

    :param blob: a client with :func:`_leave`.
    """
    try:
        blob.download_blob(start, stop - start, max_concurrency=1, client_request_id=_request_id(), **_pinned(etag))
    except _Answered as answered:
        return answered.answer
    raise BackendError("the backend's answer makes no sense")


def _request_id() -> str:
    """A name for a request, as the backend's logs will have it.

    The SDK's own is a UUID of the system's time, for which all threads of all processes queue at one locked file.
    """
    return secrets.token_hex(16)


def _leave(response: Any) -> None:
    """Leave the SDK as soon as it shows the answer, by an exception that it does not know.

    It would take in a whole range before it gives a byte of it.
    """
    if response.http_response.status_code in (200, 206):
        raise _Answered(response.http_response)


def _body(answer: HttpResponse, start: int, stop: int) -> Iterator[bytes]:
    """The body of an answer, of which it is known then that it is all of a range.

    :raises BackendError: it is not, or breaks off. What was given until then is right.
    """
    with _own_errors(), contextlib.closing(answer):
        sent = f"{answer.headers['Content-Range']}, {answer.headers['Content-Length']} B"
        if not re.fullmatch(rf"bytes {start}-{stop - 1}/\d+, {stop - start} B", sent):
            raise BackendError("the backend sent something else than was asked for", detail=sent)
        raw = answer.internal_response.raw
        while piece := raw.read1(RECEIVE_SIZE, decode_content=False):  # the SDK would wait until it has as much
            yield piece


def _info_of_range(key: str, answer: HttpResponse) -> ObjectInfo:
    """The properties of the object that an answer is a range of."""
    headers = answer.headers
    try:
        md5 = headers.get("x-ms-blob-content-md5")  # the whole object's; Content-MD5 is the range's
        return ObjectInfo(
            key,
            int(headers["Content-Range"].rpartition("/")[2]),
            headers["ETag"].strip('"'),
            int(parsedate_to_datetime(headers["Last-Modified"]).timestamp()),
            headers.get("Content-Type"),
            _sha256(headers.get("x-ms-meta-sha256")),
            b64decode(md5) if md5 else None,
        )
    except (KeyError, ValueError) as exc:
        answer.close()
        raise BackendError("the backend's answer makes no sense", detail=repr(exc)) from exc


def _info(key: str, properties: BlobProperties) -> ObjectInfo:
    settings, metadata = properties.content_settings, properties.metadata or {}
    return ObjectInfo(
        key,
        properties.size,
        properties.etag.strip('"'),
        int(properties.last_modified.timestamp()),
        settings.content_type,
        _sha256(metadata.get("sha256")),
        bytes(settings.content_md5) if settings.content_md5 else None,
    )


def _sha256(text: str | None) -> str | None:
    """Another program's metadata may hold anything under that name."""
    return text if text and _SHA256.match(text) else None


def _page(items: list[Any], marker: str | None) -> Page:
    objects, folders = [], []
    for item in items:
        if isinstance(item, BlobPrefix):
            folders.append(item.name)
        elif isinstance(item, str):
            objects.append(ObjectInfo(item, 0, "", 0))
        else:
            objects.append(_info(item.name, item))
    return Page(
        tuple(info for info in objects if is_valid(info.key)),
        tuple(name for name in folders if is_valid(name + "x")),
        marker or None,
    )


def _pinned(etag: str | None) -> dict[str, Any]:
    """The condition that a certain version is there. A star, quoted or not, would match any, and is in no ETag."""
    if etag is None:
        return {}
    return {"etag": '"{}"'.format(etag.replace("*", "-")), "match_condition": MatchConditions.IfNotModified}


def _expecting(expected: str | Expectation) -> dict[str, Any]:
    if expected is Expectation.ANYTHING:
        return {}
    if expected is Expectation.NOTHING:
        return {"match_condition": MatchConditions.IfMissing}
    return _pinned(expected)


# Errors


@contextlib.contextmanager
def _own_errors(unmet: StorageError | None = None) -> Iterator[None]:
    """The SDK's errors become ours.

    :param unmet: what it means that a condition of the request was not met.
    """
    try:
        yield
    except (AzureError, requests.RequestException, urllib3.exceptions.HTTPError) as exc:
        error = _error(exc, unmet)
    except (AttributeError, LookupError, TypeError, ValueError) as exc:  # the SDK, of an answer by something else
        error = BackendError("the backend's answer makes no sense", detail=f"{type(exc).__name__}: {exc}")
    else:
        return
    raise error from None  # the SDK's own would put URLs into the log, with the signature of a SAS token


@contextlib.contextmanager
def _lost_blocks() -> Iterator[None]:
    try:
        yield
    except HttpResponseError as exc:
        if _code(exc) in ("InvalidBlockList", "InvalidBlobOrBlock"):
            raise _BlocksLost from None
        raise


def _error(exc: Exception, unmet: StorageError | None) -> StorageError:
    """Our error for one of the SDK's. Its message may go to the client, its detail to the log."""
    code, status, detail = _code(exc), getattr(exc, "status_code", None), _detail(exc)
    if code == "BlobNotFound":
        return ObjectNotFound("no such file")
    if code in ("ConditionNotMet", "BlobAlreadyExists") and unmet is not None:
        return unmet
    if code.startswith("Lease"):
        return WriteConflict("another program has locked this file in the backend", detail=detail)
    if status in (429, 503) or code in ("ServerBusy", "OperationTimedOut"):
        return BackendThrottled("the backend is busy; try later", detail=detail, retry_after=_retry_after(exc))
    if status in (401, 403):
        return BackendError("the backend refused this server's credentials", detail=detail)
    if any(isinstance(cause, _TIMEOUTS) for cause in _causes(exc)):
        return BackendTimeout("the backend did not answer in time", detail=detail)
    if status is None:
        return BackendError("the backend cannot be reached, or broke off", detail=detail)
    return BackendError(f"the backend failed ({code or status})", detail=detail)


def _code(exc: Exception) -> str:
    """The backend's own word for an error; empty when it did not come from there."""
    code = getattr(exc, "error_code", None) or ""
    return str(getattr(code, "value", code))


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    """An error of the SDK, and those of requests, urllib3 and the system that it wraps, outermost first."""
    while isinstance(exc, BaseException):
        yield exc
        inner = getattr(exc, "inner_exception", None) or getattr(exc, "reason", None)
        exc = inner if isinstance(inner, BaseException) else next(iter(exc.args), None)


def _detail(exc: Exception) -> str:
    """For the log: what and why, but no URL, since that may hold a signature."""
    response = getattr(exc, "response", None)
    if response is not None and getattr(exc, "status_code", None):
        return f"{exc.status_code} {_code(exc)}, request {response.headers.get('x-ms-request-id')}"
    *_, root = _causes(exc)
    reason = str(root)
    return f"{type(exc).__name__}: {type(root).__name__ if '?' in reason else reason}"


def _retry_after(exc: Exception) -> int:
    """Seconds after which the backend wants to be asked again."""
    response = getattr(exc, "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return int(value) if value.isdecimal() else RETRY_AFTER


def _quieten(logger: str, level: int) -> None:
    """Have a library log only from ``level`` on, unless somebody has asked for something else."""
    if logging.getLogger(logger).level == logging.NOTSET:
        logging.getLogger(logger).setLevel(level)
