# SPDX-License-Identifier: LGPL-2.1-or-later
"""Predicates on single values of the configuration."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from urllib.parse import urlsplit

from kci_storage.config import ages
from kci_storage.http.networks import parse_subnet

MAX_SOCKET_PATH = 107  # bytes: sockaddr_un.sun_path without its closing NUL (unix(7))


def split_bind(bind: str) -> tuple[str, int] | None:
    """Host and port of ``host:port`` or ``[v6]:port``; None for anything else, ``unix:path`` too.

    >>> split_bind("127.0.0.1:3000")
    ('127.0.0.1', 3000)
    >>> split_bind("[::1]:3000")
    ('::1', 3000)
    >>> split_bind("unix:/run/kci-storage.sock") is None
    True
    """
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]/\s]+)):([0-9]{1,5})", bind)
    if not match or not 1 <= int(match[3]) <= 65535 or (match[1] and not _is_ipv6(match[1])):
        return None
    return match[1] or match[2], int(match[3])


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def is_bind(bind: str) -> bool:
    """Whether gunicorn can listen there: ``host:port``, or ``unix:`` and a path."""
    return split_bind(bind) is not None or (bind.startswith("unix:") and len(bind) > len("unix:"))


def is_location(path: str) -> bool:
    """Whether it is an internal location of nginx such as ``/_cache/``, or empty."""
    return not path or re.fullmatch(r"/(?:[A-Za-z0-9._~-]+/)+", path) is not None


def is_cache_control(value: str) -> bool:
    """Whether it is a value of ``Cache-Control`` (RFC 9111, section 5.2)."""
    directive = r"[A-Za-z-]+(?:=(?:[0-9A-Za-z-]+|\"[0-9A-Za-z, -]*\"))?"
    return re.fullmatch(rf"{directive}(?:, *{directive})*", value) is not None


def is_base64(key: str) -> bool:
    """Whether it is Base64 (RFC 4648, section 4)."""
    try:
        base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def is_account(name: str) -> bool:
    """Whether it is a valid name of a storage account, or empty."""
    return not name or re.fullmatch(r"[a-z0-9]{3,24}", name) is not None


def is_container(name: str) -> bool:
    """Whether it is a valid name of a container, or empty."""
    return not name or re.fullmatch(r"\$root|\$web|(?=.{3,63}$)[a-z0-9]+(?:-[a-z0-9]+)*", name) is not None


def is_sas_token(token: str) -> bool:
    """Whether it is a query with a signature, or empty."""
    return not token or re.search(r"(?:^\??|&)sig=[^&]", token) is not None


def is_service_url(url: str) -> bool:
    """Whether it is the address of a service, without credentials, or empty."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return not url or bool(usable and not parts.query and not parts.fragment and not parts.username)


def is_tag_policy(text: str) -> bool:
    """Whether it says what becomes of uploads whose tags are refused."""
    return text in ("required", "best effort")


def is_verify(text: str) -> bool:
    """Whether it says whose digests bind."""
    return text in ("own", "all")


AGE_TEXT = "nothing or an age such as 30d, 6m or 2y"


def is_age_or_none(text: str) -> bool:
    """Whether it is an age such as ``30d``, or empty."""
    return not text or ages.is_age(text)


def is_retention_key(text: str) -> bool:
    """Whether it is a valid name of the tag that holds an age."""
    return ages.is_tag_key(text) and text != ages.OWNER


def is_given(value: str) -> bool:
    """Whether it is not empty."""
    return bool(value)


def is_long_secret(secret: str) -> bool:
    """Whether it has at least 32 characters, or is empty."""
    return not secret or len(secret) >= 32


def is_subnet(text: str) -> bool:
    """Whether it is a network in CIDR notation, or an address."""
    return parse_subnet(text) is not None
