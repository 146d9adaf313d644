# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys: the names of stored files, and the rules for them. Pure.

A key is UTF-8, relative and ``/``-separated. A key that breaks a rule is refused before any driver sees it: SDKs and
file systems resolve ``..``, listings break on control characters, and a name that is too long for the file system
would fail only after the whole body was sent.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from kci_storage.errors import BadKey

MAX_CHARACTERS = 1024
MAX_SEGMENTS = 254
MAX_SEGMENT_BYTES = 255  # in UTF-8; the longest file name that Linux takes

MAX_REMEMBERED = 4096  # paths that were found valid
MAX_REMEMBERED_LENGTH = 512  # characters of such a path, so that clients cannot fill the memory

RESERVED_KEYS = ("upload", "metrics", "robots.txt", "favicon.ico")  # routes of this server
RESERVED_FOLDERS = ("v1", ".kci")  # its other routes, and its own files
ROOT_URL = "/v1/browse/"  # the directory page of the root folder, since / is the status page

_RESERVED = "(?:{})".format(
    "|".join(
        [re.escape(key) + r"\Z" for key in RESERVED_KEYS]
        + [re.escape(folder) + r"(?:/|\Z)" for folder in RESERVED_FOLDERS]
    )
)
_SEGMENT = r"(?!\.\.?(?:/|\Z))[ -.0-\[\]-~]{1,255}"
_COMMON = re.compile(rf"(?!{_RESERVED}){_SEGMENT}(?:/{_SEGMENT}){{0,253}}\Z")  # valid, and nothing but ASCII

_DOT_SEGMENT = re.compile(r"(?<=/)\.(?:/|\Z)")
_SLASHES = re.compile(r"/{2,}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Azure and XML listings cannot hold such keys in every case, so none is stored; where there is one, it is served.
_NOT_STORABLE = re.compile("\\.(?:/|\\Z)|[\ufffe\uffff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Prefix(NamedTuple):
    """A prefix in the configuration. It covers keys by whole segments, or, with a final star, by their beginning."""

    start: str  # the beginning of the keys that it covers
    whole_segments: bool  # whether the key's segment must end where ``start`` does

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Parse a prefix of the configuration.

        >>> Prefix.parse("/builds/v6*").covers("builds/v6.12/Image"), Prefix.parse("/a/").covers("ab")
        (True, False)
        """
        if text.endswith("*"):
            return cls(text[:-1].lstrip("/"), whole_segments=False)
        segments = text.strip("/")
        return cls(segments, whole_segments=bool(segments))

    def covers(self, key: str) -> bool:
        """Whether the prefix covers the key."""
        if not key.startswith(self.start):
            return False
        return not self.whole_segments or key[len(self.start) : len(self.start) + 1] in ("", "/")

    def reaches(self, folder: str) -> bool:
        """Whether the prefix covers at least one key in the folder or in a folder below.

        :param folder: without a trailing slash; empty: the root.
        """
        inside = f"{folder}/" if folder else ""
        return self.start.startswith(inside) or self.covers(f"{inside}x")


def for_upload(path: str, filename: str) -> str:
    """The key of one file of a form.

    :param path: the form field ``path``; empty, ``/`` and ``.`` are the root.
    :param filename: the part's file name; its folders are part of the key.
    :raises BadKey: the file name is empty, or the key breaks a rule.

    >>> for_upload("/testfolder/", "local_folder//local_file")
    'testfolder/local_folder/local_file'
    """
    prefix, name = folder(path), _without_spare_slashes(filename)
    if not name:
        raise BadKey("the file name is empty")
    return check(f"{prefix}/{name}" if prefix else name)


def folder(path: str) -> str:
    """The folder of a form's field ``path``, not checked; empty: the root.

    >>> folder("/testfolder/"), folder(".")
    ('testfolder', '')
    """
    prefix = _without_spare_slashes(path)
    return "" if prefix == "." else prefix


def for_put(path_info: str) -> str:
    """The key of a request by its path: the path without its leading slash.

    A driver's guard refuses an upload to a key that can only be read.

    :param path_info: ``PATH_INFO``, see :func:`from_path_info`.
    :raises BadKey: it breaks a rule, such as by an empty segment, also at the end.

    >>> for_put("/folder/file.txt")
    'folder/file.txt'
    """
    return (_for_put_remembered if len(path_info) <= MAX_REMEMBERED_LENGTH else _for_put)(path_info)


def _for_put(path_info: str) -> str:
    return check_readable(from_path_info(path_info))


_for_put_remembered = functools.lru_cache(MAX_REMEMBERED)(_for_put)


def from_path_info(path_info: str) -> str:
    r"""The key that a request path names, without its leading slash. It is **not** checked: see :func:`is_valid`.

    :param path_info: ``PATH_INFO`` as WSGI gives it: the percent-decoded bytes, decoded as Latin-1 (PEP 3333).
    :raises BadKey: those bytes are not UTF-8.

    >>> from_path_info("/\xe6\x96\x87.txt")
    '文.txt'
    """
    if not path_info.isascii():
        path_info = _utf8(path_info)
    return path_info.removeprefix("/")


def without_dot_segments(path_info: str) -> str:
    """A request path without its segments ``.`` (RFC 3986, 6.2.2.3). Segments ``..`` stay, and are refused.

    >>> without_dot_segments("/./a/././b"), without_dot_segments("/a/."), without_dot_segments("/a/../b.")
    ('/a/b', '/a/', '/a/../b.')
    """
    return _DOT_SEGMENT.sub("", path_info)


def folded(path_info: str) -> str | None:
    """The key that a request path names once its doubled slashes are single; None: it has none, or names no key.

    >>> folded("/a//b"), folded("/a/b"), folded("//metrics"), folded("/a//")
    ('a/b', None, None, None)
    """
    if "//" not in path_info:
        return None
    try:
        return for_put(_SLASHES.sub("/", path_info))
    except BadKey:
        return None


def check(key: str) -> str:
    """Return the key if an object may be stored under it.

    :raises BadKey: it breaks a rule; the message says which one.

    >>> check("folder/file.txt")
    'folder/file.txt'
    """
    if found := _NOT_STORABLE.search(check_readable(key)):
        raise BadKey(_not_storable(key, found))
    return key


def check_readable(key: str) -> str:
    """Return the key if an object under it is served, listed and deleted.

    :raises BadKey: it breaks a rule; the message says which one.
    """
    fault = _fault(key)
    if fault is not None:
        raise BadKey(fault)
    return key


def is_valid(key: str) -> bool:
    """Whether an object under the key is served, listed and deleted.

    This is called for every download, so a key of plain ASCII costs one match of a compiled pattern (about a
    microsecond); only other keys are checked rule by rule.

    >>> is_valid("folder/file.txt"), is_valid("folder/../file.txt")
    (True, False)
    """
    return _fault(key) is None


def _without_spare_slashes(path: str) -> str:
    return "/".join(segment for segment in path.split("/") if segment)


def _utf8(path_info: str) -> str:
    try:
        return path_info.encode("latin-1").decode("utf-8")
    except UnicodeError as exc:
        raise BadKey("the path is not UTF-8") from exc


def _fault(key: str) -> str | None:
    """The first rule that a key breaks, as a message; None: it is valid."""
    if len(key) <= MAX_CHARACTERS and _COMMON.match(key):
        return None
    return next(_faults(key), None)


def _faults(key: str) -> Iterator[str]:
    """The rules that a key breaks, one message each; the cheap limits first, which bound the cost of the rest."""
    if not key:
        yield "the key is empty"
    if len(key) > MAX_CHARACTERS:
        yield f"the key has {len(key)} characters, more than {MAX_CHARACTERS}"
    segments = key.split("/")
    if len(segments) > MAX_SEGMENTS:
        yield f"the key has {len(segments)} segments, more than {MAX_SEGMENTS}"
    for segment in segments:
        yield from _segment_faults(segment)
    if key in RESERVED_KEYS or segments[0] in RESERVED_FOLDERS:
        yield f"the key is reserved for the server: {_quote(key)}"


def _segment_faults(segment: str) -> Iterator[str]:
    if not segment:
        yield "the key has an empty segment: a leading, trailing or doubled slash"
    if segment in (".", ".."):
        yield f"the key has the segment {_quote(segment)}"
    if _CONTROL.search(segment):
        yield f"the key has a control character: {_quote(segment)}"
    if "\\" in segment:
        yield f"the key has a backslash: {_quote(segment)}"
    if _SURROGATE.search(segment):
        yield f"the key is not UTF-8: {_quote(segment)}"
    elif len(segment.encode()) > MAX_SEGMENT_BYTES:
        yield f"the key has a segment of more than {MAX_SEGMENT_BYTES} bytes: {_quote(segment)}"


def _not_storable(key: str, found: re.Match[str]) -> str:
    if found[0].startswith("."):
        segment = key[: found.start() + 1].rpartition("/")[2]
        return f"the key has a segment that ends in a dot: {_quote(segment)}"
    return f"the key has U+{ord(found[0]):04X}, which is no character"


def _quote(text: str) -> str:
    """A key as it is shown in a message: short, on one line, without raw control characters."""
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
