# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of HTTP/1.1 for a request's head beyond its syntax: the host, and where the body ends. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from kci_storage.errors import LengthRequired, ProtocolError, UnsupportedTransferCoding

# A name, an IPv4 address, or an IP literal in brackets; then maybe a port (RFC 3986, 3.2.2 and 3.2.3).
_HOST = re.compile(r"(?:\[[0-9A-Fa-fv:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]*)?")
WITH_BODY = ("PUT", "POST")  # methods whose requests must have a body


def check(environ: Mapping[str, Any]) -> None:
    """Check whether a request is valid. Called for every request, hits included.

    :param environ: the request's WSGI environment.
    :raises ProtocolError: it has no ``Host``, or an invalid one (RFC 9112, 3.2).
    :raises UnsupportedTransferCoding: its body has another transfer coding than ``chunked`` (RFC 9112, 6.1).
    :raises LengthRequired: it should have a body, but does not say where the body ends (RFC 9110, 15.5.12).
    """
    host = environ.get("HTTP_HOST")
    if not _is_host(host) and (host is not None or environ["SERVER_PROTOCOL"] != "HTTP/1.0"):
        raise ProtocolError("a request names the one host that it is for, in Host")
    coding = environ.get("HTTP_TRANSFER_ENCODING")
    if coding is not None:
        if coding.lower() != "chunked":
            raise UnsupportedTransferCoding("the only transfer coding is chunked")
    elif environ["REQUEST_METHOD"] in WITH_BODY and not environ.get("CONTENT_LENGTH"):
        raise LengthRequired("say how long the body is, in Content-Length, or send it chunked")


@functools.lru_cache(256)
def _is_host(value: str | None) -> bool:
    """Whether a text is a host, with or without a port.

    >>> _is_host("storage:8080"), _is_host("[::1]"), _is_host("a b"), _is_host(""), _is_host(None)
    (True, True, False, False, False)
    """
    return value is not None and _HOST.fullmatch(value) is not None
