# SPDX-License-Identifier: LGPL-2.1-or-later
"""``GET`` and ``HEAD`` of directory pages, and downloads that fail (see :mod:`kci_storage.wsgi.downloads`)."""

from __future__ import annotations

from flask import Blueprint, Response, request

from kci_storage import keys
from kci_storage.blueprints.browse import directory
from kci_storage.errors import BadKey, ObjectNotFound, StorageError
from kci_storage.wsgi.downloads import FAILURE

blueprint = Blueprint("downloads", __name__)


@blueprint.get("/<path:path>")
def download(path: str) -> Response:
    """The directory page of a path with a trailing slash; else raises the download's error."""
    failure = request.environ.pop(FAILURE, None)
    if failure is not None:
        raise failure
    if path.endswith("/"):
        return directory()
    raise _no_key(request.environ["PATH_INFO"])


def _no_key(path_info: str) -> StorageError:
    """The error for a path that is not a valid key; no driver may see such a key."""
    try:
        keys.for_put(path_info)
    except BadKey as exc:
        return ObjectNotFound("no such file", detail=exc.message)
    raise AssertionError("wsgi.downloads answers all downloads of valid keys")
