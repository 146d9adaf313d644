# SPDX-License-Identifier: LGPL-2.1-or-later
"""An object's properties, from the headers of an answer or from an entry of a listing."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from kci_storage.drivers.azure.errors import nonsense
from kci_storage.drivers.base import ObjectInfo
from kci_storage.errors import ObjectNotFound

UPLOAD_ID = "uploadid"  # metadata of each upload of this server; by it a writer recognises its own object
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class Properties:
    """Makes objects' properties.

    :param verify_all: whether digests bind that another program has stored.
    """

    def __init__(self, verify_all: bool):
        self._verify_all = verify_all

    def of(self, key: str, headers: Mapping[str, str], size: Any, md5: str | None) -> ObjectInfo:
        """The properties of an object.

        :param headers: with names in lower case.
        :param size: in bytes, maybe as text.
        :param md5: of the whole content, in base64.
        :raises ObjectNotFound: it is another program's marker of a folder.
        :raises BackendError: the headers make no sense.
        """
        if is_folder_marker(headers):
            raise ObjectNotFound("no such file")
        try:
            info = ObjectInfo(
                key,
                int(size),
                headers["etag"].strip('"'),
                int(parsedate_to_datetime(headers["last-modified"]).timestamp()),
                headers.get("content-type"),
                valid_sha256(headers.get("x-ms-meta-sha256")),
                b64decode(md5) if md5 else None,
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise nonsense(repr(exc)) from exc
        return info


def is_folder_marker(headers: Mapping[str, str]) -> bool:
    """Whether a blob is no object, but says that there is a folder of its name.

    Accounts with a hierarchical namespace show folders so, and Hadoop's drivers make such blobs.
    """
    return headers.get("x-ms-meta-hdi_isfolder", "").lower() == "true"


def valid_sha256(text: str | None) -> str | None:
    """The text, if it is a SHA-256 in hex. Another program's metadata may have anything under that name."""
    return text if text and _SHA256.match(text) else None
