"""What Azure Blob Storage says when it refuses or fails, as our errors."""

from __future__ import annotations

from kci_storage.errors import (
    BackendError,
    BackendThrottled,
    BackendTimeout,
    ObjectNotFound,
    StorageError,
    WriteConflict,
)

RETRIES = 2  # of a request that found no connection, or a failing server
RETRY_WAIT = 0.5  # seconds before each of them, give or take a half
WORTH_ANOTHER_TRY = {408, *range(500, 600)} - {501, 505}  # statuses
RETRY_AFTER = 5  # seconds, when a throttling backend does not say it itself


def refusal(
    status: int, code: str, detail: str, retry_after: str | None, unmet: StorageError | None = None
) -> StorageError:
    """The error that an answer is. Its message may go to the client, its detail to the log.

    :param code: the backend's own word for it (``x-ms-error-code``); empty: it has none, or something else answered.
    :param retry_after: that header, if there is one.
    :param unmet: what it means that a condition of the request was not met.

    >>> refusal(404, "BlobNotFound", "", None)
    ObjectNotFound('no such file')
    >>> refusal(404, "ContainerNotFound", "", None)
    BackendError('the backend failed (ContainerNotFound)')
    """
    if code == "BlobNotFound":
        return ObjectNotFound("no such file")
    if code in ("ConditionNotMet", "BlobAlreadyExists") and unmet is not None:
        return unmet
    if code.startswith("Lease"):
        return WriteConflict("another program has locked this file in the backend", detail=detail)
    if status in (429, 503) or code in ("ServerBusy", "OperationTimedOut"):
        seconds = int(retry_after) if retry_after is not None and retry_after.isdecimal() else RETRY_AFTER
        return BackendThrottled("the backend is busy; try later", detail=detail, retry_after=seconds)
    if status in (401, 403):
        return BackendError("the backend refused this server's credentials", detail=detail)
    return BackendError(f"the backend failed ({code or status})", detail=detail)


class Unanswered(BackendError):
    """There was no connection, or it ended before an answer: the request may be sent again."""


def silence(detail: str) -> BackendTimeout:
    """The error that a missing answer is."""
    return BackendTimeout("the backend did not answer in time", detail=detail)


def breakage(detail: str, kind: type[BackendError] = BackendError) -> BackendError:
    """The error that a connection is which cannot be made, or ends too early."""
    return kind("the backend cannot be reached, or broke off", detail=detail)


def nonsense(detail: str) -> BackendError:
    """The error that an answer is which is none of the backend's."""
    return BackendError("the backend's answer makes no sense", detail=detail)
