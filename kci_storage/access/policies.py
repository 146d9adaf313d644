# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules that may change while the server runs: access control, permissions, retention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kci_storage.access.admission import Admission
from kci_storage.access.challenge import Challenge
from kci_storage.access.permissions import Permissions
from kci_storage.retention.tags import Retention

if TYPE_CHECKING:
    from kci_storage.access.limits import Ledger
    from kci_storage.config.settings import Config


class Policies:
    """The rules for each request, as of the latest configuration.

    The attributes are replaced when the configuration is reloaded, so code must read them anew for each request. They
    are made from the sections in :data:`kci_storage.config.settings.RELOADABLE`.

    :param ledger: counts the clients' requests and downloads.
    """

    permissions: Permissions
    admission: Admission
    challenge: Challenge | None  # None: it is off
    retention: Retention

    def __init__(self, config: Config, ledger: Ledger):
        self._ledger = ledger
        self.apply(config)

    def apply(self, config: Config) -> None:
        """Use this configuration from the next request on."""
        self.challenge = Challenge(config.download_challenge) if config.download_challenge.user_agents else None
        self.admission = Admission(config, self._ledger, self.challenge)
        self.permissions = Permissions(config.users)
        self.retention = Retention(config.retention)
