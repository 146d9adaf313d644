# SPDX-License-Identifier: LGPL-2.1-or-later
"""The URL converter for keys, and what the views need of the current request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import current_app, request
from werkzeug.routing import BaseConverter

from kci_storage.wsgi.exchange import EXCHANGE, Exchange

if TYPE_CHECKING:
    from kci_storage.services import Services


class KeyConverter(BaseConverter):
    """Matches any path, so that :mod:`kci_storage.keys` decides which ones are refused."""

    part_isolating = False
    regex = r"(?s:.+)"
    weight = 1_000  # after every other rule


def services() -> Services:
    """The application's services."""
    parts: Services = current_app.extensions["kci_storage"]
    return parts


def exchange() -> Exchange:
    """The exchange of the current request."""
    current: Exchange = request.environ[EXCHANGE]
    return current


def authenticated() -> str:
    """The email of the request's token.

    :raises Unauthorized: there is no valid token.
    """
    email = services().authenticator.verify(request.headers.get("Authorization"))
    exchange().user = email
    return email
