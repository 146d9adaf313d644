# SPDX-License-Identifier: LGPL-2.1-or-later
"""Azure Blob Storage.

Each process has connections of its own, made after the fork: an inherited one would give one process another's
answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

from azure.storage.blob import ContainerClient

from kci_storage.config.settings import AzureConfig, Config
from kci_storage.drivers.azure.connect import Connector
from kci_storage.drivers.azure.http import ConnectionPool
from kci_storage.drivers.azure.listing import BlobListing
from kci_storage.drivers.azure.outcomes import LostAnswers, certain
from kci_storage.drivers.azure.reads import BlobReads, Properties
from kci_storage.drivers.azure.service import Blobs, Service
from kci_storage.drivers.azure.signature import end_of, permissions_of, signature
from kci_storage.drivers.azure.writer import AzureWriter
from kci_storage.drivers.azure.writes import BlobWrites, TagPolicy
from kci_storage.drivers.base import Driver, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.errors import ObjectNotFound, PreconditionFailed

BLOCK_SIZE = 8 * 1024 * 1024  # bytes; at most 50,000 blocks make an object, so 390 GiB
UPLOAD_THREADS = 64  # of one process, for staging blocks
READ_THREADS = 64  # of one process, for requesting ranges ahead: uploads that are slow do not slow downloads

NEEDED = {  # permissions, in Azure's letters
    "r": "nothing can be downloaded",
    "w": "nothing can be uploaded",
    "d": "nothing can be deleted",
    "l": "nothing can be listed",
}
WITHOUT_TAGS = {
    "required": "azure.sastoken: has no permission t, so that uploads fail with the tags that [retention] sets",
    "best effort": "azure.sastoken: has no permission t, so that objects are stored without the tags of [retention]",
}
_PROBE_KEY = ".kci/probe"  # not a valid key, so never stored


class AzureDriver(Driver):
    """Objects as block blobs in one container.

    :param settings: account, container, credential and time-outs.
    :param block_size: bytes of one block of an upload, and of the largest upload in a single request.
    :param sets_tags: whether uploads will have tags.
    """

    wants_md5 = True

    def __init__(self, settings: AzureConfig, block_size: int = BLOCK_SIZE, *, sets_tags: bool = False):
        self.block_size = block_size
        self._settings = settings
        self._sets_tags = sets_tags
        self._processes: dict[int, _Process] = {}
        _quieten("azure", logging.WARNING)  # below that it logs a line for each request

    @classmethod
    def from_config(cls, config: Config) -> AzureDriver:
        return cls(config.azure, sets_tags=bool(config.retention.tag_value or config.retention.rules))

    def credential_end(self) -> float | None:
        """See :class:`kci_storage.drivers.base.Advising`."""
        end = end_of(self._settings.sastoken) if not self._settings.key else None
        return end.timestamp() if end is not None else None

    def advice(self) -> list[str]:
        """See :class:`kci_storage.drivers.base.Advising`."""
        permissions = permissions_of(self._settings.sastoken) if not self._settings.key else None
        if permissions is None:
            return []
        lines = [
            f"azure.sastoken: has no permission {letter}, so that {what}"
            for letter, what in NEEDED.items()
            if letter not in permissions
        ]
        if self._sets_tags and "t" not in permissions:
            lines.append(WITHOUT_TAGS[self._settings.tags])
        return lines

    @property
    def _process(self) -> _Process:
        """The connections and threads of this process; a forked process makes its own."""
        pid = os.getpid()
        found = self._processes.get(pid)
        return found or self._processes.setdefault(pid, _Process(self._settings))

    def stat(self, key: str) -> ObjectInfo:
        return self._process.reads.stat(key)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        return self._process.reads.read(key, start, stop, etag)

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        process = self._process
        return AzureWriter(process.reads, process.writes, self.block_size, key, content_type, tags)

    def delete(self, key: str, expected: str) -> None:
        process, lost = self._process, LostAnswers()
        with certain(lost, expected):
            try:
                process.writes.delete(key, expected, lost)
            except PreconditionFailed:
                if lost:
                    lost.forget_if_older(process.reads.stat_with_metadata(key)[1])
                raise

    def fence(self, key: str, expected: str) -> ObjectInfo | None:
        process = self._process
        info, headers = process.reads.stat_with_metadata(key)
        metadata = {name: value for name, value in headers.items() if name.startswith("x-ms-meta-")}
        etag, modified = process.writes.set_metadata(key, metadata, expected)
        return replace(info, etag=etag, last_modified=modified)

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        return self._process.listing.page(prefix, delimiter, marker, details)

    def probe(self) -> None:
        """Ask for an object that is never there. Any credential that may read may do this."""
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
        self._service = Service(self._pool, settings.retry_timeout)
        self._settings = settings
        self._threads = {
            name: ThreadPoolExecutor(size, thread_name_prefix=f"azure-{name}")
            for name, size in (("upload", UPLOAD_THREADS), ("read", READ_THREADS))
        }
        properties = Properties(settings.verify == "all")
        self._container = ContainerClient(endpoint, settings.container)  # for the form of URLs and the version
        self.reads = BlobReads(self._blobs("r"), properties, self._threads["read"].submit)
        permissions = "t" if settings.key else permissions_of(settings.sastoken)
        tag_policy = TagPolicy(settings.tags == "required", None if permissions is None else "t" in permissions)
        self.writes = BlobWrites(self._blobs("cwdt"), tag_policy, self._threads["upload"].submit)
        self.listing = BlobListing(self._blobs("l"), properties)

    def _blobs(self, permissions: str) -> Blobs:
        """The container's blobs, with a signature for these permissions (read, create, write, delete, tag, list)."""
        path, version = urlsplit(self._container.url).path, self._container.api_version
        return Blobs(self._service, path, version, signature(self._settings, permissions))

    def close(self) -> None:
        """Close idle connections and end idle threads. Running operations end by themselves."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        self._pool.close()


def _quieten(logger: str, level: int) -> None:
    """Let a library log only from ``level`` on, unless its level was set before."""
    if logging.getLogger(logger).level == logging.NOTSET:
        logging.getLogger(logger).setLevel(level)
