# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's settings: the server's URL, and the token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from kci_storage.client.errors import UsageError

URL_VARIABLE = "KCI_STORAGE_URL"
TOKEN_VARIABLE = "KCI_STORAGE_TOKEN"
TOKEN_FILE = "kci-storage/token"  # below the user's configuration folder


def server_url(option: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The server's URL, without a slash at its end.

    :param option: the command line's value.
    :raises UsageError: there is none, or it is not a valid URL.

    >>> server_url("https://storage.example.com/", {})
    'https://storage.example.com'
    """
    url = option or environ.get(URL_VARIABLE, "")
    if not url:
        raise UsageError(f"which server? give --url, or set {URL_VARIABLE}")
    if not url.isprintable() or not _names_a_server(url):
        raise UsageError(f"{url!r} is no server's URL such as https://storage.example.com")
    return url.rstrip("/")


def _names_a_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    if "@" in parts.netloc or parts.query or parts.fragment:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def token(option: Path | None, environ: Mapping[str, str] = os.environ) -> str:
    """The token: from the command line's file, else from the environment, else from the user's own file.

    :param option: the command line's file.
    :raises UsageError: there is none, or a file cannot be read.
    """
    own = own_token_file(environ)
    if option is not None:
        return _checked(_read(option), str(option))
    if text := environ.get(TOKEN_VARIABLE, "").strip():
        return _checked(text, TOKEN_VARIABLE)
    if own.exists():
        return _checked(_read(own), str(own))
    raise UsageError(f"no token: give --token-file, set {TOKEN_VARIABLE}, or write it to {own}")


def own_token_file(environ: Mapping[str, str]) -> Path:
    """The path of the user's own token file (XDG Base Directory Specification)."""
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / TOKEN_FILE


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or 'not text'}") from exc


def _checked(text: str, source: str) -> str:
    """A token that is valid in a header. Error messages never show the text itself."""
    text = text.removeprefix("Bearer ")
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"{source}: not a token")
    return text
