# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changing Azure Blob Storage: Put Blob, Put Block, Put Block List, Delete Blob, Set Blob Metadata, without the SDK.

Bodies are sent from the caller's buffer, without a copy, so it must not change meanwhile.
"""

from __future__ import annotations

import logging
import secrets
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlencode

from kci_storage.drivers.azure.errors import BackendRefusal, nonsense
from kci_storage.drivers.azure.http import Answer, Body
from kci_storage.drivers.azure.outcomes import LostAnswers, service_timeout
from kci_storage.drivers.azure.reads import pinned
from kci_storage.drivers.azure.service import Blobs, Operation
from kci_storage.errors import PreconditionFailed

log = logging.getLogger(__name__)


class BlocksLost(Exception):
    """Staged blocks are gone, or refused because of another client's blocks. They must be staged again."""


class TagPolicy:
    """What becomes of the tags of uploads if the service does not take them.

    It does not for SAS tokens without the permission, nor in accounts with a hierarchical namespace.

    :param required: whether an upload fails then; if not, it is stored without tags.
    :param permitted: whether the credential may set tags; None: it does not tell.
    """

    def __init__(self, required: bool, permitted: bool | None):
        self._required = required
        self._permitted = permitted
        self._refused = False  # whether an upload was stored only without tags

    def to_send(self, tags: Mapping[str, str] | None) -> Mapping[str, str] | None:
        """The tags to send."""
        is_hopeless = self._permitted is False or self._refused
        return None if is_hopeless and not self._required else tags

    def check(self, refusal: BackendRefusal) -> None:
        """Check whether an upload with tags that was refused should be tried without them.

        :raises BackendRefusal: it should not: the tags are not the reason, or are required.
        """
        known = (
            "HierarchicalNamespace" in refusal.code or "Tags" in refusal.code or refusal.code == "UnsupportedHeader"
        )
        if not known and (refusal.status != 403 or self._permitted):
            raise refusal
        if self._required:
            raise refusal.saying(
                "the backend does not take the tags that [retention] sets: the SAS token needs the permission t, and "
                'an account with a hierarchical namespace takes none; [azure] tags = "best effort" stores without'
            )

    def note_refused(self) -> None:
        """An upload was stored without its tags, after it had been refused with them."""
        if not self._refused:
            log.warning("event=tags_refused text=%r", "uploads are stored without their tags from now on")
        self._refused = True


class BlobWrites:
    """The writing half of one container.

    :param blobs: with a signature that allows creating, writing and tagging.
    :param tag_policy: for uploads with tags.
    :param submit: calls a function in another thread.
    """

    def __init__(self, blobs: Blobs, tag_policy: TagPolicy, submit: Callable[..., Future[Any]]):
        self.submit = submit
        self.tag_policy = tag_policy
        self._blobs = blobs

    def put(self, key: str, body: Body, headers: Mapping[str, str], lost: LostAnswers) -> tuple[str, int]:
        """Make a body an object's content (Put Blob).

        :param headers: of :func:`properties` and :func:`condition`.
        :param lost: told of each try whose answer was lost.
        :returns: its ETag, and the time of modification, in seconds since the epoch.
        :raises PreconditionFailed: another version is there than the headers require. It may be this one, stored by
            a try whose answer was lost.
        :raises BackendError: the backend failed.
        """
        headers = {"x-ms-blob-type": "BlockBlob", **headers}
        return _stored(self._ask(_WRITE, key, "", body, headers, lost), lost)

    def stage(self, key: str, block_id: str, body: bytes | memoryview) -> None:
        """Send a block, which is visible to nobody until it is committed (Put Block).

        :param block_id: of :func:`new_block_id`.
        :raises BlocksLost: it is refused because of blocks that another client has left.
        :raises BackendError: the backend failed, or the outcome is unknown.
        """
        self._ask(_WRITE, key, f"comp=block&blockid={quote(block_id, safe='')}&", body, {})

    def commit(
        self, key: str, block_ids: Iterable[str], headers: Mapping[str, str], lost: LostAnswers
    ) -> tuple[str, int]:
        """Make blocks an object's content, in this order (Put Block List). As :meth:`put` otherwise.

        :raises BlocksLost: one is not there; or a try whose answer was lost has committed them.
        """
        body = block_list(block_ids)
        return _stored(self._ask(_WRITE, key, "comp=blocklist&", body, headers, lost), lost)

    def delete(self, key: str, etag: str, lost: LostAnswers) -> None:
        """Delete a version of an object, with its snapshots (Delete Blob).

        :param lost: told of each try whose answer was lost.
        :raises ObjectNotFound: there is none; a try whose answer was lost may have deleted it.
        :raises PreconditionFailed: another version is there.
        :raises BackendError: the backend failed.
        """
        headers = {"x-ms-delete-snapshots": "include", **condition(etag)}
        self._ask(_DELETE, key, "", b"", headers, lost)

    def set_metadata(self, key: str, metadata: Mapping[str, str], etag: str) -> tuple[str, int]:
        """Replace a version's metadata, which gives it another ETag (Set Blob Metadata).

        :param metadata: as headers.
        :returns: that ETag, and the time of modification, in seconds since the epoch.
        :raises ObjectNotFound: there is no object.
        :raises PreconditionFailed: another version is there.
        :raises BackendError: the backend failed.
        """
        lost = LostAnswers()
        answer = self._ask(_SET_METADATA, key, "comp=metadata&", b"", {**metadata, **condition(etag)}, lost)
        return _stored(answer, lost)

    def _ask(
        self,
        operation: Operation[Answer],
        key: str,
        query: str,
        body: Body,
        headers: Mapping[str, str],
        lost: LostAnswers | None = None,
    ) -> Answer:
        """Send a request. The service gives up a change in time, so that it is known until when it may carry it out.

        :param lost: of a change: told of each try whose answer was lost.
        """
        if lost is not None:
            query = f"{query}timeout={service_timeout(len(body))}&"
        headers = {"Content-Length": str(len(body)), **headers}
        return self._blobs.ask(operation, key, headers, body, query, lost)


def _received(answer: Answer) -> Answer:
    answer.discard()
    return answer


def _unmet() -> PreconditionFailed:
    return PreconditionFailed("the stored version is not the expected one")


_WRITE = Operation(
    "PUT",
    (201,),
    _received,
    {
        "InvalidBlockList": BlocksLost,
        "InvalidBlobOrBlock": BlocksLost,
        "ConditionNotMet": _unmet,
        "BlobAlreadyExists": _unmet,
    },
    patient=True,
)


_DELETE = Operation("DELETE", (202,), _received, {"ConditionNotMet": _unmet})
_SET_METADATA = Operation("PUT", (200,), _received, {"ConditionNotMet": _unmet})


def new_block_id(size: int) -> str:
    """A random block id in the protocol's form: base64 of ``size`` bytes.

    The bytes are ASCII, since the SDK shows other programs only such ids decoded.
    """
    return b64encode(secrets.token_urlsafe(size)[:size].encode()).decode()


def block_list(block_ids: Iterable[str]) -> bytes:
    """The body of a Put Block List.

    >>> block_list(["YQ=="])
    b'<?xml version="1.0" encoding="utf-8"?><BlockList><Latest>YQ==</Latest></BlockList>'
    """
    blocks = "".join(f"<Latest>{block_id}</Latest>" for block_id in block_ids)
    return f'<?xml version="1.0" encoding="utf-8"?><BlockList>{blocks}</BlockList>'.encode()


def properties(
    content_type: str, md5: bytes | None, metadata: Mapping[str, str], tags: Mapping[str, str] | None
) -> dict[str, str]:
    """An object's properties as headers.

    >>> properties("text/plain", b"0", {"a": "b"}, {"c": "d e"})["x-ms-tags"]
    'c=d+e'
    """
    headers = {"x-ms-blob-content-type": content_type}
    headers |= {f"x-ms-meta-{name}": value for name, value in metadata.items()}
    if md5 is not None:
        headers["x-ms-blob-content-md5"] = b64encode(md5).decode()
    if tags:
        headers["x-ms-tags"] = urlencode(tags)
    return headers


def condition(expected: str | None) -> dict[str, str]:
    """The headers that make a change conditional.

    :param expected: the ETag of the version that must be there; None: there must be none.

    >>> condition("0x1"), condition(None)
    ({'If-Match': '"0x1"'}, {'If-None-Match': '*'})
    """
    return {"If-None-Match": "*"} if expected is None else {"If-Match": pinned(expected)}


def _stored(answer: Answer, lost: LostAnswers) -> tuple[str, int]:
    try:
        modified = parsedate_to_datetime(answer.headers["last-modified"])
        return answer.headers["etag"].strip('"'), int(modified.timestamp())
    except (KeyError, ValueError) as exc:
        lost.note()  # it was carried out, but which version that made is unknown
        raise nonsense(repr(exc)) from exc
