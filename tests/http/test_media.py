# SPDX-License-Identifier: LGPL-2.1-or-later
"""Types by name, types that uploaders may choose, and the values of Content-Disposition."""

from __future__ import annotations

from email.message import EmailMessage
from email.policy import HTTP
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.http import parse_options_header

from kci_storage.errors import BadRequest
from kci_storage.http import media

PLAIN = "text/plain; charset=utf-8"
OCTETS = "application/octet-stream"

# Every extension that the contract names, and what is particular about names.
TYPES = {
    "a.log": PLAIN,
    "a.txt": PLAIN,
    "a.config": PLAIN,
    "a.cfg": PLAIN,
    "a.dts": PLAIN,
    "a.patch": PLAIN,
    "a.diff": PLAIN,
    "a.mbox": PLAIN,
    "a.yaml": PLAIN,
    "a.yml": PLAIN,
    "System.map": PLAIN,
    "a.json": "application/json",
    "a.xml": "application/xml",
    "a.html": "text/html; charset=utf-8",
    "a.htm": "text/html; charset=utf-8",
    "a.css": "text/css; charset=utf-8",
    "a.csv": "text/csv; charset=utf-8",
    "a.js": "text/javascript; charset=utf-8",
    "a.md": "text/markdown; charset=utf-8",
    "a.svg": "image/svg+xml",
    "a.png": "image/png",
    "a.jpg": "image/jpeg",
    "a.jpeg": "image/jpeg",
    "a.gif": "image/gif",
    "a.webp": "image/webp",
    "a.pdf": "application/pdf",
    "a.wasm": "application/wasm",
    "a.gz": "application/gzip",
    "a.tgz": "application/gzip",
    "a.xz": "application/x-xz",
    "a.txz": "application/x-xz",
    "a.zst": "application/zstd",
    "a.tzst": "application/zstd",
    "a.bz2": "application/x-bzip2",
    "a.lz4": "application/x-lz4",
    "a.lz": "application/x-lzip",
    "a.tar": "application/x-tar",
    "a.zip": "application/zip",
    "a.cpio": "application/x-cpio",
    "a.deb": "application/vnd.debian.binary-package",
    "a.rpm": "application/x-rpm",
    "a.dtb": OCTETS,
    "a.dtbo": OCTETS,
    "a.ko": OCTETS,
    "a.img": OCTETS,
    "a.bin": OCTETS,
    "a.elf": OCTETS,
    # the last extension first
    "a.log.gz": "application/gzip",
    "a.tar.xz": "application/x-xz",
    "a.gz.log": PLAIN,
    "modules-6.1.txt.old": OCTETS,
    # case-insensitive
    "A.LOG": PLAIN,
    "a.JSon": "application/json",
    # of the base name alone
    "folder.txt/file": OCTETS,
    "folder.txt/a.png": "image/png",
    # a name that is nothing but an extension
    ".config": PLAIN,
    "build/.config": PLAIN,
    # anything else
    "": OCTETS,
    "vmlinux": OCTETS,
    "bzImage": OCTETS,
    "log": OCTETS,
    "a.": OCTETS,
    "a..": OCTETS,
    "a.unknown": OCTETS,
    "a.log ": OCTETS,
    "a.文": OCTETS,
    "文.log": PLAIN,
}


@pytest.mark.parametrize(("name", "content_type"), TYPES.items())
def test_type_by_extension(name: str, content_type: str) -> None:
    assert media.guess(name) == content_type


def test_every_type_of_the_table_is_one_that_an_uploader_could_ask_for() -> None:
    for content_type in set(media._TYPES.values()):
        assert media.normalise(content_type) == content_type  # so text types carry their charset


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        (None, None),
        ("", None),
        ("  \t", None),
        ("image/png", "image/png"),
        (" image/png ", "image/png"),
        ("application/x-Foo+json", "application/x-Foo+json"),
        ("application/json", "application/json"),
        ("text/plain", PLAIN),
        ("Text/X-Log", "Text/X-Log; charset=utf-8"),
        ("text/plain;", PLAIN),
        ("text/plain ;", PLAIN),
        ("text/plain; format=flowed", "text/plain; format=flowed; charset=utf-8"),
        ("text/plain;charset=iso-8859-1", "text/plain;charset=iso-8859-1"),
        ("text/plain; CharSet=utf-8", "text/plain; CharSet=utf-8"),
        ('text/plain; charset="utf-8"', 'text/plain; charset="utf-8"'),
        ("text/plain; xcharset=x", "text/plain; xcharset=x; charset=utf-8"),
        ('text/plain; a="; charset=x"', 'text/plain; a="; charset=x"; charset=utf-8'),
        ('application/x; a="q\\"uoted; text"', 'application/x; a="q\\"uoted; text"'),
        ("a/" + "b" * 253, "a/" + "b" * 253),
    ],
)
def test_type_that_an_uploader_asks_for(asked: str | None, stored: str | None) -> None:
    assert media.normalise(asked) == stored


MALFORMED = {
    "no subtype": "text",
    "empty subtype": "text/",
    "empty type": "/plain",
    "two slashes": "text/plain/x",
    "space inside": "text / plain",
    "list": "text/plain, text/html",
    "list of ranges": "*/*, a/b",
    "line feed": "text/plain\nX-Evil: 1",
    "line feed at the end": "text/plain\n",
    "carriage return": "text/plain\r\nX-Evil: 1",
    "NUL": "text/plain\0",
    "control in quotes": 'text/plain; a="\x01"',
    "line feed in quotes": 'text/plain; a="\n"',
    "escaped line feed": 'text/plain; a="\\\n"',
    "DEL": 'text/plain; a="\x7f"',
    "non-ASCII": "text/plän",
    "non-ASCII in quotes": 'text/plain; a="ä"',
    "unterminated quotes": 'text/plain; a="b',
    "parameter without a value": "text/plain; a",
    "parameter with an empty value": "text/plain; a=",
    "256 characters": "a/" + "b" * 254,
    "many blanks": "a/b" + "; " * 120 + "x",
    "very long": "a/b" + "; " * 1_000_000,
}


@pytest.mark.parametrize("asked", MALFORMED.values(), ids=MALFORMED.keys())
def test_type_that_is_none_is_a_bad_request(asked: str) -> None:
    with pytest.raises(BadRequest, match="media type") as caught:
        media.normalise(asked)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("stored", "key", "sent"),
    [
        (None, "a/b.log", PLAIN),
        ("", "a/b.log", PLAIN),
        ("text/plain", "a/b", PLAIN),
        ("image/png", "a/b.log", "image/png"),
        ("from another program\r\n", "a/b.log", PLAIN),
    ],
)
def test_type_that_is_sent(stored: str | None, key: str, sent: str) -> None:
    assert media.for_download(stored, key) == sent


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        PLAIN,
        "TEXT/Plain ; charset=x",
        "application/json",
        "application/pdf",
        "image/png",
        "image/jpeg",
        "image/gif",
        "image/webp",
        "image/avif",
        "image/bmp",
    ],
)
def test_what_a_browser_shows_safely_is_inline_unless_it_is_to_be_saved(content_type: str) -> None:
    assert media.disposition("a/b", content_type) == 'inline; filename="b"'
    assert media.disposition("a/b", content_type, force_attachment=True) == 'attachment; filename="b"'


@pytest.mark.parametrize(
    "content_type",
    [
        "text/html",
        "text/html; charset=utf-8",
        "application/xhtml+xml",
        "image/svg+xml",
        "application/xml",
        "text/xml",
        "text/css",
        "text/javascript",
        "text/plainx",
        "application/octet-stream",
        "application/gzip",
        "multipart/x-mixed-replace",
        "text/html; x=text/plain",
        "",
    ],
)
def test_everything_else_is_an_attachment(content_type: str) -> None:
    assert media.disposition("a/b", content_type) == 'attachment; filename="b"'


@pytest.mark.parametrize(
    ("key", "parameters"),
    [
        ("b.log", 'filename="b.log"'),
        ("a/b c.log", 'filename="b c.log"'),
        ("a/b;c,d='e.log", 'filename="b;c,d=\'e.log"'),
        ('a/"b".log', 'filename="\\"b\\".log"; filename*=UTF-8\'\'%22b%22.log'),
        ("a\\b", "filename=\"a\\\\b\"; filename*=UTF-8''a%5Cb"),
        ("50%41", "filename=\"50_41\"; filename*=UTF-8''50%2541"),
        ("文", "filename=\"_\"; filename*=UTF-8''%E6%96%87"),
        ("文/日志.log", "filename=\"__.log\"; filename*=UTF-8''%E6%97%A5%E5%BF%97.log"),
        ("é", "filename=\"_\"; filename*=UTF-8''%C3%A9"),
        ("é'*(1).txt", "filename=\"_'*(1).txt\"; filename*=UTF-8''%C3%A9%27%2A%281%29.txt"),
        ("／", "filename=\"_\"; filename*=UTF-8''%EF%BC%8F"),  # folds to a slash
        ("a\r\nSet-Cookie: b", "filename=\"a__Set-Cookie: b\"; filename*=UTF-8''a__Set-Cookie%3A%20b"),
        ("a\n", "filename=\"a_\"; filename*=UTF-8''a_"),
        ("a\0\x85b", "filename=\"a__b\"; filename*=UTF-8''a__b"),
        ("a\ud800", "filename=\"a_\"; filename*=UTF-8''a%3F"),
        ("", 'filename="download"'),
        ("a/", 'filename="download"'),
    ],
)
def test_name_is_the_base_name_encoded_where_it_must_be(key: str, parameters: str) -> None:
    assert media.disposition(key, OCTETS) == f"attachment; {parameters}"


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda name: "/" not in name
)


@given(NAMES)
def test_any_name_is_one_header_line_and_read_back(name: str) -> None:
    header = media.disposition(f"folder/{name}", OCTETS)
    assert header.isascii() and header.isprintable()
    expected = media._UNPRINTABLE.sub("_", name)
    assert _extended_or_plain(header) == expected
    assert parse_options_header(header)[1]["filename"] == expected


def _extended_or_plain(header: str) -> str:
    """The name by RFC 6266 section 4.3, read with the standard library."""
    _, star, extended = header.partition("filename*=UTF-8''")
    if star:
        return unquote(extended, errors="strict")
    message = EmailMessage(policy=HTTP)
    message["Content-Disposition"] = header
    return message["Content-Disposition"].params["filename"]
