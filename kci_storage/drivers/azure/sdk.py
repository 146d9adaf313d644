# SPDX-License-Identifier: LGPL-2.1-or-later
"""The SDK over this driver's connections: azure-core's transport, implemented with :class:`~.service.Service`.

The SDK signs requests and parses XML. Connections, proxies, certificates, time-outs, retries and errors are those of
the service: the SDK's own retry policy is off, and it sees successful answers only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from azure.core.exceptions import AzureError
from azure.core.pipeline.transport import HttpResponse, HttpTransport
from azure.core.rest import HttpRequest
from azure.core.utils import case_insensitive_dict
from azure.storage.blob import ContainerClient, LinearRetry

from kci_storage.config.settings import AzureConfig
from kci_storage.drivers.azure.errors import nonsense
from kci_storage.drivers.azure.http import Answer
from kci_storage.drivers.azure.service import Operation, Service

_SUCCESS = range(200, 300)


class SdkResponse(HttpResponse):
    """A successful answer with its whole body, in the SDK's form."""

    def __init__(self, request: Any, answer: Answer):
        super().__init__(request, answer)
        self.status_code = answer.status
        self.headers = case_insensitive_dict(answer.headers)
        self.content_type = answer.headers.get("content-type")
        self._content = answer.content()

    def body(self) -> bytes:
        return self._content


class SdkTransport(HttpTransport[HttpRequest, HttpResponse]):
    """Sends the SDK's requests.

    :param service: its pool is closed by the driver.
    """

    def __init__(self, service: Service):
        self._service = service

    def send(self, request: HttpRequest, **kwargs: Any) -> HttpResponse:
        """Send a request, and receive the whole answer.

        :param kwargs: options of the SDK's own transport; none of them is needed.
        :raises StorageError: as of :meth:`.service.Service.ask`.
        """
        assert not request.content, "no operation that is used here has a body"
        url = urlsplit(request.url)
        target = f"{url.path}?{url.query}"
        operation = Operation(request.method, _SUCCESS, lambda answer: SdkResponse(request, answer))
        length = {} if request.method in ("GET", "HEAD") else {"Content-Length": "0"}
        return self._service.ask(operation, lambda: target, length | dict(request.headers))

    def open(self) -> None:
        """Nothing: connections are made when they are needed."""

    def close(self) -> None:
        """Nothing: the driver closes the pool."""

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def container_client(settings: AzureConfig, endpoint: str, service: Service) -> ContainerClient:
    """The SDK's client for the configured container.

    :param endpoint: the service's URL.
    """
    key = {"account_name": settings.account, "account_key": settings.key}
    return ContainerClient(
        endpoint,
        settings.container,
        credential=key if settings.key else settings.sastoken,
        transport=SdkTransport(service),
        retry_policy=LinearRetry(retry_total=0),
        permit_redirects=False,
    )


@contextlib.contextmanager
def sdk_errors() -> Iterator[None]:
    """Translate what the SDK raises for an answer that it does not understand into a BackendError.

    The SDK's text stays out of the log: it has URLs, with the signature of a SAS token.
    """
    try:
        yield
    except (AzureError, AttributeError, LookupError, TypeError, ValueError) as exc:
        error = nonsense(f"{type(exc).__name__}, status {getattr(exc, 'status_code', None)}")
    else:
        return
    raise error from None
