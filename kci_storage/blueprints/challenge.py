# SPDX-License-Identifier: LGPL-2.1-or-later
"""``POST /v1/download-challenge``: the cookie for a browser that has run the page's script."""

from __future__ import annotations

from flask import Blueprint, Response, request

from kci_storage.blueprints.context import services
from kci_storage.blueprints.errors import without_body
from kci_storage.errors import ObjectNotFound

blueprint = Blueprint("challenge", __name__)


@blueprint.post("/v1/download-challenge")
def pass_challenge() -> Response:
    """204 with the cookie.

    :raises ObjectNotFound: the challenge is off.
    """
    challenge = services().policies.challenge
    if challenge is None:
        raise ObjectNotFound("downloads need no cookie here")
    services().metrics.challenged("solved")
    response = without_body(204)
    response.headers["Set-Cookie"] = challenge.set_cookie(request.remote_addr or "")
    response.headers["Cache-Control"] = "no-store"
    return response
