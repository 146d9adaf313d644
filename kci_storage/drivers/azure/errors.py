# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backend's refusals and failures, mapped to the server's errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kci_storage.errors import (
    BackendError,
    BackendThrottled,
    BackendTimeout,
    ObjectBlocked,
    ObjectNotFound,
    StorageError,
)

RETRY_AFTER = 5  # seconds, when a throttling backend does not say it itself

# What the service does not read or replace as it is, whoever asks and however often.
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

Meanings = Mapping[str, Callable[[], Exception]]  # by the backend's error code: what one operation raises for it


class Unanswered(BackendError):
    """No connection, or it ended before the whole answer came. The request may be sent again."""


class BackendRefusal(BackendError):
    """The backend answered with an error that has no class of its own.

    :param status: of the answer.
    :param code: the backend's own code of the error.
    :param date: the backend's time, as a header has it; empty: it did not say.
    """

    def __init__(self, message: str, *, detail: str | None = None, status: int = 0, code: str = "", date: str = ""):
        super().__init__(message, detail=detail)
        self.status = status
        self.code = code
        self.date = date

    def saying(self, message: str) -> BackendRefusal:
        """The same refusal with another message."""
        return BackendRefusal(message, detail=self.detail, status=self.status, code=self.code, date=self.date)


def refusal(status: int, headers: Mapping[str, str], meanings: Meanings) -> Exception:
    """The error for an answer whose status is none of success.

    The backend sends a code with each of its errors. An answer without one is not the backend's own.

    :param headers: of the answer, with names in lower case.
    :param meanings: errors for codes that mean something else in this operation.

    >>> refusal(404, {"x-ms-error-code": "BlobNotFound"}, {})
    ObjectNotFound('no such file')
    >>> refusal(404, {"x-ms-error-code": "ContainerNotFound"}, {})
    BackendRefusal('the backend failed (ContainerNotFound)')
    """
    code = headers.get("x-ms-error-code", "")
    return meanings[code]() if code in meanings else _refusal(status, code, headers)


def _refusal(status: int, code: str, headers: Mapping[str, str]) -> StorageError:
    detail = f"{status} {code}, request {headers.get('x-ms-request-id')}"
    if code == "BlobNotFound":
        return ObjectNotFound("no such file")
    if (blocked := _blocked(code, detail)) is not None:
        return blocked
    if status in (429, 503) or code in ("ServerBusy", "OperationTimedOut"):
        seconds = _seconds(headers.get("retry-after", ""))
        return BackendThrottled("the backend is busy; try later", detail=detail, retry_after=seconds)
    message = f"the backend failed ({code or status})"
    if status in (401, 403):
        message = "the backend refused this server's credentials"
    return BackendRefusal(message, detail=detail, status=status, code=code, date=headers.get("date", ""))


def _seconds(retry_after: str) -> int:
    return int(retry_after) if retry_after.isdecimal() else RETRY_AFTER


def silence(detail: str) -> BackendTimeout:
    """The error for an answer that did not come in time."""
    return BackendTimeout("the backend did not answer in time", detail=detail)


def breakage(detail: str, kind: type[BackendError] = BackendError) -> BackendError:
    """The error for a connection that cannot be made, or ends too early."""
    return kind("the backend cannot be reached, or broke off", detail=detail)


def nonsense(detail: str) -> BackendError:
    """The error for an answer that no such backend gives."""
    return BackendError("the backend's answer makes no sense", detail=detail)


def _blocked(code: str, detail: str) -> ObjectBlocked | None:
    """The error for a code of the service; None: it means something else.

    :param detail: for the log.
    """
    found = [text for beginning, text in _BY_BEGINNING.items() if code.startswith(beginning)]
    message = _BY_CODE.get(code) or next(iter(found), None)
    return ObjectBlocked(message, detail=detail) if message is not None else None
