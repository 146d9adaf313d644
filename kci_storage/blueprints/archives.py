# SPDX-License-Identifier: LGPL-2.1-or-later
"""``POST /v1/archive``: unpacks an archive and stores its files as objects."""

from __future__ import annotations

import json
import logging

from flask import Blueprint, Response, g

from kci_storage import logfmt
from kci_storage.archives.files import ArchivePlan
from kci_storage.archives.run import ArchiveReport
from kci_storage.blueprints.context import authenticated, exchange, services
from kci_storage.blueprints.errors import logged
from kci_storage.blueprints.uploads import admitted_body, form_boundary, log_stored, stored_tags, stored_type
from kci_storage.errors import StorageError
from kci_storage.http import problems
from kci_storage.http.multipart import FORM_OVERHEAD

blueprint = Blueprint("archives", __name__)
log = logging.getLogger(__name__)


@blueprint.post("/v1/archive")
def archive() -> Response:
    """Store the files of an archive, each as if it had been uploaded by itself."""
    with services().metrics.archiving():
        email = authenticated()
        services().permissions.check_folder(email, "")
        report = services().archives.store(admitted_body(FORM_OVERHEAD), form_boundary(), plan(email))
    services().metrics.archived(report.uploaded, len(report.failures), report.size)
    log_archive(report)
    return answer("partial_failure" if report.failures else "ok", 500 if report.failures else 200, report)


def plan(email: str) -> ArchivePlan:
    """The request's instructions for the archive's files."""
    request_id, permissions = exchange().request_id, services().permissions

    def admit_folder(folder: str) -> None:
        g.prefix = folder
        permissions.check_folder(email, folder)

    return ArchivePlan(
        admit_folder=admit_folder,
        admit=lambda key: permissions.check(email, key),
        content_type=stored_type(),
        tags=stored_tags(email),
        stored=lambda stored: log_stored(stored, email, request_id),
    )


@blueprint.errorhandler(StorageError)
def refused(error: StorageError) -> Response:
    """The response when nothing of an archive was stored: the error, as JSON."""
    problem = logged(error)
    response = answer("error", problem.status, ArchiveReport(g.get("prefix", ""), failures=[error.message]))
    response.headers.update(problems.headers(problem, response.headers["Content-Type"], response.content_length or 0))
    return response


def answer(status: str, code: int, report: ArchiveReport) -> Response:
    """The response with the outcome of an archive."""
    document = {
        "status": status,
        "uploaded": report.uploaded,
        "failed": len(report.failures) if status != "error" else 0,
        "bytes": report.size,
        "prefix": report.prefix,
        "failures": report.failures,
    }
    return Response(json.dumps(document) + "\n", code, content_type="application/json")


def log_archive(report: ArchiveReport) -> None:
    """Log the outcome of an archive."""
    level = logging.WARNING if report.failures else logging.INFO
    line = logfmt.line(
        event="archive_stored", prefix=report.prefix, uploaded=report.uploaded, failed=len(report.failures),
        size=report.size, first_failure=report.failures[0] if report.failures else None, user=exchange().user,
        request_id=exchange().request_id,
    )  # fmt: skip
    log.log(level, line)
