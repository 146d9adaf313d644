"""The storage service as everything here asks it, the SDK too: what is tried again, and which error an answer is."""

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
from kci_storage.drivers.azure.http import Answer, ConnectionPool
from kci_storage.errors import BackendError

RETRIES = 2  # of a request that found no connection, or a failing server; never of one that timed out
RETRY_WAIT = 0.5  # seconds before each of them, give or take a half
WORTH_ANOTHER_TRY = {408, *range(500, 600)} - {501, 505}  # statuses

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """An operation of the backend's protocol."""

    method: str
    success: Container[int]  # statuses
    receive: Callable[[Answer], T]  # makes the result of a successful answer; Unanswered from it is worth a retry
    meanings: Meanings = field(default_factory=dict)  # of the backend's error codes, where this operation has its own


class Service:
    """A service that is asked over HTTP: what is tried again, and which error an answer is."""

    def __init__(self, pool: ConnectionPool):
        self.pool = pool

    def ask(
        self,
        operation: Operation[T],
        target: Callable[[], str],
        headers: Mapping[str, str],
        body: bytes | memoryview = b"",
    ) -> T:
        """Have an operation done. What fails in a way that may pass is tried again, a few times.

        A backend that was silent for the whole time-out will be so again, and a thread would be held for as long: a
        time-out is not tried again.

        :param target: gives path and query, quoted, with a signature that is valid now.
        :raises BackendTimeout: nothing came for too long.
        :raises BackendThrottled: the backend is busy.
        :raises BackendError: the backend failed, or refused; or what the operation's ``meanings`` say.
        """
        for tried in itertools.count():
            try:
                answer = self.pool.ask(operation.method, target(), headers, body)
                if answer.status in operation.success:
                    return operation.receive(answer)
            except Unanswered as exc:
                if tried == RETRIES:
                    raise BackendError(exc.message, detail=exc.detail) from None
            else:
                answer.discard()
                if answer.status not in WORTH_ANOTHER_TRY or tried == RETRIES:
                    raise refusal(answer.status, answer.headers, operation.meanings)
            time.sleep(retry_wait())
        raise AssertionError("unreachable")


class Blobs:
    """The blobs of one container, asked for without the SDK.

    Its pipeline would cost more processor time than most of what else a small cold file needs.

    :param path: the container's, quoted, as in its URL.
    :param version: of the backend's protocol.
    :param signature: gives the query that authorises a request, now; it is a secret.
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
        body: bytes | memoryview = b"",
        query: str = "",
    ) -> T:
        """Have an operation done on a blob, as :meth:`Service.ask` says.

        :param query: which operation of its method it is, quoted, with a closing ``&``; empty: the plain one.
        """
        path = f"{self._path}/{quote(key, safe='~/')}?{query}"
        # The request's name is what the backend's logs will have of it.
        own = {"x-ms-version": self._version, "x-ms-client-request-id": secrets.token_hex(16)}
        return self.service.ask(operation, lambda: path + self._signature(), {**own, **headers}, body)


def retry_wait() -> float:
    """How long to wait before another try, in seconds."""
    return RETRY_WAIT * random.uniform(0.5, 1.5)
