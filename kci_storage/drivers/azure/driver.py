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
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from azure.core.exceptions import AzureError
from azure.storage.blob import (
    BlobClient,
    BlobPrefix,
    BlobProperties,
    ContainerClient,
    LinearRetry,
    generate_container_sas,
)

from kci_storage.config.settings import AzureConfig, Config
from kci_storage.drivers.azure.connect import Connector
from kci_storage.drivers.azure.errors import BackendRefusal, nonsense
from kci_storage.drivers.azure.http import ConnectionPool
from kci_storage.drivers.azure.reads import BlobReads, valid_sha256
from kci_storage.drivers.azure.sdk import SdkTransport
from kci_storage.drivers.azure.service import Blobs, Service
from kci_storage.drivers.azure.writes import BlobWrites, BlocksLost, condition, new_block_id, properties
from kci_storage.drivers.base import Digests, Driver, Expectation, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.errors import (
    BackendError,
    BadRequest,
    ObjectNotFound,
    PreconditionFailed,
    WriteConflict,
)
from kci_storage.keys import MAX_CHARACTERS, is_valid

BLOCK_SIZE = 8 * 1024 * 1024  # bytes; at most 50,000 blocks make an object, so 390 GiB
BLOCKS_IN_FLIGHT = 4  # of one upload; it holds one block more in memory
SIGNATURE_SECONDS = 2 * 60 * 60.0  # for which requests are authorised at a time
THREADS = 128  # of one process, for blocks and for asking ahead
LIST_SIZE, NAMES_SIZE = 1000, 5000  # entries in one page of a listing; 0.2 ms and 0.04 ms of work each
BLOCK_ID_SIZE = 48  # bytes; 64 characters of base64, what most other clients use

_UPLOAD_ID = "uploadid"  # metadata: tells a writer whether what is there is its own
_PROBE_KEY = ".kci/probe"  # not a valid key: never there
_NOT_IN_URLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # nor in keys


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
        _quieten("azure", logging.WARNING)  # below that it logs a line for each request

    @classmethod
    def from_config(cls, config: Config) -> AzureDriver:
        return cls(config.azure)

    @property
    def _process(self) -> _Process:
        """What this process has; made anew after a fork."""
        pid = os.getpid()
        found = self._processes.get(pid)
        return found or self._processes.setdefault(pid, _Process(self._settings))

    @property
    def reads(self) -> BlobReads:
        """What reads objects."""
        return self._process.reads

    @property
    def writes(self) -> BlobWrites:
        """What stores objects."""
        return self._process.writes

    def blob(self, key: str) -> BlobClient:
        """The SDK's client for one object."""
        return self._process.container.get_blob_client(key)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call a function in one of this process's threads."""
        return self._process.threads.submit(function, *args)

    def stat(self, key: str) -> ObjectInfo:
        return self.reads.stat(key)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        return self.reads.read(key, start, stop, etag)

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        return _Writer(self, key, content_type, tags)

    def delete(self, key: str) -> None:
        with _sdk_errors():
            self.blob(key).delete_blob(delete_snapshots="include")

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        if _NOT_IN_URLS.search(marker or ""):
            raise BadRequest("there is no such page of the listing")
        if _NOT_IN_URLS.search(prefix) or len(prefix) > MAX_CHARACTERS:
            return Page(())
        try:
            with _sdk_errors():
                pages = self._listing(prefix, delimiter, details).by_page(continuation_token=marker)
                items = list(next(pages))
        except BackendRefusal as exc:
            if marker is None or exc.status != 400:
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
        connector = Connector.from_environment(endpoint, settings.connect_timeout)
        self._pool = ConnectionPool(connector, settings.read_timeout)
        service = Service(self._pool)
        self.container = _client(settings, endpoint, service)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="azure")
        path, version = urlsplit(self.container.url).path, self.container.api_version
        self.reads = BlobReads(
            Blobs(service, path, version, _signature(settings, self.container, "r")), self.threads.submit
        )
        self.writes = BlobWrites(Blobs(service, path, version, _signature(settings, self.container, "cwt")))

    def close(self) -> None:
        """Let go of both; what is under way ends by itself."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self._pool.close()


def _client(settings: AzureConfig, endpoint: str, service: Service) -> ContainerClient:
    """The SDK's client, for all but reads and writes. The service tries again, the SDK does not."""
    key = {"account_name": settings.account, "account_key": settings.key}
    return ContainerClient(
        endpoint,
        settings.container,
        credential=key if settings.key else settings.sastoken,
        transport=SdkTransport(service),
        retry_policy=LinearRetry(retry_total=0),
        permit_redirects=False,
    )


def _signature(settings: AzureConfig, container: ContainerClient, permission: str) -> Callable[[], str]:
    """What gives the query that authorises requests in the container."""
    return _Signature(settings, permission) if settings.key else lambda: urlsplit(container.url).query


class _Signature:
    """The query that authorises requests: a SAS token, which is made of the account key and renewed in time.

    :param permission: what for, in Azure's letters, in Azure's order.

    To sign each request would cost more than the request; and only the SDK knows how.
    """

    def __init__(self, settings: AzureConfig, permission: str = "r"):
        self._settings = settings
        self._permission = permission
        self._token, self._renewed = "", -SIGNATURE_SECONDS

    def __call__(self) -> str:
        if time.monotonic() - self._renewed > SIGNATURE_SECONDS / 2:
            self._token, self._renewed = self._new_token(), time.monotonic()
        return self._token

    def _new_token(self) -> str:
        settings = self._settings
        expiry = datetime.now(UTC) + timedelta(seconds=SIGNATURE_SECONDS)
        return generate_container_sas(
            settings.account, settings.container, settings.key, permission=self._permission, expiry=expiry
        )


class _Writer(ObjectWriter):
    """Blocks on their way to the backend, or, up to one block, just bytes in memory.

    A block's buffer is used again once the backend has it: pages that the process has already cost nothing more.
    """

    def __init__(self, driver: AzureDriver, key: str, content_type: str, tags: Mapping[str, str] | None):
        self._driver = driver
        self._key = key
        self._content_type = content_type
        self._tags = tags
        self._upload_id = secrets.token_hex(16)
        self._begin(BLOCK_ID_SIZE)

    def _begin(self, block_id_size: int) -> None:
        self._block_id_size = block_id_size
        self._size = 0  # bytes written
        self._block = io.BytesIO()  # the one that is being filled
        self._spare: list[io.BytesIO] = []  # whose content the backend has
        self._block_ids: list[str] = []
        self._in_flight: deque[Future[io.BytesIO]] = deque()
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
        return self._block.tell() + self._driver.block_size * (len(self._in_flight) + len(self._spare))

    def flush(self) -> None:
        if self._block.tell():
            self._stage()
        self._settle_all()
        self._spare.clear()
        self._block = io.BytesIO()

    def _stage(self) -> None:
        """Send what is in memory as one block, as soon as few enough others are under way."""
        while len(self._in_flight) >= BLOCKS_IN_FLIGHT:
            self._settle()
        if self._lost:  # then nothing but their size matters
            self._block.seek(0)
            return
        block, self._block = self._block, self._spare.pop() if self._spare else io.BytesIO()
        self._block_ids.append(new_block_id(self._block_id_size))
        self._in_flight.append(self._driver.submit(self._send, self._block_ids[-1], block))

    def _send(self, block_id: str, block: io.BytesIO) -> io.BytesIO:
        """Have the backend take a block; its buffer, which may be filled anew."""
        with _content(block) as content:
            self._driver.writes.stage(self._key, block_id, content)
        block.seek(0)
        return block

    def _settle(self) -> None:
        try:
            self._spare.append(self._in_flight.popleft().result())
        except BlocksLost:
            self._lost = True

    def _settle_all(self) -> None:
        while self._in_flight:
            self._settle()

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
            except BlocksLost as exc:
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
            etag, modified = self._put(digests, expected)
        except (PreconditionFailed, BlocksLost):
            landed = self._landed()
            if landed is None:
                raise
            return landed
        return ObjectInfo(self._key, digests.size, etag, modified, self._content_type, digests.sha256, digests.md5)

    def _put(self, digests: Digests, expected: str | Expectation) -> tuple[str, int]:
        """Make it the object's content, by one request; its ETag, and when it was modified."""
        metadata = {"sha256": digests.sha256, _UPLOAD_ID: self._upload_id}
        headers = properties(self._content_type, digests.md5, metadata, self._tags) | condition(expected)
        if not self._block_ids and not self._lost:
            with _content(self._block) as content:
                return self._driver.writes.put(self._key, content, headers)
        if self._block.tell():
            self._stage()
        self._settle_all()
        if self._lost:
            raise BlocksLost
        return self._driver.writes.commit(self._key, self._block_ids, headers)

    def _landed(self) -> ObjectInfo | None:
        """The object, if it is of this writer: the answer to a commit may have been lost, and it was tried again."""
        try:
            info, headers = self._driver.reads.stat_with_metadata(self._key)
        except ObjectNotFound:
            return None
        return info if headers.get(f"x-ms-meta-{_UPLOAD_ID}") == self._upload_id else None

    def _stage_again(self, replay: Callable[[], Iterable[bytes]]) -> None:
        self.abort()
        self._begin(_others_block_id_size(self._driver.reads, self._key) or BLOCK_ID_SIZE)
        for data in replay():
            self.write(data)

    def abort(self) -> None:
        while self._in_flight:
            self._in_flight.pop().cancel()
        self._spare.clear()
        self._block = io.BytesIO()


@contextlib.contextmanager
def _content(block: io.BytesIO) -> Iterator[memoryview]:
    """What a block's buffer was filled with, during the block of the statement; then it may be filled anew."""
    with block.getbuffer() as whole, whole[: block.tell()] as content:
        yield content


def _others_block_id_size(reads: BlobReads, key: str) -> int | None:
    """How many bytes the ids of the blocks have that others have staged for a blob; None: there are none.

    All uncommitted blocks of a blob must have ids of one length. Another program's, given up in mid-upload, stay for
    a week.
    """
    with contextlib.suppress(ObjectNotFound, BackendRefusal, ValueError):
        ids = reads.uncommitted_block_ids(key)
        if ids and (size := len(b64decode(ids[0]))) >= 8:  # shorter random ids would meet
            return size
    return None


def _info(key: str, properties: BlobProperties) -> ObjectInfo:
    settings, metadata = properties.content_settings, properties.metadata or {}
    return ObjectInfo(
        key,
        properties.size,
        properties.etag.strip('"'),
        int(properties.last_modified.timestamp()),
        settings.content_type,
        valid_sha256(metadata.get("sha256")),
        bytes(settings.content_md5) if settings.content_md5 else None,
    )


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


@contextlib.contextmanager
def _sdk_errors() -> Iterator[None]:
    """The SDK's own errors, which are of answers that it does not understand, become ours.

    What it says would put URLs into the log, with the signature of a SAS token.
    """
    try:
        yield
    except (AzureError, AttributeError, LookupError, TypeError, ValueError) as exc:
        error = nonsense(f"{type(exc).__name__}, status {getattr(exc, 'status_code', None)}")
    else:
        return
    raise error from None


def _quieten(logger: str, level: int) -> None:
    """Have a library log only from ``level`` on, unless somebody has asked for something else."""
    if logging.getLogger(logger).level == logging.NOTSET:
        logging.getLogger(logger).setLevel(level)
