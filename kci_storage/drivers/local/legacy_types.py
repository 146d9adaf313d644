# SPDX-License-Identifier: LGPL-2.1-or-later
"""Content types that an earlier storage server of KernelCI recorded for the files of its local driver.

A file may have a side file ``.metadata/<SHA-512 of its key, in hex>.headers`` with lines ``name:value``. Side files
are read and never written: an upload through this server has a record of its own, which takes precedence. The folder
``.metadata`` is hidden, since the lines also name the uploaders.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = ".metadata"
LONGEST = 64 * 1024  # bytes of a side file that are read; it usually has a few hundred


def is_hidden(path: str) -> bool:
    """Whether a key, or a folder's path with its closing slash, lies in the folder of side files.

    >>> is_hidden(".metadata/ab.headers"), is_hidden(".metadata/")
    (True, True)
    >>> is_hidden(".metadata.txt"), is_hidden("a/.metadata/b")
    (False, False)
    """
    return path.startswith(f"{FOLDER}/")


def content_type(root: Path, key: str) -> str | None:
    """The content type recorded for a key; None: there is none, or it cannot be read.

    :param root: the folder of the objects.
    """
    name = hashlib.sha512(key.encode()).hexdigest()
    try:
        with (root / FOLDER / f"{name}.headers").open("rb") as file:
            return parse(file.read(LONGEST))
    except OSError:
        return None


def parse(headers: bytes) -> str | None:
    r"""The value of the last line ``content-type``.

    >>> parse(b"Content-Type: text/plain \ntag-owner:me@example.com\n")
    'text/plain'
    >>> parse(b"content-type:\xff") is parse(b"") is None
    True
    """
    try:
        lines = [line.partition(":") for line in headers.decode("ascii").splitlines()]
    except UnicodeDecodeError:
        return None
    found = [value.strip() for name, _, value in lines if name.strip().lower() == "content-type"]
    return found[-1] if found and found[-1] else None
