# SPDX-License-Identifier: LGPL-2.1-or-later
"""One folder of the store as a page: its content, in order, and the URLs. Pure, except for the driver."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from kci_storage.drivers.base import Driver, ObjectInfo
from kci_storage.errors import ObjectNotFound
from kci_storage.http import media
from kci_storage.http.conditions import etag_header
from kci_storage.http.dates import http_date
from kci_storage.keys import ROOT_URL
from kci_storage.pages.kinds import Mark, mark

_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in a directory page."""

    path: str  # with the trailing slash

    @property
    def name(self) -> str:
        """Its last segment, with the trailing slash."""
        return self.path[:-1].rpartition("/")[2] + "/"

    @property
    def url(self) -> str:
        """The URL path of its page."""
        return directory_url(self.path)


@dataclass(frozen=True, slots=True)
class File:
    """A file in a directory page."""

    info: ObjectInfo

    @property
    def name(self) -> str:
        """Its last segment."""
        return self.info.key.rpartition("/")[2]

    @property
    def url(self) -> str:
        """The URL path of its download."""
        return "/" + quote(self.info.key)

    @property
    def view_url(self) -> str | None:
        """The URL of its decompressed view in a browser; None: it is not compressed text."""
        shown_as = media.for_reading(self.info.content_type, self.info.key)
        return f"{self.url}?view=1" if shown_as is not None else None

    @property
    def mark(self) -> Mark:
        """The mark of its kind."""
        return mark(self.name)


@dataclass(frozen=True, slots=True)
class Directory:
    """One page of a folder's content."""

    prefix: str  # empty, or with a trailing slash
    folders: Sequence[Folder]
    files: Sequence[File]
    next_url: str | None = None  # of the next page; None: this is the last one
    continues: bool = False  # whether this is not the first page

    @property
    def url(self) -> str:
        """The URL path of the folder's first page."""
        return directory_url(self.prefix)

    @property
    def size(self) -> int:
        """The total size of the files on the page, in bytes."""
        return sum(file.info.size for file in self.files)

    @property
    def ancestors(self) -> list[Folder]:
        """The folders from the root down to this one."""
        segments = self.prefix.split("/")[:-1]
        return [Folder("/".join(segments[: depth + 1]) + "/") for depth in range(len(segments))]

    @property
    def parent_url(self) -> str | None:
        """The URL path of the parent folder's page; None: this is the root."""
        return directory_url("".join(folder.path for folder in self.ancestors[-2:-1])) if self.prefix else None

    def to_fields(self) -> dict[str, Any]:
        """The page as values that can be serialized as JSON."""
        return {
            "path": self.prefix,
            "folders": [{"name": folder.name, "path": folder.path, "url": folder.url} for folder in self.folders],
            "files": [
                {
                    "name": file.name,
                    "path": file.info.key,
                    "size": file.info.size,
                    "etag": etag_header(file.info.etag),
                    "last_modified": http_date(file.info.last_modified),
                    "url": file.url,
                }
                for file in self.files
            ],
            "next": self.next_url,
        }


def browse(driver: Driver, prefix: str, marker: str | None) -> Directory:
    """One page of a folder's content.

    :param prefix: the folder, with a trailing slash; empty: the root.
    :param marker: where the page begins, from the previous page's ``next_url``; None: the first page.
    :raises ObjectNotFound: nothing is stored below this prefix, which is not the root.
    :raises BadRequest: the marker is invalid.
    """
    page = driver.list(prefix, delimiter="/", marker=marker)
    folders = [Folder(path) for path in page.folders]
    files = [File(info) for info in page.objects]
    if prefix and not folders and not files and page.next_marker is None and not _exists(driver, prefix, marker):
        raise ObjectNotFound("no such folder")
    next_url = f"{directory_url(prefix)}?marker={quote(page.next_marker, safe='')}" if page.next_marker else None
    return Directory(
        prefix,
        sorted(folders, key=lambda folder: natural(folder.name)),
        sorted(files, key=lambda file: natural(file.name)),
        next_url,
        continues=marker is not None,
    )


def _exists(driver: Driver, prefix: str, marker: str | None) -> bool:
    """Whether a folder exists whose page at ``marker`` is empty: it may have lost its last files meanwhile."""
    if marker is None:
        return False
    first = driver.list(prefix, delimiter="/")
    return bool(first.folders or first.objects or first.next_marker)


def directory_url(prefix: str) -> str:
    """The URL path of a folder's first page.

    >>> directory_url("a b/"), directory_url("")
    ('/a%20b/', '/v1/browse/')
    """
    return "/" + quote(prefix) if prefix else ROOT_URL


def natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key for natural order: digits compare as numbers.

    >>> sorted(["v6.10", "v6.9", "V6.1"], key=natural)
    ['V6.1', 'v6.9', 'v6.10']
    """
    parts: list[tuple[int, int | str]] = [
        (0, int(part)) if part.isdigit() and part.isascii() and len(part) < 100 else (1, part)
        for part in _DIGITS.split(name.casefold())
        if part
    ]
    return [*parts, (2, name)]
