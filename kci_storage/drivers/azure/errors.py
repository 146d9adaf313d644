# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backend's refusals and failures, mapped to the server's errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kci_storage.drivers.azure.blocked import by_code
from kci_storage.errors import BackendError, BackendThrottled, BackendTimeout, ObjectNotFound, StorageError

RETRY_AFTER = 5  # seconds, when a throttling backend does not say it itself

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
    if (blocked := by_code(code, detail)) is not None:
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
