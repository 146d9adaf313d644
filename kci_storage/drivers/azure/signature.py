# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signatures for requests that the driver sends without the SDK: SAS tokens, as part of the query."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from azure.storage.blob import ContainerClient, generate_container_sas

from kci_storage.config.settings import AzureConfig

SIGNATURE_SECONDS = 2 * 60 * 60.0  # for which a token is valid


def signature(settings: AzureConfig, container: ContainerClient, permissions: str) -> Callable[[], str]:
    """A function that returns the query to authorise a request in the container now.

    :param permissions: in Azure's letters and order; a configured SAS token has its own instead.
    """
    return RenewedToken(settings, permissions) if settings.key else lambda: urlsplit(container.url).query


class RenewedToken:
    """A SAS token, signed with the account key by the SDK and renewed before it expires.

    Signing each request would cost more processor time than the request itself.

    :param permissions: in Azure's letters and order.
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
