# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the container that the configuration names, as soon as Azurite answers. Nobody would in a new emulator."""

from __future__ import annotations

import time

from azure.core.exceptions import AzureError, ResourceExistsError
from azure.storage.blob import ContainerClient

from kci_storage.config.reading import load

SECONDS = 60  # for which Azurite may start

azure = load().azure
credential = {"account_name": azure.account, "account_key": azure.key}
client = ContainerClient(azure.endpoint, azure.container, credential=credential, retry_total=0)
deadline = time.monotonic() + SECONDS
while True:
    try:
        client.create_container()
        break
    except ResourceExistsError:
        break
    except AzureError as exc:
        if time.monotonic() > deadline:
            raise SystemExit(f"Azurite does not answer: {exc}") from None
        time.sleep(0.5)
