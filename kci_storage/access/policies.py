# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may change while the server runs: who may come in, who may write what, and how long that is kept."""

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
    """The rules that each request meets, as of the latest configuration.

    Who needs one asks for it at each request: its attributes are replaced when the configuration was read again. The
    sections that they are made from are :data:`kci_storage.config.settings.RELOADABLE`.

    :param ledger: where clients are counted.
    """

    permissions: Permissions
    admission: Admission
    challenge: Challenge | None  # None: there is none
    retention: Retention

    def __init__(self, config: Config, ledger: Ledger):
        self._ledger = ledger
        self.apply(config)

    def apply(self, config: Config) -> None:
        """From the next request on, this configuration holds."""
        self.challenge = Challenge(config.download_challenge) if config.download_challenge.user_agents else None
        self.admission = Admission(config, self._ledger, self.challenge)
        self.permissions = Permissions(config.users)
        self.retention = Retention(config.retention)
