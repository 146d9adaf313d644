# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree of errors, and the table of their HTTP status codes, titles and metric labels.

Services and drivers raise these; views never catch them. :mod:`kci_storage.blueprints.errors` turns an error into a
response by its row in :data:`TABLE`, and :mod:`kci_storage.monitoring.metrics` takes its label from the same row.
"""

from __future__ import annotations

from typing import NamedTuple


class StorageError(Exception):
    """The root of the tree.

    :param message: one line for the client. It never contains a local path, a secret or a backend URL.
    :param detail: for the log only.
    :param retry_after: seconds after which trying again makes sense; sent as ``Retry-After``.
    """

    def __init__(self, message: str, *, detail: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.retry_after = retry_after


class BadRequest(StorageError):
    """The request itself is wrong; sending it again changes nothing."""


class ProtocolError(BadRequest):
    """The request's head breaks a rule of HTTP/1.1, or asks for something that this server cannot do."""


class LengthRequired(ProtocolError):
    """The request has neither a ``Content-Length`` nor a ``chunked`` body."""


class UnsupportedTransferCoding(ProtocolError):
    """The body comes in another transfer coding than ``chunked``."""


class UnsupportedContentEncoding(BadRequest):
    """The body has a ``Content-Encoding``, with which it would be stored under a name that does not show it."""


class BadKey(BadRequest):
    """The key breaks a rule of :mod:`kci_storage.keys`."""


class BadForm(BadRequest):
    """The multipart form is malformed, has no file, or names one key twice."""


class BadArchive(BadRequest):
    """The archive is broken or too large, or has an entry that cannot be stored."""


class DigestMismatch(BadRequest):
    """The body does not match its ``Content-MD5`` or ``Repr-Digest``."""


class ClientDisconnected(BadRequest):
    """The body ended before its announced length, or its last chunk."""


class Unauthorized(StorageError):
    """No valid token. ``detail`` says why, for the log only."""


class Forbidden(StorageError):
    """A valid token, without permission for this key."""


class Refused(StorageError):
    """Access control refuses the client, whatever it requests. The subclass says which rule, ``detail`` says more."""


class UserAgentRefused(Refused):
    """The client is a crawler, by its ``User-Agent``."""


class SubnetRefused(Refused):
    """The client's address is in a blocked subnet."""


class TooManyRequests(Refused):
    """The client exceeds its rate of requests."""


class TooManyDownloads(Refused):
    """The client has too many downloads running."""


class ObjectNotFound(StorageError):
    """The backend answered that there is no such object. No other failure may look like this one."""


class KeyConflict(StorageError):
    """The backend cannot store this key beside an existing one (a file where a folder is, or the reverse)."""


class WriteConflict(StorageError):
    """Another writer has locked the key, or has changed it from another machine."""


class ObjectBlocked(WriteConflict):
    """The backend does not do this with the object as it is, however often it is asked. The message says what helps.

    Such as reading or replacing an archived object, or replacing one that is immutable, or locked by another program.
    """


class PreconditionFailed(StorageError):
    """The stored version is not the one that the request asked for."""


class UploadTooLarge(StorageError):
    """The body is larger than ``max_upload_bytes``."""


class InsufficientStorage(StorageError):
    """This server's disk is full."""


class BackendError(StorageError):
    """The backend failed, refused, or could not be reached."""


class BackendTimeout(BackendError):
    """The backend did not answer in time."""


class BackendThrottled(BackendError):
    """The backend asked for fewer requests (throttling)."""


class OutcomeUnknown(BackendError):
    """Whether the backend has carried out a commit or a deletion, or still will, is unknown.

    :param lands_until: until when it may still carry it out, in seconds since the epoch; 0: not any more.
    """

    def __init__(
        self,
        message: str,
        *,
        detail: str | None = None,
        retry_after: int | None = None,
        lands_until: float = 0.0,
    ):
        super().__init__(message, detail=detail, retry_after=retry_after)
        self.lands_until = lands_until


class OutcomeUnknownTimeout(OutcomeUnknown, BackendTimeout):
    """The outcome is unknown because the backend did not answer in time."""


class ObjectChanged(BackendError):
    """A read of one version found another one."""


class CorruptObject(BackendError):
    """The backend's content does not match its digest or its length."""


class NotReady(StorageError):
    """The answer of the readiness check while the backend does not answer."""


class Overloaded(StorageError):
    """This server is at its capacity, or a request took too long to wait for."""


class Meaning(NamedTuple):
    """A row of the table: an error's status code, its title (RFC 9457) and its metric label."""

    status: int
    title: str
    label: str


TABLE: dict[type[StorageError], Meaning] = {
    StorageError: Meaning(500, "Internal Server Error", "internal"),
    BadRequest: Meaning(400, "Bad Request", "bad_request"),
    ProtocolError: Meaning(400, "Bad Request", "malformed_request"),
    LengthRequired: Meaning(411, "Length Required", "length_required"),
    UnsupportedTransferCoding: Meaning(501, "Not Implemented", "transfer_coding"),
    UnsupportedContentEncoding: Meaning(415, "Unsupported Media Type", "content_encoding"),
    BadKey: Meaning(400, "Bad Key", "bad_key"),
    BadForm: Meaning(400, "Bad Form", "bad_form"),
    BadArchive: Meaning(400, "Bad Archive", "bad_archive"),
    DigestMismatch: Meaning(400, "Digest Mismatch", "digest_mismatch"),
    ClientDisconnected: Meaning(400, "Incomplete Body", "client_disconnected"),
    Unauthorized: Meaning(401, "Unauthorized", "unauthorized"),
    Forbidden: Meaning(403, "Forbidden", "forbidden"),
    UserAgentRefused: Meaning(403, "Forbidden", "useragent"),
    SubnetRefused: Meaning(403, "Forbidden", "subnet"),
    TooManyRequests: Meaning(429, "Too Many Requests", "rate"),
    TooManyDownloads: Meaning(429, "Too Many Requests", "concurrency"),
    ObjectNotFound: Meaning(404, "Not Found", "not_found"),
    KeyConflict: Meaning(409, "Conflict", "key_conflict"),
    WriteConflict: Meaning(409, "Conflict", "write_conflict"),
    ObjectBlocked: Meaning(409, "Conflict", "object_blocked"),
    PreconditionFailed: Meaning(412, "Precondition Failed", "precondition_failed"),
    UploadTooLarge: Meaning(413, "Content Too Large", "too_large"),
    InsufficientStorage: Meaning(507, "Insufficient Storage", "no_space"),
    BackendError: Meaning(502, "Bad Gateway", "backend_error"),
    BackendTimeout: Meaning(504, "Gateway Timeout", "backend_timeout"),
    OutcomeUnknown: Meaning(502, "Bad Gateway", "outcome_unknown"),
    OutcomeUnknownTimeout: Meaning(504, "Gateway Timeout", "outcome_unknown"),
    BackendThrottled: Meaning(503, "Service Unavailable", "backend_throttled"),
    ObjectChanged: Meaning(502, "Bad Gateway", "object_changed"),
    NotReady: Meaning(503, "Service Unavailable", "not_ready"),
    Overloaded: Meaning(503, "Service Unavailable", "overloaded"),
}


def label(error: BaseException) -> str:
    """An error's metric label: that of its row in the table, or ``internal``."""
    return meaning(error).label if isinstance(error, StorageError) else "internal"


def meaning(error: StorageError) -> Meaning:
    """The row of the table for an error; a class without a row has its parent's.

    >>> meaning(BadKey("no")).status
    400
    """
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
