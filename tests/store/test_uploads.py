# SPDX-License-Identifier: LGPL-2.1-or-later
"""Uploads over HTTP, by form and by PUT, and deletions: section 2.1 and 2.4 of what the server promises."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import psutil
import pytest
import requests

from kci_storage.errors import BadForm
from kci_storage.http import multipart
from tests.support.harness import Server, running, wait_until
from tests.support.wire import (
    BOUNDARY,
    FORM_TYPE,
    SECONDS,
    Wire,
    assert_error,
    form,
    get,
    keys,
    new_folder,
    part,
    post,
    post_body,
    put,
    request,
    wait_until_tidy,
)

MIB = 1 << 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(response: requests.Response) -> list[dict[str, Any]]:
    """The files in the response to a successful form."""
    assert response.status_code == 200, response.text
    return response.json()["files"]


# Forms that are stored


FIELDS = {
    "path": lambda folder: part("path", folder.encode()),
    "file0": lambda folder: part("file0", b"first", "first.txt"),
    "file1": lambda folder: part("file1", b"second", "sub/second.bin"),
    "file37": lambda folder: part("file37", b"", "empty"),
    "unknown field": lambda folder: part("comment", b"\r\n--" + BOUNDARY.encode()[:-1]),
    "unknown file": lambda folder: part("attachment", b"not stored", "attachment"),
}
CONTENT = {"file0": ("first.txt", b"first"), "file1": ("sub/second.bin", b"second"), "file37": ("empty", b"")}


@pytest.mark.parametrize(
    "order",
    [
        ("path", "file0"),
        ("file0", "path"),
        ("path", "file0", "file1", "file37"),
        ("file1", "file0", "file37", "path"),
        ("file0", "path", "file1"),
        ("unknown field", "path", "unknown file", "file1", "unknown field", "file0", "unknown file"),
        ("unknown file", "file0", "unknown field", "file37", "path", "unknown file"),
        ("file37", "unknown field", "path", "file1", "file0"),
    ],
    ids="-".join,
)
def test_every_file_is_stored_whatever_the_order(server: Server, order: tuple[str, ...]):
    folder = new_folder()
    files = stored(post(server, *(FIELDS[name](folder) for name in order)))
    expected = [CONTENT[name] for name in order if name in CONTENT]
    assert [file["path"] for file in files] == [f"{folder}/{name}" for name, _ in expected]
    assert [get(server, file["path"]).content for file in files] == [content for _, content in expected]
    assert sorted(keys(server, folder)) == sorted(file["path"] for file in files)


def test_the_reply_has_the_values_of_a_download(server: Server):
    folder, content = new_folder(), os.urandom(300_000)
    response = post(server, part("path", folder.encode()), part("file0", content, "ä b.log"))
    assert response.headers["Content-Type"] == "application/json"
    answer = get(server, f"{folder}/{quote('ä b.log')}")
    assert response.json() == {
        "files": [
            {
                "path": f"{folder}/ä b.log",
                "size": 300_000,
                "etag": answer.headers["ETag"],
                "sha256": sha256(content),
                "url": f"/{folder}/%C3%A4%20b.log",
            }
        ]
    }
    assert answer.content == content
    assert requests.get(server.url + response.json()["files"][0]["url"], timeout=SECONDS).content == content


def test_both_routes_take_forms(server: Server):
    for route in ("upload", "v1/file"):
        folder = new_folder()
        body = form(part("path", folder.encode()), part("file0", b"content", "a"))
        headers = {**server.headers(), **FORM_TYPE}
        assert requests.post(f"{server.url}/{route}", body, headers=headers, timeout=SECONDS).status_code == 200
        assert get(server, f"{folder}/a").content == b"content"


def test_an_upload_is_at_once_what_every_worker_serves(server: Server):
    """From the local copy: the first download after it is a hit."""
    key = f"{new_folder()}/a"
    for version in range(5):
        content = b"version %d" % version
        assert put(server, key, content).status_code == (201 if version == 0 else 200)
        for _ in range(8):  # each on a connection of its own, which any worker may accept
            answer = get(server, key)
            assert (answer.content, answer.headers["X-Cache"]) == (content, "hit")


def test_kernelcis_own_uploader(server: Server, tmp_path: Path):
    folder = new_folder()
    (tmp_path / "Image").write_bytes(os.urandom(70_000))
    (tmp_path / "build.log").write_text("built\n")
    with (tmp_path / "Image").open("rb") as image, (tmp_path / "build.log").open("rb") as log:
        response = requests.post(
            server.url + "/" + "upload",
            headers={"Authorization": server.token()},
            data={"path": folder},
            files={"file0": ("Image", image), "file1": ("logs/build.log", log)},
            timeout=SECONDS,
        )
    assert response.status_code == 200
    assert get(server, f"{folder}/Image").content == (tmp_path / "Image").read_bytes()
    assert get(server, f"{folder}/logs/build.log").text == "built\n"


def curl(server: Server, *arguments: str, cwd: Path) -> tuple[int, str]:
    """The status and the body of what curl got, with a token."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    authorization = f"Authorization: Bearer {server.token()}"
    command = ["curl", "-sS", "-w", "\n%{http_code}", "-H", authorization, *arguments]
    output = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=SECONDS).stdout
    body, _, status = output.rpartition("\n")
    return int(status), body


def test_curl_as_in_the_readme(server: Server, tmp_path: Path):
    folder = new_folder()
    (tmp_path / "Image").write_bytes(os.urandom(2 * MIB))  # so large that curl waits for 100 Continue
    (tmp_path / "build.log").write_text("built\n")
    form_arguments = ("-F", f"path={folder}/v6.12", "-F", "file0=@Image", "-F", "file1=@build.log")
    status, body = curl(server, *form_arguments, f"{server.url}/upload", cwd=tmp_path)
    assert status == 200
    assert [file["path"] for file in json.loads(body)["files"]] == [
        f"{folder}/v6.12/Image",
        f"{folder}/v6.12/build.log",
    ]
    assert curl(server, "-T", "Image", f"{server.url}/{folder}/put/Image", cwd=tmp_path)[0] == 201
    for key in (f"{folder}/v6.12/Image", f"{folder}/put/Image"):
        assert (
            curl(server, "-O", f"{server.url}/{key}", "--output-dir", "down", "--create-dirs", cwd=tmp_path)[0] == 200
        )
        assert (tmp_path / "down/Image").read_bytes() == (tmp_path / "Image").read_bytes()


def test_curl_cannot_resume_an_upload(server: Server, tmp_path: Path):
    """``curl -C`` sends the rest of a file: stored as a whole file, it would be a broken one."""
    key = f"{new_folder()}/a"
    put(server, key, b"01234")
    (tmp_path / "a").write_bytes(b"0123456789")
    status, body = curl(server, "-C", "5", "-T", "a", f"{server.url}/{key}", cwd=tmp_path)
    assert (status, "Content-Range" in body) == (400, True)
    assert get(server, key).content == b"01234"


def test_chunked_bodies(server: Server):
    """``requests`` sends a generator in chunks, without a Content-Length."""
    folder, content = new_folder(), os.urandom(600_000)
    pieces = (content[start : start + 70_000] for start in range(0, len(content), 70_000))
    assert put(server, f"{folder}/a", pieces).status_code == 201
    body = form(part("path", folder.encode()), part("file0", content, "b"))
    assert post_body(server, (body[start : start + 999] for start in range(0, len(body), 999))).status_code == 200
    for name in "ab":
        assert get(server, f"{folder}/{name}").content == content


def test_empty_files(server: Server):
    folder = new_folder()
    (file,) = stored(post(server, part("path", folder.encode()), part("file0", b"", "a")))
    assert (file["size"], file["sha256"]) == (0, sha256(b""))
    assert put(server, f"{folder}/b", b"").status_code == 201
    for name in "ab":
        answer = get(server, f"{folder}/{name}")
        assert (answer.status_code, answer.content, answer.headers["Content-Length"]) == (200, b"", "0")


# Forms as bytes


AWKWARD = [
    b"",
    b"\r\n",
    b"\n",
    b"\r",
    b"-",
    b"--",
    b"content\r\n",
    b"content\n\r",
    b"\r\n\r\n--\r\n",
    f"\r\n--{BOUNDARY}x\r\n".encode(),
    f"\r\n-{BOUNDARY}\r\n".encode(),
    f"x--{BOUNDARY}\r\n".encode(),
    f"\r\n--{BOUNDARY[:-1]}\r\n".encode(),
    b'\r\nContent-Disposition: form-data; name="path"\r\n\r\nelsewhere',
    b"\x00\xff" * 1000,
]


def test_content_that_looks_like_a_form(server: Server):
    folder = new_folder()
    files = [part(f"file{number}", content, f"{number}") for number, content in enumerate(AWKWARD)]
    stored(post(server, part("path", folder.encode()), *files))
    for number, content in enumerate(AWKWARD):
        assert get(server, f"{folder}/{number}").content == content


def test_a_preamble_and_an_epilogue_mean_nothing(server: Server):
    folder = new_folder()
    body = form(part("path", folder.encode()), part("file0", b"content", "a"))
    response = post_body(server, b"a preamble\r\n" + body + b"an epilogue\r\n" + part("file1", b"no", "b") * 9000)
    assert [file["path"] for file in stored(response)] == [f"{folder}/a"]
    assert keys(server, folder) == [f"{folder}/a"]


def test_a_form_need_not_end_its_last_line(server: Server):
    folder = new_folder()
    body = form(part("path", folder.encode()), part("file0", b"content", "a"))
    stored(post_body(server, body.removesuffix(b"\r\n")))
    assert get(server, f"{folder}/a").content == b"content"


class Pieces:
    """A body that arrives in these pieces."""

    def __init__(self, *pieces: bytes):
        self._pieces = [piece for piece in pieces if piece]

    def readinto(self, buffer: memoryview) -> int:
        piece = self._pieces.pop(0) if self._pieces else b""
        buffer[: len(piece)] = piece
        return len(piece)


def contents(body: Pieces, boundary: str = BOUNDARY) -> list[bytes]:
    """The contents of a form's parts."""
    parts: list[bytes] = []
    for event in multipart.form_events(body, boundary.encode(), 1 << 30):
        if isinstance(event, multipart.Part):
            parts.append(b"")
        elif event is not None:
            assert event  # an empty piece would be none
            parts[-1] += event
    return parts


@pytest.mark.parametrize("content", AWKWARD, ids=lambda content: repr(content[:40]))
def test_wherever_a_read_ends_the_content_is_the_same(content: bytes):
    body = form(part("path", b"p"), part("file0", content, "a"), part("file1", content, "b"))
    for first in range(len(body)):
        for second in (first + 1, first + 2, first + len(BOUNDARY), len(body)):
            assert contents(Pieces(body[:first], body[first:second], body[second:])) == [b"p", content, content]


def test_wherever_a_read_ends_blanks_after_a_boundary_are_no_content():
    """RFC 2046, section 5.1.1, allows them."""
    delimiter = f"--{BOUNDARY}".encode()
    body = form(part("path", b"p"), part("file0", b"content", "a")).replace(
        delimiter + b"\r\n", delimiter + b" \t\r\n"
    )
    for first in range(len(body)):
        assert contents(Pieces(body[:first], body[first:])) == [b"p", b"content"]


def test_wherever_a_read_ends_a_part_may_have_no_body():
    """RFC 2046, section 5.1.1: the empty line after the headers belongs to the next boundary."""
    empty = part("file0", b"", "a").removesuffix(b"\r\n")
    body = form(part("path", b"p"), empty, empty)
    for first in range(len(body)):
        assert contents(Pieces(body[:first], body[first:])) == [b"p", b"", b""]


def test_wherever_a_read_ends_lines_may_end_in_a_line_feed_alone():
    """Some programs write so. Then a carriage return at the content's end is content."""
    body = form(part("path", b"p"), part("file0", b"content", "a")).replace(b"\r\n", b"\n")
    body = body.replace(b"content", b"\r\ncontent\r")
    for first in range(len(body)):
        assert contents(Pieces(body[:first], body[first:])) == [b"p", b"\r\ncontent\r"]


def test_wherever_a_form_is_cut_off_it_is_refused():
    body = form(part("path", b"p"), part("file0", b"content\r\n-", "a"))
    for end in range(len(body) - len(b"\r\n")):
        with pytest.raises(BadForm):
            contents(Pieces(body[:end]))


def test_long_content_is_the_same_wherever_reads_end():
    """The end of a piece may be the beginning of a boundary, so it has to wait for the next piece."""
    almost = [f"--{BOUNDARY[:9]}".encode(), f"{BOUNDARY}x".encode()]
    fragments = [os.urandom(700), b"\r", b"\n", b"\r\n", b"-", b"--", *almost]
    chance = random.Random(6)
    for _ in range(300):
        content = b"".join(chance.choices(fragments, k=20))
        body = form(part("path", b"p"), part("file0", content, "a"), part("file1", content, "b"))
        ends = sorted(chance.choices(range(len(body)), k=chance.choice([3, 10, 40])))
        pieces = [body[start:stop] for start, stop in zip([0, *ends], [*ends, len(body)], strict=True)]
        assert contents(Pieces(*pieces)) == [b"p", content, content]


def test_a_file_of_any_size_is_stored_exactly(server: Server):
    """The server reads 256 KiB at a time: here the closing boundary lies across the end of such a read."""
    folder = new_folder()
    around = len(form(part("path", folder.encode()), part("file0", b"", "000")))
    for more in range(len(BOUNDARY) + 10):
        content = os.urandom(2 * multipart.READ_SIZE - around + more)
        (file,) = stored(post(server, part("path", folder.encode()), part("file0", content, f"{more:03}")))
        assert (file["size"], file["sha256"]) == (len(content), sha256(content))
    assert get(server, f"{folder}/{more:03}").content == content


# Forms that are refused


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([part("path", b"{folder}")], "file0"),
        (
            [part("path", b"{folder}"), part("file", b"x", "a"), part("file0x", b"x", "b"), part("xfile0", b"", "c")],
            "file0",
        ),
        ([part("path", b"{folder}"), part("file0", b"a field, no file")], "file0"),
        ([part("path", b"{folder}"), part("path", b"{folder}"), part("file0", b"content", "a")], "path"),
        (
            [part("path", b"{folder}"), part("file0", b"x", "a"), part("file1", b"y", "b"), part("file2", b"z", "a")],
            "twice",
        ),
        ([part("file0", b"x", "a"), part("file1", b"y", "/a/"), part("path", b"{folder}")], "twice"),
        ([part("file0", b"x", "b/a"), part("path", b"{folder}"), part("file0", b"y", "b//a")], "twice"),
        ([part("path", b"{folder}"), part("file0", b"x", "")], "empty"),
        ([], "file0"),
    ],
    ids=[
        "no file",
        "only files of other names",
        "a field where a file should be",
        "two paths",
        "a key twice",
        "a key twice, before the path",
        "a key twice, around the path",
        "a file without a name",
        "nothing at all",
    ],
)
def test_a_form_that_makes_no_sense_is_refused(server: Server, parts: list[bytes], says: str):
    folder = new_folder()
    body = form(*parts).replace(b"{folder}", folder.encode())
    assert_error(post_body(server, body), 400, server, says=[says])
    assert keys(server, folder) == []
    wait_until_tidy(server)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"\x00" * 300_000,
        f"--{BOUNDARY}".encode(),
        form(part("path", b"p"), part("file0", b"content", "a"))[:-4],
        form(part("path", b"p"), part("file0", b"content", "a")).replace(b"--\r\n", b"\r\n"),
        form(part("path", b"p"), part("file0", b"content", "a")).replace(b"Content-Disposition", b"Content-Nonsense"),
        form(part("path", b"p"), part("file0", b"content", "a")).replace(BOUNDARY.encode(), b"another"),
        form(part("path", b"p"), part("file0", b"content", "a", "X: " + "x" * 2 * MIB)),
        form(part("path", b"p"), *[part("x", b"")] * 10_001, part("file0", b"content", "a")),
    ],
    ids=[
        "empty",
        "no form",
        "zeros",
        "only a boundary",
        "no closing boundary",
        "another boundary at the end",
        "a part without a disposition",
        "another boundary",
        "a head of 2 MiB",
        "10,002 parts",
    ],
)
def test_a_malformed_form_is_refused(server: Server, body: bytes):
    assert_error(post_body(server, body), 400, server, says=["form"])
    wait_until_tidy(server)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/mixed; boundary=x",
        f"multipart/form-data; boundary={'x' * 201}",
        "multipart/form-data; boundary=\xff",
    ],
)
def test_a_body_of_another_type_is_refused(server: Server, content_type: str | None):
    headers = {**server.headers(), "Content-Type": content_type and content_type.encode("latin-1")}
    body = form(part("path", b"p"), part("file0", b"content", "a"))
    response = requests.post(f"{server.url}/upload", body, headers=headers, timeout=SECONDS)
    assert_error(response, 400, server, says=["multipart/form-data"])


def test_files_that_cannot_be_side_by_side(local_server: Server):
    """On a disk there is no file ``a`` beside a folder ``a``. What was stored by then is named."""
    folder = new_folder()
    put(local_server, f"{folder}/a", b"file")
    put(local_server, f"{folder}/b/c", b"file in a folder")
    assert_error(put(local_server, f"{folder}/a/b", b""), 409, local_server)
    assert_error(put(local_server, f"{folder}/b", b""), 409, local_server)
    response = post(
        local_server, part("path", folder.encode()), part("file0", b"1", "new"), part("file1", b"2", "new/under")
    )
    assert_error(response, 409, local_server, says=[f"stored before that: {folder}/new"])
    assert get(local_server, f"{folder}/new").content == b"1"
    assert sorted(keys(local_server, folder)) == [f"{folder}/{name}" for name in ("a", "b/c", "new")]
    wait_until_tidy(local_server)


# Keys


@pytest.mark.parametrize(
    ("path", "filename", "key"),
    [
        ("{folder}", "a", "{folder}/a"),
        ("/{folder}/", "/a/", "{folder}/a"),
        ("//{folder}//b///", "c//d", "{folder}/b/c/d"),
        ("", "{folder}/a", "{folder}/a"),
        ("/", "{folder}/a", "{folder}/a"),
        ("//", "/{folder}/a", "{folder}/a"),
        (".", "{folder}/a", "{folder}/a"),
        ("{folder}/with blanks", "a b", "{folder}/with blanks/a b"),
        ("{folder}", " ", "{folder}/ "),
        ("{folder}", ".hidden", "{folder}/.hidden"),
        ("{folder}", 'a\\"b', '{folder}/a"b'),
        ("{folder}", "a%22b", '{folder}/a"b'),
        ("{folder}", "a%20b%", "{folder}/a%20b%"),
        ("{folder}", "a;b=c,d&e?f#g+h", "{folder}/a;b=c,d&e?f#g+h"),
        ("{folder}/Ä", "文件 🎉.txt", "{folder}/Ä/文件 🎉.txt"),
        ("{folder}", "x" * 255, "{folder}/" + "x" * 255),
        ("{folder}", "upload", "{folder}/upload"),
        ("{folder}", "v1/x", "{folder}/v1/x"),
        ("{folder}", ".kci/x", "{folder}/.kci/x"),
        ("", "v1{folder}/x", "v1{folder}/x"),
        ("", "upload{folder}", "upload{folder}"),
    ],
)
def test_the_key_of_a_file(server: Server, path: str, filename: str, key: str):
    folder = new_folder()
    path, filename, key = (text.replace("{folder}", folder) for text in (path, filename, key))
    (file,) = stored(post(server, part("path", path.encode()), part("file0", b"content", filename)))
    assert file["path"] == key
    assert get(server, quote(key)).content == b"content"


def test_a_file_name_may_be_encoded(server: Server):
    """RFC 5987, as some clients do it although RFC 7578 says not to."""
    folder = new_folder()
    body = form(part("path", folder.encode()), part("file0", b"content", "x"))
    body = body.replace(b'filename="x"', b"filename*=UTF-8''%E6%96%87%20a.txt")
    assert [file["path"] for file in stored(post_body(server, body))] == [f"{folder}/文 a.txt"]


HOSTILE = [
    ("..", "a"),
    ("../x", "a"),
    ("x/../y", "a"),
    ("x/..", "a"),
    ("./x", "a"),
    ("x/./y", "a"),
    ("x", "../a"),
    ("x", ".."),
    ("x", "."),
    ("", "."),
    ("x", "a/../../b"),
    ("x", "a/."),
    ("x", "/"),
    ("x", ""),
    ("x\x00y", "a"),
    ("x\ny", "a"),
    ("x\x7fy", "a"),
    ("x", "a\x00"),
    ("x", "a\x01b"),
    ("x", "a\tb"),
    ("x", "a\x7f"),
    ("x", "a\x85b"),
    ("x\\y", "a"),
    ("x", "..\\a"),
    ("x", "C:\\Users\\a"),
    ("x", "a\\\\b"),
    ("x", "x" * 256),
    ("x", "文" * 86),
    ("x/" * 253 + "x", "a"),
    ("x" * 9000, "a"),
    ("x" * 250 + "/" + "y" * 250 + "/" + "z" * 250, "w" * 200 + "/" + "v" * 200),
    ("", "upload"),
    ("", "metrics"),
    ("", "robots.txt"),
    ("/", "/favicon.ico"),
    ("", "v1"),
    (".", "v1/list"),
    ("v1", "a"),
    ("v1/a/b", "c"),
    ("", ".kci"),
    (".kci", "a"),
    ("/.kci/meta/", "a"),
]


@pytest.mark.parametrize(("path", "filename"), HOSTILE, ids=repr)
def test_a_hostile_name_is_refused(server: Server, path: str, filename: str):
    before = set(keys(server, ""))
    name, file = part("path", path.encode()), part("file0", b"hostile", filename)
    for order in ((name, file), (file, name)):
        assert_error(post(server, *order), 400, server)
    assert set(keys(server, "")) == before
    wait_until_tidy(server)


@pytest.mark.parametrize("text", [b"\xff", b"a\xe9b", b"\xed\xa0\x80"], ids=repr)
def test_a_name_that_is_not_utf_8_is_refused(server: Server, text: bytes):
    assert_error(post(server, part("path", text), part("file0", b"x", "a")), 400, server, says=["UTF-8"])
    assert_error(post(server, part("path", b"x"), part("file0", b"x", text)), 400, server, says=["UTF-8"])


@pytest.mark.parametrize(
    "target", ["a//b", "a/", "/a", "a/../b", "a/./b", "%2e%2e/a", "a%00", "a%0a", "a%5cb", "%ff"]
)
def test_put_refuses_a_hostile_key(server: Server, target: str):
    before = set(keys(server, ""))
    for method in ("PUT", "DELETE"):
        with Wire(server) as wire:
            wire.send(request(method, f"/{target}", server.headers(), b"content"))
            assert_error(wire.answer(), 400, server)
    assert set(keys(server, "")) == before


@pytest.mark.parametrize("key", ["upload", "metrics", "robots.txt", "favicon.ico", "v1/x", "v1", ".kci/x", "v1/list"])
def test_put_refuses_a_reserved_key(server: Server, key: str):
    assert put(server, key, b"content").status_code in (400, 405)
    assert requests.delete(f"{server.url}/{key}", headers=server.headers(), timeout=SECONDS).status_code in (400, 405)


# Content types


@pytest.mark.parametrize(
    ("asked", "name", "sent"),
    [
        ("image/png", "a.txt", "image/png"),
        ("text/x-log", "a", "text/x-log; charset=utf-8"),
        ('text/plain; charset="iso-8859-1"', "a", 'text/plain; charset="iso-8859-1"'),
        ("", "a.json", "application/json"),
        (None, "a.log", "text/plain; charset=utf-8"),
        (None, "a.LOG.GZ", "application/gzip"),
        (None, "bzImage", "application/octet-stream"),
    ],
)
def test_the_content_type_is_as_asked_for_or_guessed(server: Server, asked: str | None, name: str, sent: str):
    folder = new_folder()
    headers = {} if asked is None else {"Content-Type-Upstream": asked}
    stored(post(server, part("path", folder.encode()), part("file0", b"x", f"by-form/{name}"), headers=headers))
    put(server, f"{folder}/by-put/{name}", b"x", **headers)
    for way in ("by-form", "by-put"):
        answer = get(server, f"{folder}/{way}/{name}")
        assert answer.headers["Content-Type"] == sent
        assert "Content-Encoding" not in answer.headers


@pytest.mark.parametrize("asked", ["nonsense", "text/", "/plain", "text/plain; charset", "x/" + "y" * 300, "a/é"])
def test_a_content_type_that_is_none_is_refused(server: Server, asked: str):
    folder, headers = new_folder(), {"Content-Type-Upstream": asked.encode("latin-1")}
    response = post(server, part("path", folder.encode()), part("file0", b"x", "a"), headers=headers)
    assert_error(response, 400, server, says=["Content-Type-Upstream"])
    assert_error(put(server, f"{folder}/a", b"x", **headers), 400, server, says=["Content-Type-Upstream"])
    assert keys(server, folder) == []


# PUT


def delete(server: Server, key: str, **headers: str) -> requests.Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.delete(f"{server.url}/{key}", headers={**server.headers(), **fields}, timeout=SECONDS)


def test_put_creates_replaces_and_delete_removes(server: Server):
    key = f"{new_folder()}/a"
    created = put(server, key, b"first")
    assert created.status_code == 201
    assert created.json()["files"][0]["path"] == key
    assert created.headers["ETag"] == created.json()["files"][0]["etag"] == get(server, key).headers["ETag"]
    replaced = put(server, key, b"second")
    assert replaced.status_code == 200
    assert replaced.headers["ETag"] == get(server, key).headers["ETag"] != created.headers["ETag"]
    assert get(server, key).content == b"second"
    removed = delete(server, key)
    assert (removed.status_code, removed.content) == (204, b"")
    for _ in range(8):
        assert get(server, key).status_code == 404
    assert_error(delete(server, key), 404, server)
    assert put(server, key, b"third").status_code == 201


def test_put_only_if_nothing_is_there(server: Server):
    key = f"{new_folder()}/a"
    assert put(server, key, b"first", If_None_Match="*").status_code == 201
    assert_error(put(server, key, b"second", If_None_Match="*"), 412, server)
    assert get(server, key).content == b"first"
    delete(server, key)
    assert put(server, key, b"third", If_None_Match="*").status_code == 201


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ({"If_Match": "{etag}"}, 200),
        ({"If_Match": '"other", {etag}'}, 200),
        ({"If_Match": "*"}, 200),
        ({"If_Match": '"other"'}, 412),
        ({"If_Match": "W/{etag}"}, 412),
        ({"If_Match": ""}, 412),
        ({"If_None_Match": "{etag}"}, 412),
        ({"If_None_Match": '"other"'}, 200),
        ({"If_Match": "{etag}", "If_None_Match": "*"}, 412),
        ({"If_Unmodified_Since": "Sun, 06 Nov 1994 08:49:37 GMT"}, 412),
        ({"If_Unmodified_Since": "Fri, 06 Nov 2099 08:49:37 GMT"}, 200),
        ({"If_Unmodified_Since": "Sun, 06 Nov 1994 08:49:37 GMT", "If_Match": "*"}, 200),
    ],
)
def test_put_and_delete_only_that_version(server: Server, condition: dict[str, str], status: int):
    key = f"{new_folder()}/a"
    etag = put(server, key, b"first").headers["ETag"]
    headers = {name: value.replace("{etag}", etag) for name, value in condition.items()}
    response = put(server, key, b"second", **headers)
    assert response.status_code == status
    assert get(server, key).content == (b"second" if status == 200 else b"first")
    headers = {name: value.replace("{etag}", get(server, key).headers["ETag"]) for name, value in condition.items()}
    assert delete(server, key, **headers).status_code == (204 if status == 200 else 412)
    assert get(server, key).status_code == (404 if status == 200 else 200)


def test_if_match_wants_something_to_be_there(server: Server):
    for condition in ("*", '"x"'):
        key = f"{new_folder()}/a"
        assert_error(put(server, key, b"content", If_Match=condition), 412, server)
        assert get(server, key).status_code == 404


CONTENT_OF_DIGESTS = b"content " * 40_000
MD5 = base64.b64encode(hashlib.md5(CONTENT_OF_DIGESTS).digest()).decode()
SHA256 = base64.b64encode(hashlib.sha256(CONTENT_OF_DIGESTS).digest()).decode()
SHA512 = base64.b64encode(hashlib.sha512(CONTENT_OF_DIGESTS).digest()).decode()
WRONG_MD5 = base64.b64encode(bytes(16)).decode()
WRONG_SHA256 = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_MD5": MD5}, 201),
        ({"Repr_Digest": f"sha-256=:{SHA256}:"}, 201),
        ({"Repr_Digest": f"sha-512=:{SHA512}:, sha-256=:{SHA256}:"}, 201),
        ({"Repr_Digest": f"sha-512=:{SHA512}:"}, 201),  # an algorithm that is not checked
        ({"Content_MD5": MD5, "Repr_Digest": f"sha-256=:{SHA256}:"}, 201),
        ({"Content_MD5": WRONG_MD5}, 400),
        ({"Repr_Digest": f"sha-256=:{WRONG_SHA256}:"}, 400),
        ({"Content_MD5": MD5, "Repr_Digest": f"sha-256=:{WRONG_SHA256}:"}, 400),
        ({"Content_MD5": WRONG_MD5, "Repr_Digest": f"sha-256=:{SHA256}:"}, 400),
        ({"Content_MD5": "nonsense"}, 400),
        ({"Content_MD5": SHA256}, 400),
        ({"Content_MD5": ""}, 400),
        ({"Repr_Digest": f"sha-256={SHA256}"}, 400),
        ({"Repr_Digest": "sha-256=:nonsense:"}, 400),
        ({"Repr_Digest": f"sha-256=:{MD5}:"}, 400),
        ({"Repr_Digest": "nonsense"}, 400),
    ],
)
def test_digests_are_verified(server: Server, headers: dict[str, str], status: int):
    key = f"{new_folder()}/a"
    response = put(server, key, CONTENT_OF_DIGESTS, **headers)
    if status == 201:
        assert (response.status_code, get(server, key).content) == (201, CONTENT_OF_DIGESTS)
    else:
        assert_error(response, 400, server)
        assert get(server, key).status_code == 404
        assert keys(server, key) == []
        wait_until_tidy(server)


# Tokens and permissions


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def forged(header: dict[str, Any], claims: dict[str, Any]) -> str:
    """A token without a signature."""
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims))
    return ".".join([*parts, "x" * 43])


UNIFIED = "another secret, of more than 32 bytes"


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with users, a second secret, a small limit for uploads, and short timeouts."""
    document = {
        "unified_secret": UNIFIED,
        "server": {"max_upload_bytes": MIB, "lock_timeout": 1},
        "users": [
            {"name": "user@example.com", "prefixes": [""]},
            {"name": "limited@example.com", "prefixes": ["/allowed/path1", "allowed/star*"]},
        ],
    }
    with running(Server(tmp_path_factory.mktemp("strict"), document)) as server:
        yield server


def test_good_tokens(strict_server: Server):
    token = strict_server.token()
    by_the_other_secret = jwt.encode({"email": "user@example.com"}, UNIFIED, algorithm="HS256")
    with_other_claims = strict_server.token(aud="somebody", iat=2**33, exp=2**33, nbf=0, sub="x")
    for authorization in (
        f"Bearer {token}", token, f"bearer {token}", f"Bearer  {token}", by_the_other_secret, with_other_claims
    ):  # fmt: skip
        headers = {"Authorization": authorization}
        response = requests.get(f"{strict_server.url}/v1/checkauth", headers=headers, timeout=SECONDS)
        assert (response.status_code, response.text) == (200, "Authorized: user@example.com")
        key = f"{new_folder()}/a"
        assert requests.put(f"{strict_server.url}/{key}", b"x", headers=headers, timeout=SECONDS).status_code == 201


def test_bad_tokens(strict_server: Server):
    claims, secret = {"email": "user@example.com"}, strict_server.secret
    good = strict_server.token()
    bad = {
        "none": None,
        "empty": "",
        "only the scheme": "Bearer",
        "only the scheme and a blank": "Bearer ",
        "another scheme": f"Basic {good}",
        "two tokens": f"Bearer {good} {good}",
        "no token": "Bearer nonsense",
        "broken": f"Bearer {good[:-2]}",
        "another secret": bearer(jwt.encode(claims, "x" * 32, algorithm="HS256"))["Authorization"],
        "HS512": jwt.encode(claims, secret, algorithm="HS512"),
        "HS384": jwt.encode(claims, secret, algorithm="HS384"),
        "alg none": jwt.encode(claims, None, algorithm="none"),
        "alg RS256": forged({"alg": "RS256", "typ": "JWT"}, claims),
        "alg nOnE": forged({"alg": "nOnE"}, claims),
        "expired": strict_server.token(exp=1),
        "not yet": strict_server.token(nbf=2**33),
        "no email": jwt.encode({"sub": "user@example.com"}, secret, algorithm="HS256"),
        "an email that is none": jwt.encode({"email": ["user@example.com"]}, secret, algorithm="HS256"),
        "huge": "x" * 8000,
    }
    for name, authorization in bad.items():
        headers = {} if authorization is None else {"Authorization": authorization}
        for method, target in (("GET", "v1/checkauth"), ("POST", "upload"), ("PUT", "x"), ("DELETE", "x")):
            response = requests.request(
                method, f"{strict_server.url}/{target}", headers={**FORM_TYPE, **headers}, timeout=SECONDS
            )
            assert (response.status_code, response.text) == (401, "Unauthorized"), name
            assert response.headers["WWW-Authenticate"] == 'Bearer realm="kci-storage"'


def test_permissions(strict_server: Server):
    url, headers = strict_server.url, strict_server.headers("limited@example.com")
    for key, allowed in {
        "allowed/path1": True,
        "allowed/path1x": False,
        "allowed/path10/a": False,
        "allowed/a": False,
        "allowed/star-anything/a": True,
        "allowed/sta": False,
        "elsewhere/allowed/path1/a": False,
        "a": False,
    }.items():
        put(strict_server, key, b"old")
        response = requests.put(f"{url}/{key}", b"new", headers=headers, timeout=SECONDS)
        assert response.status_code == (200 if allowed else 403), key
        folder, _, name = key.rpartition("/")
        for parts in (
            (part("path", folder.encode()), part("file0", b"by form", name)),
            (part("file0", b"by form", name), part("path", folder.encode())),
        ):
            response = requests.post(f"{url}/upload", form(*parts), headers={**headers, **FORM_TYPE}, timeout=SECONDS)
            assert response.status_code == (200 if allowed else 403), key
        assert get(strict_server, key).content == (b"by form" if allowed else b"old")
        response = requests.delete(f"{url}/{key}", headers=headers, timeout=SECONDS)
        assert response.status_code == (204 if allowed else 403), key
        assert get(strict_server, key).status_code == (404 if allowed else 200)
        requests.delete(f"{url}/{key}", headers=strict_server.headers(), timeout=SECONDS)


def test_a_user_without_an_entry_may_not_write(strict_server: Server):
    headers = strict_server.headers("somebody@example.com")
    response = requests.put(f"{strict_server.url}/allowed/path1/a", b"x", headers=headers, timeout=SECONDS)
    assert_error(response, 403, strict_server)
    assert requests.get(f"{strict_server.url}/v1/checkauth", headers=headers, timeout=SECONDS).status_code == 200


def test_one_file_without_permission_refuses_the_whole_form(strict_server: Server):
    headers = {**strict_server.headers("limited@example.com"), **FORM_TYPE}
    files = part("file0", b"x", "path1/one"), part("file1", b"y", "other/two")
    for parts in itertools.permutations((part("path", b"allowed"), *files)):
        response = requests.post(f"{strict_server.url}/upload", form(*parts), headers=headers, timeout=SECONDS)
        assert_error(response, 403, strict_server)
    assert keys(strict_server, "allowed/path1/one") == []
    wait_until_tidy(strict_server)


# Limits


def test_the_largest_upload(strict_server: Server):
    folder, content = new_folder(), os.urandom(MIB)
    pieces = (content[start : start + 65_536] for start in range(0, MIB, 65_536))
    assert put(strict_server, f"{folder}/a", content).status_code == 201
    assert put(strict_server, f"{folder}/b", pieces).status_code == 201
    stored(post(strict_server, part("path", folder.encode()), part("file0", content, "c")))
    stored(post(strict_server, part("file0", content, "d"), part("path", folder.encode())))
    for name in "abcd":
        assert get(strict_server, f"{folder}/{name}").content == content


def too_large_uploads(server: Server, folder: str) -> Iterator[requests.Response]:
    content = os.urandom(MIB + 1)
    path, file = part("path", folder.encode()), part("file0", content, "a")
    yield put(server, f"{folder}/a", content)
    yield put(server, f"{folder}/a", iter([content[:100_000], content[100_000:]]))
    yield post(server, path, file)
    yield post(server, file, path)
    yield post(server, path, part("file1", b"small", "b"), file)
    yield post(server, part("file1", b"small", "b"), part("unknown", bytes(3 * MIB)), path)
    yield post_body(server, iter([path, part("unknown", bytes(3 * MIB)), part("file0", b"small", "a"), form()]))


def test_an_upload_that_is_too_large(strict_server: Server):
    folder = new_folder()
    put(strict_server, f"{folder}/a", b"old")
    for response in too_large_uploads(strict_server, folder):
        assert_error(response, 413, strict_server, says=["1048576"])
    assert get(strict_server, f"{folder}/a").content == b"old"
    assert keys(strict_server, folder) == [f"{folder}/a"]
    wait_until_tidy(strict_server)


def test_a_second_upload_of_a_key_waits_then_gives_up(strict_server: Server):
    key = f"{new_folder()}/a"
    head = request("PUT", f"/{key}", {**strict_server.headers(), "Content-Length": 10})
    with Wire(strict_server) as first, Wire(strict_server) as second:
        first.send(head, b"first")
        wait_until(lambda: strict_server.is_writing(key), SECONDS, "the first one")
        second.send(request("PUT", f"/{key}", {**strict_server.headers(), "Expect": "100-continue"}, b""))
        assert_error(second.answer(), 409, strict_server)
        assert get(strict_server, key).status_code == 404
        first.send(b"-done")
        assert first.answer().status == 201
    assert get(strict_server, key).content == b"first-done"


def test_a_second_upload_of_a_key_waits_for_the_first(server: Server):
    folder = new_folder()
    form_head = request("POST", "/upload", {**server.headers(), **FORM_TYPE, "Transfer-Encoding": "chunked"})
    first_part = part("path", folder.encode()) + part("file0", b"first" * 1000, "a")
    with Wire(server) as first, Wire(server) as second:
        first.send(form_head, b"%x\r\n%b\r\n" % (len(first_part), first_part))
        wait_until(lambda: server.is_writing(f"{folder}/a"), SECONDS, "the first one")
        second.send(request("PUT", f"/{folder}/a", server.headers(), b"second"))
        second.wait_until_taken()
        first.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(form()), form()))
        assert first.answer().status == 200
        assert second.answer().status == 200
    assert get(server, f"{folder}/a").content == b"second"


# Memory


def peak_memory(server: Server) -> int:
    """The most memory that any worker has had, in bytes, since :func:`forget_peak`."""
    return max(_status(pid)["VmHWM"] for pid in server.worker_pids())


def forget_peak(server: Server) -> int:
    """Forget the peaks; the memory that a worker has now."""
    for pid in server.worker_pids():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets the peak
    return max(psutil.Process(pid).memory_info().rss for pid in server.worker_pids())


def _status(pid: int) -> dict[str, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def test_an_unknown_field_is_not_kept_in_memory(server: Server):
    folder, before = new_folder(), forget_peak(server)
    response = post(
        server, part("path", folder.encode()), part("unknown", bytes(50 * MIB)), part("file0", b"content", "a")
    )
    assert [file["path"] for file in stored(response)] == [f"{folder}/a"]
    assert peak_memory(server) - before < 20 * MIB


@pytest.mark.parametrize("path_first", [True, False], ids=["path first", "path last"])
def test_a_file_is_not_kept_in_memory(server: Server, path_first: bool):
    """On Azure a few blocks of 8 MiB are on their way at a time, which is some 45 MiB."""
    folder, content = new_folder(), os.urandom(MIB) * 200
    path, file = part("path", folder.encode()), part("file0", content, "a")
    before = forget_peak(server)
    (entry,) = stored(post(server, *((path, file) if path_first else (file, path))))
    assert entry["sha256"] == sha256(content)
    assert peak_memory(server) - before < 100 * MIB


@pytest.mark.parametrize(
    ("path_first", "count", "size"),
    [(True, 60, 4 * MIB), (False, 60, 4 * MIB), (True, 12, 17 * MIB)],
    ids=["path first", "path last", "files of several blocks"],
)
def test_a_form_of_many_files_is_not_held_in_memory(azure_server: Server, path_first: bool, count: int, size: int):
    """All of them wait for the form's end, be they small enough for one request or not."""
    folder, before = new_folder(), forget_peak(azure_server)
    path = part("path", folder.encode())
    files = [part(f"file{number}", bytes([number]) * size, f"{number:03d}") for number in range(count)]
    response = post(azure_server, *((path, *files) if path_first else (*files, path)))
    assert len(stored(response)) == len(files)
    assert peak_memory(azure_server) - before < 100 * MIB
    assert get(azure_server, f"{folder}/007").content == bytes([7]) * size


def test_a_form_of_too_many_files_is_refused(local_server):
    files = {f"file{number}": (str(number), b"") for number in range(1_001)}
    response = requests.post(
        f"{local_server.url}/upload",
        data={"path": "many"},
        files=files,
        headers=local_server.headers("a@example.com"),
        timeout=2 * SECONDS,
    )
    assert response.status_code == 400
    assert "at most 1000 files" in response.text
    assert requests.get(f"{local_server.url}/many/0", timeout=SECONDS).status_code == 404
