# SPDX-License-Identifier: LGPL-2.1-or-later
"""Media types of files, and whether a browser may show them. Pure.

The table is the project's own rather than the system's ``mime.types``, so that all machines answer alike.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from kci_storage.errors import BadRequest
from kci_storage.http.answers import TOKEN

OCTET_STREAM = "application/octet-stream"
MAX_CONTENT_TYPE = 255  # characters

_PLAIN = "text/plain; charset=utf-8"
_TYPES = {
    # YAML is application/yaml by RFC 9512, but browsers offer to save that. A kernel build's YAML files are job
    # definitions and results, which people want to read in the browser, so they are sent as plain text. So are
    # System.map and lists of checksums.
    **dict.fromkeys(
        "asc c cfg conf config diff dts dtsi dtso err h its log map mbox mk patch py rst s sh sha256 sha512 "
        "txt yaml yml".split(),
        _PLAIN,
    ),
    "css": "text/css; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "htm": "text/html; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "json": "application/json",  # always UTF-8, without a charset parameter (RFC 8259)
    "jsonl": "application/x-ndjson",
    "ndjson": "application/x-ndjson",
    "pdf": "application/pdf",
    "wasm": "application/wasm",
    "xhtml": "application/xhtml+xml",
    "xml": "application/xml",  # its own declaration names the charset
    "avif": "image/avif",
    "bmp": "image/bmp",
    "gif": "image/gif",
    "ico": "image/vnd.microsoft.icon",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "png": "image/png",
    "svg": "image/svg+xml",
    "webp": "image/webp",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "ogg": "audio/ogg",
    "wav": "audio/wav",
    "webm": "video/webm",
    "otf": "font/otf",
    "ttf": "font/ttf",
    "woff": "font/woff",
    "woff2": "font/woff2",
    "7z": "application/x-7z-compressed",
    "bz2": "application/x-bzip2",
    "cpio": "application/x-cpio",
    "gz": "application/gzip",
    "lz": "application/x-lzip",
    "lz4": "application/x-lz4",
    "lzma": "application/x-lzma",
    "lzo": "application/x-lzop",
    "tar": "application/x-tar",
    "tbz2": "application/x-bzip2",
    "tgz": "application/gzip",
    "txz": "application/x-xz",
    "tzst": "application/zstd",
    "xz": "application/x-xz",
    "zip": "application/zip",
    "zst": "application/zstd",
    "deb": "application/vnd.debian.binary-package",
    "rpm": "application/x-rpm",
    **dict.fromkeys("bin dtb dtbo elf img ko".split(), OCTET_STREAM),
}

_INLINE = frozenset(
    "text/plain application/json application/pdf "
    "image/avif image/bmp image/gif image/jpeg image/png image/webp".split()
)

_READABLE = frozenset((_PLAIN, "application/json"))
_GZIP_TYPES = frozenset(("application/gzip", "application/x-gzip", OCTET_STREAM))

_QUOTED = re.compile(r'"(?:[\t !#-\[\]-~]|\\[\t -~])*"')  # section 5.6.4, ASCII only
_PARAMETER = rf"[ \t]*;(?:[ \t]*{TOKEN}=(?:{TOKEN}|{_QUOTED.pattern}))?"  # section 5.6.6
_MEDIA_TYPE = re.compile(rf"{TOKEN}/{TOKEN}(?:{_PARAMETER})*\Z")
_CHARSET = re.compile(r";[ \t]*charset=", re.IGNORECASE)

_SIMPLE_NAME = re.compile(r"[ !#$&-\[\]-~]+\Z")  # printable ASCII, without the quote, the percent and the backslash
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029/]")
_ATTR_CHAR = "!#$&+-.^_`|~"  # RFC 8187 section 3.2.1, beside letters and digits


def guess(name: str) -> str:
    """The content type of a file by its last extension, in any case.

    >>> guess("build/dmesg.LOG"), guess("dmesg.log.gz"), guess("vmlinux")
    ('text/plain; charset=utf-8', 'application/gzip', 'application/octet-stream')
    """
    _, dot, extension = name.rpartition(".")
    return _TYPES.get(extension.lower(), OCTET_STREAM) if dot else OCTET_STREAM


def normalise(content_type: str | None) -> str | None:
    """The content type that a client asks to store; a text type without a charset gets ``charset=utf-8``.

    :param content_type: the value of ``Content-Type-Upstream``.
    :returns: None: the client asks for none.
    :raises BadRequest: it is not a media type (RFC 9110 section 8.3.1) of at most 255 characters.

    >>> normalise("text/x-log"), normalise("image/png"), normalise("")
    ('text/x-log; charset=utf-8', 'image/png', None)
    """
    value = (content_type or "").strip(" \t")
    if not value:
        return None
    if len(value) > MAX_CONTENT_TYPE or _MEDIA_TYPE.match(value) is None:
        raise BadRequest("Content-Type-Upstream is no media type such as text/plain")
    return _with_charset(value)


def for_download(stored: str | None, key: str) -> str:
    """The content type to send for an object.

    :param stored: the backend's content type. Another program may have set it, so an invalid one is not used.

    >>> for_download(None, "a/boot.log"), for_download("text/html", "a/b")
    ('text/plain; charset=utf-8', 'text/html; charset=utf-8')
    """
    try:
        return normalise(stored) or guess(key)
    except BadRequest:
        return guess(key)


def for_reading(stored: str | None, key: str) -> str | None:
    """The content type of a compressed text once a browser has unpacked it (``Content-Encoding: gzip``).

    :param stored: the backend's content type, of the compressed file.
    :returns: None: it is not a ``.gz`` file, or not one of a text that a browser shows safely.

    >>> for_reading("application/gzip", "a/boot.log.gz"), for_reading(None, "a/page.html.gz")
    ('text/plain; charset=utf-8', None)
    """
    name, dot, extension = key.rpartition(".")
    if not dot or extension.lower() != "gz" or for_download(stored, key) not in _GZIP_TYPES:
        return None
    content_type = guess(name.rpartition("/")[2])
    return content_type if content_type in _READABLE else None


def disposition(key: str, content_type: str, force_attachment: bool = False) -> str:
    """The value of ``Content-Disposition`` (RFC 6266), with the base name: inline for types that are safe to show.

    A name that is not plain ASCII is sent twice: encoded (RFC 8187), and as an ASCII fallback for old clients, with
    ``_`` for each other character. So is the percent sign, which some clients decode there (RFC 6266 appendix D).

    :param content_type: with or without parameters.
    :param force_attachment: whether the user asked to save the file (``?download=1``).

    >>> disposition("build/dmesg.log", "text/plain; charset=utf-8")
    'inline; filename="dmesg.log"'
    """
    essence = content_type.partition(";")[0].strip(" \t").lower()
    kind = "inline" if essence in _INLINE and not force_attachment else "attachment"
    return f"{kind}; {_file_name(key.rpartition('/')[2] or 'download')}"


def _file_name(name: str) -> str:
    if _SIMPLE_NAME.match(name):
        return f'filename="{name}"'
    name = _UNPRINTABLE.sub("_", name)
    fallback = "".join(char if char.isascii() and char != "%" else "_" for char in name)
    escaped = fallback.replace("\\", "\\\\").replace('"', '\\"')
    return f"filename=\"{escaped}\"; filename*=UTF-8''{quote(name, safe=_ATTR_CHAR, errors='replace')}"


def _with_charset(content_type: str) -> str:
    is_text = content_type[:5].lower() == "text/"
    if is_text and not _CHARSET.search(_QUOTED.sub('""', content_type)):
        return content_type.rstrip("; \t") + "; charset=utf-8"
    return content_type
