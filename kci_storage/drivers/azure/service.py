# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests to the storage service, for the SDK too: the one retry policy, and errors in place of refusals."""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import quote

from kci_storage.drivers.azure.errors import Meanings, Unanswered, refusal
from kci_storage.drivers.azure.http import Answer, Body, ConnectionPool
from kci_storage.drivers.azure.outcomes import LostAnswers
from kci_storage.errors import BackendError

RETRIES = 2  # after a lost connection or a server error; none after a time-out
RETRY_WAIT = 0.5  # seconds before each retry, plus or minus half of it
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


class Service:
    """A service over HTTP, with retries and error mapping."""

    def __init__(self, pool: ConnectionPool):
        self.pool = pool

    def ask(
        self,
        operation: Operation[T],
        target: Callable[[], str],
        headers: Mapping[str, str],
        body: Body = b"",
        lost: LostAnswers | None = None,
    ) -> T:
        """Do an operation, with up to :data:`RETRIES` retries of failures that may pass.

        A time-out is not retried: a backend that was silent for so long will be silent again, and the retry would
        hold a thread for as long.

        :param target: returns path and query, quoted, with a signature that is valid now.
        :param lost: told of each try that the service may have carried out although it did not say so; None: the
            operation changes nothing, or it does not matter how often it is carried out.
        :raises BackendTimeout: nothing came within the read time-out.
        :raises BackendThrottled: the backend is busy.
        :raises BackendError: the backend failed or refused. ``operation.meanings`` may say another error.
        """
        lost = LostAnswers() if lost is None else lost
        lost.sending(len(body))
        for tried in itertools.count():
            try:
                answer = self.pool.ask(operation.method, target(), headers, body, lost.note)
                if answer.status in operation.success:
                    return operation.receive(answer)
            except Unanswered as exc:
                if tried == RETRIES:
                    raise BackendError(exc.message, detail=exc.detail) from None
            else:
                answer.discard()
                if answer.status in RETRYABLE - NOT_CARRIED_OUT:
                    lost.note()
                if answer.status not in RETRYABLE or tried == RETRIES:
                    raise refusal(answer.status, answer.headers, operation.meanings)
            time.sleep(retry_wait())
        raise AssertionError("unreachable")


class Blobs:
    """Requests about the blobs of one container, without the SDK.

    The SDK's pipeline costs about 1 ms of processor time a request, several times as much as a small read.

    :param path: the path of the container's URL, quoted.
    :param version: the protocol's (``x-ms-version``).
    :param signature: returns the query that authorises a request now; it is a secret.
    """

    def __init__(self, service: Service, path: str, version: str, signature: Callable[[], str]):
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
        path = f"{self._path}/{quote(key, safe='~/')}?{query}"
        # The backend's logs identify the request by its client request ID.
        own = {"x-ms-version": self._version, "x-ms-client-request-id": secrets.token_hex(16)}
        return self.service.ask(operation, lambda: path + self._signature(), {**own, **headers}, body, lost)


def retry_wait() -> float:
    """Seconds to wait before a retry."""
    return RETRY_WAIT * random.uniform(0.5, 1.5)
