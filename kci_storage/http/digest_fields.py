# SPDX-License-Identifier: LGPL-2.1-or-later
"""Digests in header fields: ``Content-MD5`` (RFC 1864) and ``Repr-Digest`` (RFC 9530)."""

from __future__ import annotations

import base64
import binascii
import re

from kci_storage.errors import BadRequest


def parse_content_md5(value: str) -> bytes:
    """The 16 bytes of a ``Content-MD5`` header (RFC 1864).

    :raises BadRequest: it is not the base64 of 16 bytes.
    """
    return _digest("Content-MD5", value.strip(" \t"), 16)


_SF_KEY = r"[a-z*][a-z0-9_.*-]*"
_DIGEST_MEMBER = re.compile(rf"[ \t]*({_SF_KEY})=:([A-Za-z0-9+/=]*):(?:;[ ]*{_SF_KEY}(?:=[^;,\" \t]*)?)*[ \t]*\Z")


def parse_repr_digest(value: str) -> bytes | None:
    """The 32 bytes of ``sha-256`` in a ``Repr-Digest`` header (RFC 9530), the last one if there are several.

    :returns: None: the header has only other algorithms.
    :raises BadRequest: it is not a dictionary of byte sequences (RFC 8941), or the digest has another length.
    """
    digest = None
    for text in value.split(",") if value.strip(" \t") else ():
        member = _DIGEST_MEMBER.match(text)
        if member is None:
            raise BadRequest("Repr-Digest is not a list of digests such as sha-256=:<base64>:")
        if member[1] == "sha-256":
            digest = member[2]
    return None if digest is None else _digest("Repr-Digest", digest, 32)


def repr_digest_header(sha256: str) -> str:
    """The value of ``Repr-Digest`` (RFC 9530).

    :param sha256: hex.

    >>> repr_digest_header("00" * 32)
    'sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:'
    """
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def _digest(header: str, text: str, length: int) -> bytes:
    padding = "=" * (-len(text) % 4)  # RFC 8941 section 4.2.7: missing padding is accepted
    try:
        digest = base64.b64decode(text + padding, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != length:
        raise BadRequest(f"{header} has no base64 of {length} bytes")
    return digest
