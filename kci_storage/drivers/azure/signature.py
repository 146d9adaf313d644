"""What authorises requests that go past the SDK: a query that is a SAS token."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from azure.storage.blob import ContainerClient, generate_container_sas

from kci_storage.config.settings import AzureConfig

SIGNATURE_SECONDS = 2 * 60 * 60.0  # for which requests are authorised at a time


def signature(settings: AzureConfig, container: ContainerClient, permissions: str) -> Callable[[], str]:
    """What gives the query that authorises requests in the container, now.

    :param permissions: what for, in Azure's letters, in Azure's order; a configured SAS token has its own.
    """
    return RenewedToken(settings, permissions) if settings.key else lambda: urlsplit(container.url).query


class RenewedToken:
    """A SAS token that is made of the account key, and renewed in time.

    To sign each request would cost more than the request; and only the SDK knows how.

    :param permissions: what for, in Azure's letters, in Azure's order.
    """

    def __init__(self, settings: AzureConfig, permissions: str):
        self._settings = settings
        self._permissions = permissions
        self._token, self._renewed = "", -SIGNATURE_SECONDS

    def __call__(self) -> str:
        if time.monotonic() - self._renewed > SIGNATURE_SECONDS / 2:
            self._token, self._renewed = self._new_token(), time.monotonic()
        return self._token

    def _new_token(self) -> str:
        settings = self._settings
        expiry = datetime.now(UTC) + timedelta(seconds=SIGNATURE_SECONDS)
        return generate_container_sas(
            settings.account, settings.container, settings.key, permission=self._permissions, expiry=expiry
        )
