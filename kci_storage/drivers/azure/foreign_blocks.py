# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blocks that another program has staged for an object and has not committed: how an upload gets past them.

Azure demands that all uncommitted blocks of a blob have ids of one length, and it keeps those of an upload that was
given up for a week. So an upload in blocks takes ids of the length that it finds. Where that is so short that random
ids could be another machine's too, and so mix two contents, the whole content is sent by one Put Blob: that needs no
ids, and Azure discards all uncommitted blocks when it has carried it out. (Azurite keeps them.)
"""

from __future__ import annotations

import contextlib
from base64 import b64decode
from collections.abc import Callable, Iterable

from kci_storage.drivers.azure.errors import BackendRefusal
from kci_storage.drivers.azure.http import RepeatableBody
from kci_storage.drivers.azure.reads import BlobReads
from kci_storage.errors import ObjectNotFound, WriteConflict

MIN_ID_SIZE = 8  # bytes; two of 50,000 random ids of fewer could be the same
MAX_PUT_SIZE = 5000 * 1024 * 1024  # bytes of one Put Blob, since the service's version of 2019-12-12


def block_id_size(reads: BlobReads, key: str) -> int | None:
    """The length in bytes of the ids of an object's uncommitted blocks; None: there are none."""
    with contextlib.suppress(ObjectNotFound, BackendRefusal, ValueError):
        if ids := reads.uncommitted_block_ids(key):
            return len(b64decode(ids[0]))
    return None


def whole_content(size: int, replay: Callable[[], Iterable[bytes]]) -> RepeatableBody:
    """The body of a Put Blob of the whole content.

    :param size: of the content, in bytes.
    :raises WriteConflict: it is too large for that.
    """
    if size > MAX_PUT_SIZE:
        raise in_the_way()
    return RepeatableBody(size, replay)


def in_the_way() -> WriteConflict:
    """The error for an upload that does not get past such blocks."""
    return WriteConflict(
        "another program has begun to upload this file and has not ended it, which keeps large uploads out; "
        "store a small file under this key, which ends that one, and then try again"
    )
