# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lower limit for this kind of server: a function that opens a file, hands it to gunicorn, and does nothing else.

It answers ``GET`` with one range or a condition, and ``PUT``, below the folder that ``BENCH_FILES`` names. With
``BENCH_FSYNC``, a file is synced before the answer is sent. It checks nothing and counts nothing, so it must not be
used as a server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

FOLDER = os.environ.get("BENCH_FILES", ".")
FSYNC = bool(os.environ.get("BENCH_FSYNC"))
BLOCK = 256 * 1024  # bytes


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The WSGI application."""
    path = FOLDER + environ["PATH_INFO"]
    answer = put if environ["REQUEST_METHOD"] == "PUT" else get
    return answer(path, environ, start_response)


def get(path: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Send a file, or a range of it."""
    if "HTTP_IF_NONE_MATCH" in environ:
        start_response("304 Not Modified", [("ETag", environ["HTTP_IF_NONE_MATCH"])])
        return []
    file = open(path, "rb")  # noqa: SIM115  (the server closes it)
    size = os.fstat(file.fileno()).st_size
    first, last = byte_range(environ.get("HTTP_RANGE"), size)
    file.seek(first)
    headers = [
        ("Content-Type", "application/octet-stream"),
        ("Content-Length", str(last - first + 1)),
        ("Content-Range", f"bytes {first}-{last}/{size}"),
        ("ETag", f'"{size}"'),
    ]
    start_response("206 Partial Content" if "HTTP_RANGE" in environ else "200 OK", headers)
    body: Iterable[bytes] = environ["wsgi.file_wrapper"](file, BLOCK)
    return body


def byte_range(header: str | None, size: int) -> tuple[int, int]:
    """The offsets of the first and the last byte.

    >>> byte_range("bytes=10-19", 100), byte_range(None, 100)
    ((10, 19), (0, 99))
    """
    if header is None:
        return 0, size - 1
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first), int(last)


def put(path: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Store the body, under a temporary name at first."""
    body, temporary = environ["wsgi.input"], path + ".new"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(temporary, "wb", buffering=0) as file:
        while block := body.read(BLOCK):
            file.write(block)
        if FSYNC:
            os.fsync(file.fileno())
    os.rename(temporary, path)
    if FSYNC:
        fsync_folder(os.path.dirname(path))
    start_response("201 Created", [("Content-Length", "0")])
    return []


def fsync_folder(path: str) -> None:
    """Sync a folder, so that the names in it are on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
