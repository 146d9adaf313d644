"""What an earlier storage server of KernelCI wrote beside the files of its local driver: their content types.

Each file may have one ``.metadata/<SHA-512 of its key, in hex>.headers``, of lines ``name:value``. They are read and
never written: an upload through this server has a record of its own, which counts before them. All of ``.metadata``
is hidden, since the lines say who uploaded what, too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = ".metadata"
LONGEST = 64 * 1024  # bytes; a file has some hundred


def is_hidden(path: str) -> bool:
    """Whether a key, or a folder's path with its closing slash, lies in the folder of side files.

    >>> is_hidden(".metadata/ab.headers"), is_hidden(".metadata/")
    (True, True)
    >>> is_hidden(".metadata.txt"), is_hidden("a/.metadata/b")
    (False, False)
    """
    return path.startswith(f"{FOLDER}/")


def content_type(root: Path, key: str) -> str | None:
    """The content type that was recorded for a key; None: there is none, or it cannot be read.

    :param root: the folder of the objects.
    """
    name = hashlib.sha512(key.encode()).hexdigest()
    try:
        with (root / FOLDER / f"{name}.headers").open("rb") as file:
            return parse(file.read(LONGEST))
    except OSError:
        return None


def parse(headers: bytes) -> str | None:
    """The value of the last line ``content-type``.

    >>> parse(b"Content-Type: text/plain \\ntag-owner:me@example.com\\n")
    'text/plain'
    >>> parse(b"content-type:\\xff") is parse(b"") is None
    True
    """
    try:
        lines = [line.partition(":") for line in headers.decode("ascii").splitlines()]
    except UnicodeDecodeError:
        return None
    found = [value.strip() for name, _, value in lines if name.strip().lower() == "content-type"]
    return found[-1] if found and found[-1] else None
