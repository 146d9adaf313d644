# SPDX-License-Identifier: LGPL-2.1-or-later
"""Crowds of requests that wait: more than there are slots, or more than may wait."""

from __future__ import annotations

import select
from collections.abc import Iterable

from tests.archives.test_archive import tar
from tests.support.harness import Server
from tests.support.wire import FORM_TYPE, Answer, Wire, assert_error, form, part, request

THREADS = 2  # slots of the server
MANY = 4 * THREADS  # requests
BEYOND = 4  # requests above slots.MAX_WAITING


def as_put(server: Server, key: str) -> bytes:
    return request("PUT", f"/{key}", server.headers(), b"later")


def as_form(server: Server, key: str) -> bytes:
    body = form(part("path"), part("file0", b"later", key))
    return request("POST", "/upload", {**server.headers(), **FORM_TYPE}, body)


def as_archive(server: Server, key: str) -> bytes:
    body = form(part("path"), part("archive", tar({key: b"later"}), "a.tar"))
    return request("POST", "/v1/archive", {**server.headers(), **FORM_TYPE}, body)


def as_delete(server: Server, key: str) -> bytes:
    return request("DELETE", f"/{key}", server.headers())


def as_download(server: Server, key: str) -> bytes:
    return request("GET", f"/{key}")


def answered(wires: Iterable[Wire]) -> set[Wire]:
    """The connections on which at least a part of the answer has arrived."""
    poll = select.poll()
    by_descriptor = {wire.fileno(): wire for wire in wires}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return {by_descriptor[descriptor] for descriptor, _ in poll.poll(0)}


def assert_refused(server: Server, answer: Answer) -> None:
    """Check that a request was refused since too many wait."""
    assert_error(answer, 503, server, says=["too many requests wait"])
    assert answer.headers["Retry-After"] == "5"
