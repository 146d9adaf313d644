# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong for a client: one line each, and whether trying again may help."""

from __future__ import annotations

import email.utils
import time

RETRIED = (408, 425, 429, 500, 502, 503, 504, 507)  # statuses that may be others soon


class ClientError(Exception):
    """Something failed; the text is one line for a person."""

    retriable = False
    status: int | None = None  # of the server's answer, if that is what failed
    retry_after: float | None = None  # seconds that the server asks to wait


class UsageError(ClientError):
    """The command cannot even begin: a setting is missing or impossible."""


class ServerRefused(ClientError):
    """The server's answer is an error.

    :param status: its status code.
    :param text: what the server says of it.
    :param retry_after: its header ``Retry-After``.
    """

    def __init__(self, status: int, text: str, retry_after: str | None = None):
        super().__init__(f"{status} {text}")
        self.status = status
        self.retriable = status in RETRIED
        self.retry_after = parse_retry_after(retry_after)


class Unreachable(ClientError):
    """The network failed, or the connection ended before its time."""

    retriable = True


class Unexpected(ClientError):
    """What came is not what this server says; maybe it is not this server."""


class Corrupt(ClientError):
    """What arrived is not what was sent."""

    retriable = True


def parse_retry_after(value: str | None) -> float | None:
    """The seconds that ``Retry-After`` asks for (RFC 9110, 10.2.3); None: it says nothing.

    >>> parse_retry_after("5"), parse_retry_after("soon"), parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (5.0, None, 0.0)
    """
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
