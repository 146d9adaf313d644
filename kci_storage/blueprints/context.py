# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a path becomes a key, and what every view gets from its request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import current_app, request
from werkzeug.routing import BaseConverter

from kci_storage.wsgi.exchange import EXCHANGE, Exchange

if TYPE_CHECKING:
    from kci_storage.services import Services


class KeyConverter(BaseConverter):
    """Matches any path at all, so that a hostile one gets its answer from :mod:`kci_storage.keys`."""

    part_isolating = False
    regex = r"(?s:.+)"
    weight = 1_000  # after every other rule


def services() -> Services:
    """The application's parts."""
    parts: Services = current_app.extensions["kci_storage"]
    return parts


def exchange() -> Exchange:
    """The request as it goes over the wire."""
    current: Exchange = request.environ[EXCHANGE]
    return current


def authenticated() -> str:
    """The email of the request's token.

    :raises Unauthorized: there is no valid one.
    """
    email = services().authenticator.verify(request.headers.get("Authorization"))
    exchange().user = email
    return email
