# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules for keys: one row for each sentence of them, and the fast path compared with the rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kci_storage import keys
from kci_storage.errors import BadKey

UPLOADS = [
    # form field path, file name, key
    ("testfolder", "local_folder/local_file", "testfolder/local_folder/local_file"),
    ("a/b", "c", "a/b/c"),
    ("", "file", "file"),
    ("/", "file", "file"),
    (".", "file", "file"),
    ("//", "file", "file"),
    ("./", "file", "file"),
    ("/./", "file", "file"),
    ("/a/", "file", "a/file"),
    ("a//b", "file", "a/b/file"),
    ("///a///b///", "///c///d///", "a/b/c/d"),
    ("a", "/file", "a/file"),
    ("a", "folder/", "a/folder"),
    ("a b", "c d.txt", "a b/c d.txt"),
    ("文件", "日志.log", "文件/日志.log"),
    ("a", "...b", "a/...b"),
    ("a", ".hidden", "a/.hidden"),
    ("a", "..name", "a/..name"),
    ("a", "%2e%2e", "a/%2e%2e"),  # was decoded by the form's parser, or is meant so
    ("upload", "x", "upload/x"),
    ("metrics", "x", "metrics/x"),
    ("a", "v1", "a/v1"),
    ("a", "robots.txt", "a/robots.txt"),
    ("a/.kci", "x", "a/.kci/x"),
]


@pytest.mark.parametrize(("path", "filename", "key"), UPLOADS)
def test_upload_key_is_path_and_file_name_without_spare_slashes(path: str, filename: str, key: str) -> None:
    assert keys.for_upload(path, filename) == key


@pytest.mark.parametrize(
    ("path", "filename", "rule"),
    [
        ("a", "", "file name is empty"),
        ("a", "/", "file name is empty"),
        ("", "", "file name is empty"),
        ("a", ".", "segment '.'"),
        ("", ".", "segment '.'"),
        ("", "./file", "segment '.'"),
        ("a/.", "file", "segment '.'"),
        ("./a", "file", "segment '.'"),
        ("..", "file", "segment '..'"),
        ("a", "../../etc/passwd", "segment '..'"),
        ("a/../b", "file", "segment '..'"),
        ("", "upload", "reserved"),
        ("v1", "file", "reserved"),
        ("/v1/", "file", "reserved"),
        ("", ".kci/file", "reserved"),
        ("a", "C:\\Users\\x", "backslash"),
        ("a\n", "file", "control character"),
    ],
)
def test_upload_key_that_breaks_a_rule_is_refused(path: str, filename: str, rule: str) -> None:
    with pytest.raises(BadKey, match=rule):
        keys.for_upload(path, filename)


GOOD = {
    "one character": "a",
    "folders": "a/b/c.txt",
    "space": "a b/ c ",
    "every printable": "".join(map(chr, range(0x20, 0x7F))).replace("\\", "").replace("/", "") + "/x",
    "dots in names": "..a/a..a/...a/a.b",
    "non-ASCII": "文/é/😀",
    "no-break space": "a\xa0b",
    "line separator": "a\u2028b",  # no control character by Unicode, and no line feed
    "reserved in another case": "Upload",
    "below upload": "upload/file",
    "below metrics": "metrics/file",
    "longer than upload": "uploads",
    "longer than v1": "v10/file",
    "shorter than v1": "v",
    "v1 further in": "a/v1/b",
    ".kci further in": "a/.kci",
    "longer than .kci": ".kcix/a",
    "1,024 characters": "/".join(["x" * 204] * 5),
    "1,024 characters that are not ASCII": ("é" * 63 + "/") * 15 + "é" * 64,
    "254 segments": "/".join(["x"] * 254),
    "255 bytes": "x" * 255,
    "255 bytes in UTF-8": "文" * 85,
}

BAD = {
    "empty": ("", "the key is empty"),
    "leading slash": ("/a", "empty segment"),
    "trailing slash": ("a/", "empty segment"),
    "doubled slash": ("a//b", "empty segment"),
    "slash": ("/", "empty segment"),
    "dot": (".", r"segment '\.'"),
    "dot first": ("./a", r"segment '\.'"),
    "dot last": ("a/.", r"segment '\.'"),
    "dots": ("..", r"segment '\.\.'"),
    "dots first": ("../a", r"segment '\.\.'"),
    "dots inside": ("a/../b", r"segment '\.\.'"),
    "dots last": ("a/..", r"segment '\.\.'"),
    "dots beside non-ASCII": ("文/..", r"segment '\.\.'"),
    "backslash": ("a\\b", "backslash"),
    "lone surrogate": ("a\ud800", "not UTF-8"),
    "1,025 characters": ("/".join(["x" * 204] * 5) + "x", "1025 characters"),
    "255 segments": ("/".join(["x"] * 255), "255 segments"),
    "256 bytes": ("a/" + "x" * 256, "255 bytes"),
    "256 bytes in UTF-8": ("文" * 85 + "x", "255 bytes"),
    "upload": ("upload", "reserved"),
    "metrics": ("metrics", "reserved"),
    "robots.txt": ("robots.txt", "reserved"),
    "favicon.ico": ("favicon.ico", "reserved"),
    "v1": ("v1", "reserved"),
    "below v1": ("v1/a/b", "reserved"),
    "below v1, non-ASCII": ("v1/文", "reserved"),
    ".kci": (".kci", "reserved"),
    "below .kci": (".kci/a", "reserved"),
} | {f"control U+{code:04X}": (f"a{chr(code)}b", "control character") for code in [*range(0x20), *range(0x7F, 0xA0)]}


@pytest.mark.parametrize("key", GOOD.values(), ids=GOOD.keys())
def test_good_key_is_itself(key: str) -> None:
    assert keys.check(key) == key
    assert keys.is_valid(key)


@pytest.mark.parametrize(("key", "rule"), BAD.values(), ids=BAD.keys())
def test_bad_key_is_refused_with_one_line_that_names_the_rule(key: str, rule: str) -> None:
    assert not keys.is_valid(key)
    with pytest.raises(BadKey, match=rule) as caught:
        keys.check(key)
    message = caught.value.message
    assert message.isprintable() and len(message) < 160
    message.encode()


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("a.", r"ends in a dot: 'a\.'"),
        ("b/a./c", r"ends in a dot: 'a\.'"),
        ("...", r"ends in a dot"),
        ("文./c", r"ends in a dot"),
        ("a\ufffeb", r"U\+FFFE"),
        ("a/\uffff", r"U\+FFFF"),
    ],
)
def test_what_listings_cannot_hold_is_read_and_not_stored(key: str, rule: str) -> None:
    assert keys.is_valid(key)
    assert keys.check_readable(key) == key
    assert keys.for_put("/" + key.encode().decode("latin-1")) == key
    for store in (lambda: keys.check(key), lambda: keys.for_upload("", key)):
        with pytest.raises(BadKey, match=rule):
            store()


def test_the_table_reaches_both_limits_exactly() -> None:
    assert len(GOOD["1,024 characters"]) == keys.MAX_CHARACTERS
    assert len(GOOD["1,024 characters that are not ASCII"]) == keys.MAX_CHARACTERS
    assert len(GOOD["255 bytes in UTF-8"].encode()) == keys.MAX_SEGMENT_BYTES


@pytest.mark.parametrize(
    ("path_info", "key"),
    [
        ("/a/b.txt", "a/b.txt"),
        ("/", ""),
        ("", ""),
        ("//a", "/a"),
        ("/a/", "a/"),
        ("/" + "文/é😀".encode().decode("latin-1"), "文/é😀"),
        ("/a%20b", "a%20b"),  # the server has decoded it once
    ],
)
def test_path_info_is_decoded_as_utf_8_and_loses_one_slash(path_info: str, key: str) -> None:
    assert keys.from_path_info(path_info) == key


NOT_UTF_8 = {
    "Latin-1": b"\xe9",
    "cut off": b"\xe6\x96",
    "overlong slash": b"\xc0\xaf",
    "overlong dot": b"\xc0\xae",
    "surrogate": b"\xed\xa0\x80",
    "beyond Unicode": b"\xf4\x90\x80\x80",
    "lone continuation": b"\x80",
}


@pytest.mark.parametrize("raw", NOT_UTF_8.values(), ids=NOT_UTF_8.keys())
@pytest.mark.parametrize("read", [keys.from_path_info, keys.for_put])
def test_path_info_that_is_not_utf_8_is_a_bad_key(read, raw: bytes) -> None:
    with pytest.raises(BadKey, match="not UTF-8"):
        read("/" + raw.decode("latin-1"))


def test_path_info_that_is_no_wsgi_string_is_a_bad_key() -> None:
    with pytest.raises(BadKey, match="not UTF-8"):
        keys.from_path_info("/文")


def test_put_takes_the_path_as_it_stands() -> None:
    assert keys.for_put("/a/b c") == "a/b c"


@pytest.mark.parametrize("path_info", ["", "/", "//a", "/a/", "/a//b", "/./a", "/a/..", "/upload", "/v1/x", "/a\0"])
def test_put_drops_nothing_and_refuses_instead(path_info: str) -> None:
    with pytest.raises(BadKey):
        keys.for_put(path_info)


# Texts that keys are likely to go wrong with, joined at random.
PIECES = st.sampled_from(
    [
        "/",
        "//",
        ".",
        "..",
        "a",
        "a.",
        "\ufffe",
        "v1",
        ".kci",
        "upload",
        "metrics",
        "\\",
        "\0",
        "\n",
        "\x85",
        "\ud800",
        "文",
        "é",
    ]
    + ["x" * 127, "x" * 254, "文" * 84, "/x" * 126, "/x" * 250]
)


@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=40))
def test_fast_path_agrees_with_the_rules(key: str) -> None:
    assert keys.is_valid(key) == (not list(keys._faults(key)))


@given(st.lists(PIECES, max_size=12).map("".join), st.lists(PIECES, max_size=4).map("".join))
def test_upload_key_is_valid_or_refused(path: str, filename: str) -> None:
    try:
        key = keys.for_upload(path, filename)
    except BadKey as refusal:
        assert refusal.message.isprintable()
    else:
        assert keys.is_valid(key)


@given(st.binary(max_size=40))
def test_any_bytes_of_a_path_are_decoded_exactly_or_refused(raw: bytes) -> None:
    try:
        key = keys.from_path_info("/" + raw.decode("latin-1"))
    except BadKey:
        with pytest.raises(UnicodeDecodeError):
            raw.decode()
    else:
        assert key.encode() == raw


@pytest.mark.parametrize("key", ["a/" * 5_000_000, "." * 10_000_000, "a/.." * 255, "x" * 1025], ids=len)
def test_hostile_length_is_refused(key: str) -> None:
    assert not keys.is_valid(key)  # at once: a pattern that backtracks would run into the suite's time limit
