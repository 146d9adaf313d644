# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's errors: a line of text each, and whether a retry may help."""

from __future__ import annotations

import email.utils
import time

RETRIED = (408, 425, 429, 500, 502, 503, 504, 507)  # statuses of temporary errors


class ClientError(Exception):
    """An operation failed; the text is one line for the user."""

    retriable = False
    status: int | None = None  # of the server's answer, if that is what failed
    retry_after: float | None = None  # seconds that the server asks to wait


class UsageError(ClientError):
    """The command cannot begin: a setting is missing or invalid."""


class ServerRefused(ClientError):
    """The server's response is an error.

    :param status: the response's status code.
    :param text: the server's message.
    :param retry_after: the value of ``Retry-After``.
    """

    def __init__(self, status: int, text: str, retry_after: str | None = None):
        super().__init__(f"{status} {text}")
        self.status = status
        self.retriable = status in RETRIED
        self.retry_after = parse_retry_after(retry_after)


class Unreachable(ClientError):
    """The network failed, or the connection ended early."""

    retriable = True


class Unexpected(ClientError):
    """The response is not one of this server's; the URL may be that of another server."""


class Corrupt(ClientError):
    """The content has another digest than the server's."""

    retriable = True


def parse_retry_after(value: str | None) -> float | None:
    """The seconds in a ``Retry-After`` header (RFC 9110, 10.2.3); None: it is missing or invalid.

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
