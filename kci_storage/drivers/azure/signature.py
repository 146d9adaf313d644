# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signatures that authorise requests: SAS tokens, as part of the query."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol
from urllib.parse import parse_qs

from azure.storage.blob import generate_container_sas

from kci_storage.config.settings import AzureConfig

SIGNATURE_SECONDS = 2 * 60 * 60.0  # for which a token is valid
REFUSED_SECONDS = 60.0  # that a token must be old before it is renewed because it was refused


class Signature(Protocol):
    """The query that authorises a request. It is a secret."""

    def __call__(self) -> str:
        """The query that is valid now."""
        ...

    def renew(self, refused: str, now: datetime) -> bool:
        """The service has refused a request for its signature; whether another signature may do.

        :param refused: the query that was refused.
        :param now: the service's time.
        """
        ...

    def fault(self, now: datetime) -> str | None:
        """Why the service refuses it, for an administrator; None: that cannot be told from it.

        :param now: the service's time.
        """
        ...


def signature(settings: AzureConfig, permissions: str) -> Signature:
    """The signature of requests in the configured container.

    :param permissions: in Azure's letters and order; a configured SAS token has its own instead.
    """
    return RenewedToken(settings, permissions) if settings.key else GivenToken(settings.sastoken)


def end_of(token: str) -> datetime | None:
    """When a SAS token ends; None: it does not say (a stored access policy may).

    >>> end_of("?sp=r&se=2026-12-31&sig=x"), end_of("si=policy&sig=x")
    (datetime.datetime(2026, 12, 31, 0, 0, tzinfo=datetime.timezone.utc), None)
    """
    try:
        end = datetime.fromisoformat(_field(token, "se"))
    except ValueError:
        return None
    return end if end.tzinfo is not None else end.replace(tzinfo=UTC)


def permissions_of(token: str) -> str | None:
    """The permissions of a SAS token, in Azure's letters; None: it does not say."""
    return _field(token, "sp") or None


def _field(token: str, name: str) -> str:
    return parse_qs(token.removeprefix("?")).get(name, [""])[-1]


class GivenToken:
    """A configured SAS token, which cannot be renewed."""

    def __init__(self, token: str):
        self._token = token.removeprefix("?")
        self._end = end_of(token)

    def __call__(self) -> str:
        return self._token

    def renew(self, refused: str, now: datetime) -> bool:
        """No other signature is known."""
        return False

    def fault(self, now: datetime) -> str | None:
        """That it has ended."""
        if self._end is None or self._end > now:
            return None
        return f"the SAS token in [azure] ended at {self._end:%Y-%m-%d %H:%M} UTC"


class RenewedToken:
    """A SAS token, signed with the account key by the SDK and renewed before it expires.

    Signing each request would cost more processor time than the request itself. Its age is measured by a clock that
    goes on while the machine sleeps, and by the time of day, which may have been wrong when the token was signed. If
    the service refuses it all the same, the next one is signed by the service's time.

    :param permissions: in Azure's letters and order.
    """

    def __init__(self, settings: AzureConfig, permissions: str):
        self._settings = settings
        self._permissions = permissions
        self._token = ""
        self._signed = self._signed_at = 0.0  # seconds since the machine's start; seconds since the epoch

    def __call__(self) -> str:
        if not self._token or self._age() > SIGNATURE_SECONDS / 2:
            self._sign(datetime.now(UTC))
        return self._token

    def renew(self, refused: str, now: datetime) -> bool:
        """Sign a new token, unless the refused one is new, so that its age is not the reason."""
        if refused == self._token:
            if self._age() < REFUSED_SECONDS and abs(now.timestamp() - time.time()) < REFUSED_SECONDS:
                return False
            self._sign(now)
        return refused != self._token

    def fault(self, now: datetime) -> str | None:
        """It cannot be told."""
        return None

    def _age(self) -> float:
        """Seconds since the token was signed."""
        return max(_seconds_awake_or_asleep() - self._signed, time.time() - self._signed_at)

    def _sign(self, now: datetime) -> None:
        settings = self._settings
        expiry = now + timedelta(seconds=SIGNATURE_SECONDS)
        self._signed, self._signed_at = _seconds_awake_or_asleep(), time.time()
        self._token = generate_container_sas(
            settings.account, settings.container, settings.key, permission=self._permissions, expiry=expiry
        )


def _seconds_awake_or_asleep() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
