# SPDX-License-Identifier: LGPL-2.1-or-later
"""``GET`` and ``HEAD`` of directory pages, and downloads that fail (see :mod:`kci_storage.wsgi.downloads`)."""

from __future__ import annotations

from urllib.parse import quote

from flask import Blueprint, Response, request

from kci_storage import keys
from kci_storage.blueprints.browse import directory
from kci_storage.blueprints.context import services
from kci_storage.errors import BadKey, ObjectNotFound, StorageError
from kci_storage.wsgi.downloads import FAILURE

blueprint = Blueprint("downloads", __name__)


@blueprint.get("/<path:path>")
def download(path: str) -> Response:
    """The directory page of a path with a trailing slash; a redirect if slashes are doubled; else the error.

    :raises StorageError: the download's, or there is no such file.
    """
    failure = request.environ.pop(FAILURE, None)
    if failure is not None:
        raise failure
    if path.endswith("/"):
        return directory()
    key = keys.folded(request.environ["PATH_INFO"])
    if key is None:
        raise _no_key(request.environ["PATH_INFO"])
    services().objects.open(key, "HEAD").close()
    return redirect_to(key)


def redirect_to(key: str) -> Response:
    """The redirect to a key, with the request's query."""
    query = request.query_string.decode("latin-1")
    response = Response(status=308)
    response.location = f"/{quote(key)}?{query}" if query else f"/{quote(key)}"
    return response


def _no_key(path_info: str) -> StorageError:
    """The error for a path that is not a valid key; no driver may see such a key."""
    try:
        keys.for_put(path_info)
    except BadKey as exc:
        return ObjectNotFound("no such file", detail=exc.message)
    raise AssertionError("wsgi.downloads answers all downloads of valid keys")
