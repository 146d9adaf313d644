# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blobs that the service will not read or replace as they are, whoever asks and however often: what to do about them.

Both the codes of its refusals and the properties of a blob tell. With the properties an upload in blocks need not
send its whole body first.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from kci_storage.errors import ObjectBlocked

ARCHIVED = (
    "this file is archived in the backend; change its access tier there to Hot or Cool, which takes up to 15 hours"
)
REHYDRATING = "this file is on its way back from the backend's archive, which takes up to 15 hours; try again then"
IMMUTABLE = (
    "the backend keeps this file from being changed or deleted (a retention policy or a legal hold); "
    "use another name, or wait for its end"
)
LEASED = "another program has locked this file in the backend (a lease); end its lease, or wait until it does"
OTHER_TYPE = "another program stored this file as an append or page blob; delete it first, or use another name"
BEING_COPIED = "another program is copying to this file in the backend; try again when that has ended"
ENCRYPTED = "another program encrypted this file with a key of its own, which this server does not have"

_BY_CODE = {
    "BlobArchived": ARCHIVED,
    "BlobBeingRehydrated": REHYDRATING,
    "InvalidBlobType": OTHER_TYPE,
    "PendingCopyOperation": BEING_COPIED,
    "BlobUsesCustomerSpecifiedEncryption": ENCRYPTED,
}
_BY_BEGINNING = {"Lease": LEASED, "BlobImmutable": IMMUTABLE, "ContainerImmutable": IMMUTABLE}


def by_code(code: str, detail: str) -> ObjectBlocked | None:
    """The error for a code of the service; None: it means something else.

    :param detail: for the log.
    """
    found = [text for beginning, text in _BY_BEGINNING.items() if code.startswith(beginning)]
    message = _BY_CODE.get(code) or next(iter(found), None)
    return ObjectBlocked(message, detail=detail) if message is not None else None


def check_replaceable(headers: Mapping[str, str]) -> None:
    """Check whether a blob can be replaced by an upload, as far as its properties tell.

    :param headers: of Get Blob Properties.
    :raises ObjectBlocked: it cannot.
    """
    if message := _reason(headers):
        raise ObjectBlocked(message)


def _reason(headers: Mapping[str, str]) -> str | None:
    """What keeps a blob from being replaced; None: nothing.

    >>> _reason({"x-ms-blob-type": "AppendBlob"}) == OTHER_TYPE, _reason({"x-ms-blob-type": "BlockBlob"})
    (True, None)
    """
    if headers.get("x-ms-blob-type", "BlockBlob") != "BlockBlob":
        return OTHER_TYPE
    if headers.get("x-ms-access-tier") == "Archive":
        return REHYDRATING if headers.get("x-ms-archive-status") else ARCHIVED
    if headers.get("x-ms-lease-status") == "locked":
        return LEASED
    if headers.get("x-ms-legal-hold") == "true" or _is_future(headers.get("x-ms-immutability-policy-until-date", "")):
        return IMMUTABLE
    return BEING_COPIED if headers.get("x-ms-copy-status") == "pending" else None


def _is_future(date: str) -> bool:
    try:
        return parsedate_to_datetime(date) > datetime.now(UTC)
    except (TypeError, ValueError):
        return False
