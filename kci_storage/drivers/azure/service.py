# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests to the storage service: the one retry policy, and errors in place of refusals."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Generic, TypeVar
from urllib.parse import quote

from kci_storage.drivers.azure.errors import BackendRefusal, Meanings, Unanswered, refusal
from kci_storage.drivers.azure.http import Answer, Body, ConnectionPool
from kci_storage.drivers.azure.outcomes import LostAnswers
from kci_storage.drivers.azure.signature import Signature
from kci_storage.errors import BackendError, BackendTimeout, StorageError

RETRIES = 2  # after a lost connection or a server error; none after a time-out
RETRY_WAIT = 0.5  # seconds before the first retry, plus or minus half of it
MAX_RETRY_WAIT = 5.0  # seconds before each later retry of an operation that is patient, plus or minus half of it
RETRYABLE = {408, *range(500, 600)} - {501, 505}  # statuses
NOT_CARRIED_OUT = {503}  # of these: the service was too busy to begin

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """An operation of the backend's protocol."""

    method: str
    success: Container[int]  # statuses
    receive: Callable[[Answer], T]  # turns a successful answer into the result; it may raise Unanswered for a retry
    meanings: Meanings = field(default_factory=dict)  # errors for codes that mean something else in this operation
    patient: bool = False  # whether it is retried for as long as Service.patience, since a client has sent a body


class _MayPass(Exception):
    """A failure that a retry may change."""

    def __init__(self, error: StorageError):
        super().__init__(error)
        self.error = error


class Service:
    """A service over HTTP, with retries and error mapping.

    :param patience: seconds for which an operation that is patient is retried.
    """

    def __init__(self, pool: ConnectionPool, patience: float = 0.0):
        self.pool = pool
        self.patience = patience

    def ask(
        self,
        operation: Operation[T],
        target: Callable[[], str],
        headers: Mapping[str, str],
        body: Body = b"",
        lost: LostAnswers | None = None,
    ) -> T:
        """Do an operation, with retries of failures that may pass: :data:`RETRIES` of them, or more if it is patient.

        A time-out is not retried: a backend that was silent for so long will be silent again, and the retry would
        hold a thread for as long. A patient operation is retried all the same, unless it may have been carried out.

        :param target: returns path and query, quoted, with a signature that is valid now.
        :param lost: told of each try that the service may have carried out although it did not say so; None: the
            operation changes nothing, or it does not matter how often it is carried out.
        :raises BackendTimeout: nothing came within the read time-out.
        :raises BackendThrottled: the backend is busy.
        :raises BackendError: the backend failed or refused. ``operation.meanings`` may say another error.
        """
        retries = Retries(self.patience if operation.patient else 0.0)
        while True:
            try:
                return self._try(operation, target(), headers, body, lost)
            except _MayPass as exc:
                error = exc.error
            retries.wait(error)

    def _try(
        self, operation: Operation[T], target: str, headers: Mapping[str, str], body: Body, lost: LostAnswers | None
    ) -> T:
        tried = LostAnswers() if lost is None else lost
        tried.sending(len(body))
        try:
            answer = self.pool.ask(operation.method, target, headers, body, tried.note)
            if answer.status in operation.success:
                return operation.receive(answer)
        except Unanswered as exc:
            raise _MayPass(BackendError(exc.message, detail=exc.detail)) from None
        except BackendTimeout as exc:
            if operation.patient and (lost is None or not lost.noted_last):
                raise _MayPass(exc) from None
            raise
        answer.discard()
        if answer.status in RETRYABLE - NOT_CARRIED_OUT:
            tried.note()
        error = refusal(answer.status, answer.headers, operation.meanings)
        if answer.status in RETRYABLE and isinstance(error, StorageError):
            raise _MayPass(error)
        raise error


class Retries:
    """The waits before the retries of one operation.

    :param patience: seconds since the first failure, for which there are retries with growing waits; they are as
        long as the backend asks for (``Retry-After``). There are :data:`RETRIES` in any case.
    """

    def __init__(self, patience: float):
        self._patience = patience
        self._deadline: float | None = None  # on the monotonic clock
        self._count = 0

    def wait(self, error: StorageError) -> None:
        """Wait before the next try.

        :param error: of the last one.
        :raises StorageError: it was the last one: ``error``.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + self._patience
        seconds = max(retry_wait(self._count), error.retry_after or 0.0)
        if time.monotonic() + seconds > self._deadline:
            if self._count >= RETRIES:
                raise error
            seconds = retry_wait()
        self._count += 1
        time.sleep(seconds)


class Blobs:
    """Requests about the blobs of one container, without the SDK.

    The SDK's pipeline costs about 1 ms of processor time a request, several times as much as a small read.

    :param path: the path of the container's URL, quoted.
    :param version: the protocol's (``x-ms-version``).
    """

    def __init__(self, service: Service, path: str, version: str, signature: Signature):
        self.service = service
        self._path = path
        self._version = version
        self._signature = signature

    def ask(
        self,
        operation: Operation[T],
        key: str,
        headers: Mapping[str, str],
        body: Body = b"",
        query: str = "",
        lost: LostAnswers | None = None,
    ) -> T:
        """Do an operation on a blob, as :meth:`Service.ask` does.

        :param query: parameters that select the operation, quoted, with a closing ``&``; may be empty.
        :param lost: as for :meth:`Service.ask`.
        """
        return self._ask(operation, f"{self._path}/{quote(key, safe='~/')}?{query}", headers, body, lost)

    def ask_container(self, operation: Operation[T], query: str) -> T:
        """Do an operation on the container that changes nothing.

        :param query: as for :meth:`ask`.
        """
        return self._ask(operation, f"{self._path}?{query}", {})

    def _ask(
        self,
        operation: Operation[T],
        path: str,
        headers: Mapping[str, str],
        body: Body = b"",
        lost: LostAnswers | None = None,
    ) -> T:
        # The backend's logs identify the request by its client request ID.
        headers = {"x-ms-version": self._version, "x-ms-client-request-id": secrets.token_hex(16), **headers}
        used = ""

        def target() -> str:
            nonlocal used
            used = self._signature()
            return path + used

        try:
            return self.service.ask(operation, target, headers, body, lost)
        except BackendRefusal as exc:
            now = _time_of(exc.date)
            if exc.status == 403 and (fault := self._signature.fault(now)):
                raise exc.saying(f"the backend refused this server's credentials: {fault}") from None
            if exc.status != 403 or not self._signature.renew(used, now):
                raise
        return self.service.ask(operation, target, headers, body, lost)


def _time_of(date: str) -> datetime:
    """The time that a header says, else this machine's."""
    try:
        return parsedate_to_datetime(date).astimezone(UTC)
    except ValueError:
        return datetime.now(UTC)


def retry_wait(count: int = 0) -> float:
    """Seconds to wait before a retry.

    :param count: of those before it.
    """
    return min(RETRY_WAIT * 2.0**count, MAX_RETRY_WAIT) * random.uniform(0.5, 1.5)
