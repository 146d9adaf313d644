# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listings of a container (List Blobs), without the SDK.

Names may have characters that XML forbids: Azure sends those names percent-encoded, Azurite as they are, and an XML
parser would refuse the whole page for one of them. So a page is taken apart by its tags: no name can have any, since
``<`` is always escaped. This also takes a tenth of the SDK's time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

from kci_storage.drivers.azure.errors import BackendRefusal, nonsense
from kci_storage.drivers.azure.http import Answer
from kci_storage.drivers.azure.reads import Properties, is_folder_marker
from kci_storage.drivers.azure.service import Blobs, Operation
from kci_storage.drivers.base import ObjectInfo, Page
from kci_storage.errors import BackendError, BadRequest

log = logging.getLogger(__name__)

LIST_SIZE, NAMES_SIZE = 1000, 5000  # entries in one page

_LIST = Operation("GET", (200,), Answer.content)
_ENTRY = re.compile(r"<(Blob|BlobPrefix)>(.*?)</\1>", re.DOTALL)
_ELEMENT = re.compile(r"<([^<>/\s]+)[^<>]*>([^<]*)</")
_NAME = re.compile(r"<Name([^<>]*)>([^<]*)</Name>")
_NEXT = re.compile(r"<NextMarker>([^<]+)</NextMarker>")
_REFERENCE = re.compile(r"&(?:#x([0-9A-Fa-f]+)|#([0-9]+)|(lt|gt|amp|quot|apos));")
_NAMED = {"lt": "<", "gt": ">", "amp": "&", "quot": '"', "apos": "'"}
_NOT_IN_URLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class BlobListing:
    """The listings of one container.

    :param blobs: with a signature that allows listing.
    :param properties: makes the objects' properties.
    """

    def __init__(self, blobs: Blobs, properties: Properties):
        self._blobs = blobs
        self._properties = properties

    def page(self, prefix: str, delimiter: str, marker: str | None, details: bool) -> Page:
        """See :meth:`kci_storage.drivers.base.Driver.list`. Other programs' folder markers are not listed."""
        if _NOT_IN_URLS.search(marker or ""):
            raise _no_such_page()
        size = LIST_SIZE if details or delimiter else NAMES_SIZE
        wanted = {"prefix": prefix, "delimiter": delimiter, "marker": marker, "maxresults": str(size)}
        query = "".join(f"{name}={quote(value, safe='')}&" for name, value in wanted.items() if value)
        try:
            text = self._blobs.ask_container(_LIST, f"restype=container&comp=list&include=metadata&{query}")
        except BackendRefusal as exc:
            if marker is None or exc.status != 400:
                raise
            raise _no_such_page() from None
        return self._parsed(text.decode("utf-8", "replace"), details or bool(delimiter))

    def _parsed(self, text: str, details: bool) -> Page:
        if "<EnumerationResults" not in text or not text.rstrip().endswith("</EnumerationResults>"):
            raise nonsense("not a listing")
        entries = [(found[1], found[2]) for found in _ENTRY.finditer(text)]
        objects = self._objects((entry for kind, entry in entries if kind == "Blob"), details)
        folders = tuple(_name(entry) for kind, entry in entries if kind == "BlobPrefix")
        found = _NEXT.search(text.partition("<Blobs>")[0] + text.rpartition("</Blobs>")[2])
        return Page(tuple(objects), folders, _unescaped(found[1]) if found else None)

    def _objects(self, entries: Iterator[str], details: bool) -> Iterator[ObjectInfo]:
        for entry in entries:
            properties, _, metadata = entry.partition("<Metadata>")
            headers = {f"x-ms-meta-{name.lower()}": _unescaped(value) for name, value in _ELEMENT.findall(metadata)}
            if is_folder_marker(headers):
                continue
            name = _name(properties)
            if not details:
                yield ObjectInfo(name, 0, "", 0)
                continue
            headers |= {key.lower(): _unescaped(value) for key, value in _ELEMENT.findall(properties)}
            try:
                yield self._properties.of(name, headers, headers.get("content-length"), headers.get("content-md5"))
            except BackendError as exc:
                log.warning("event=listing_entry_skipped error=%s", exc.detail)


def _no_such_page() -> BadRequest:
    return BadRequest("there is no such page of the listing")


def _name(entry: str) -> str:
    r"""The name in an entry.

    >>> _name("<Name>a&amp;b</Name>"), _name('<Name Encoded="true">a%EF%BF%BEb</Name>') == "a\ufffeb"
    ('a&b', True)
    """
    found = _NAME.search(entry)
    if found is None:
        raise nonsense("an entry without a name")
    name = _unescaped(found[2])
    return unquote(name) if 'Encoded="true"' in found[1] else name


def _unescaped(text: str) -> str:
    """A text without XML's references."""
    return _REFERENCE.sub(_character, text) if "&" in text else text


def _character(found: re.Match[str]) -> str:
    if found[3]:
        return _NAMED[found[3]]
    code = int(found[1], 16) if found[1] else int(found[2])
    return chr(code) if code < 0x110000 else "\ufffd"
