# SPDX-License-Identifier: LGPL-2.1-or-later
"""``/v1/checkauth``: whether a token is valid."""

from __future__ import annotations

from flask import Blueprint, Response

from kci_storage.blueprints.context import authenticated

blueprint = Blueprint("auth", __name__)


@blueprint.get("/v1/checkauth")
def checkauth() -> Response:
    """200 with the token's email.

    :raises Unauthorized: there is no valid token.
    """
    return Response(f"Authorized: {authenticated()}", mimetype="text/plain", headers={"Cache-Control": "no-store"})
