# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forms as clients send them: each file is stored under its whole name, or the form is refused, naming the part."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import string
import subprocess
import time
import unicodedata
from collections.abc import Callable, Mapping
from email.message import EmailMessage
from email.mime.application import MIMEApplication
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.policy import HTTP
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest
import requests

from kci_storage.errors import BadForm
from kci_storage.http.multipart import Part
from tests.support.chromium import is_installed, running_chromium
from tests.support.harness import Server
from tests.support.wire import (
    BOUNDARY,
    SECONDS,
    assert_error,
    form,
    get,
    keys,
    new_folder,
    part,
    post,
    post_body,
    wait_until_tidy,
)

NFC, NFD = (unicodedata.normalize(way, "Übergröße é.txt") for way in ("NFC", "NFD"))


def raw_part(*headers: str | bytes, content: bytes = b"content") -> bytes:
    """One part of a form, with these headers."""
    lines = [f"--{BOUNDARY}", *headers]
    head = b"\r\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    return head + b"\r\n\r\n" + content + b"\r\n"


def file_part(parameters: str | bytes, *headers: str | bytes, content: bytes = b"content") -> bytes:
    """The part ``file0``, with these parameters after its name."""
    text = parameters.encode() if isinstance(parameters, str) else parameters
    return raw_part(b'Content-Disposition: form-data; name="file0"' + text, *headers, content=content)


# How a part may name its file


NAMED = {
    "a token": ("; filename=sub/f.txt", "sub/f.txt"),
    "no quotes around blanks": ("; filename=two words.txt", "two words.txt"),
    "no quotes, and blanks around it": (";filename =  a b  ;  size=1", "a b"),
    "other parameters": ('; size=7; filename="a"; creation-date="today; now"', "a"),
    "a semicolon at the end": ('; filename="a";', "a"),
    "in capitals": ('; FileName="A"', "A"),
    "a semicolon within": ('; filename="a; filename=b"', "a; filename=b"),
    "a quote as in e-mail": (r'; filename="a\"b.txt"', 'a"b.txt'),
    "a quote as browsers write it": ('; filename="a%22b.txt"', 'a"b.txt'),
    "a quote as browsers write it, in a token": ("; filename=a%22b.txt", 'a"b.txt'),
    "percent signs": ('; filename="100%, %41%2f%0a%"', "100%, %41%2f%0a%"),
    "apostrophes": ("; filename=it's", "it's"),
    "UTF-8": ('; filename="ü 🎉.txt"', "ü 🎉.txt"),
    "UTF-8 without quotes": ("; filename=ü 🎉.txt", "ü 🎉.txt"),
    "extended": ("; filename*=UTF-8''%C3%BC%20%f0%9f%8e%89.txt", "ü 🎉.txt"),
    "extended, first": ("; filename*=UTF-8''%C3%BC.txt; filename=\"u.txt\"", "ü.txt"),
    "extended, last": ("; filename=\"u.txt\"; filename*=utf-8'de'%C3%BC.txt", "ü.txt"),
    "extended, in quotes": ("; filename*=\"UTF-8''%C3%BC.txt\"", "ü.txt"),
    "extended, with a quote": ("; filename*=UTF-8''a%22b%2522c", 'a"b%22c'),
    "extended, with folders": ("; filename*=UTF-8''sub%2Fa", "sub/a"),
    "extended, and unreadable besides": (b"; filename=\"\xfc\"; filename*=UTF-8''%C3%BC", "ü"),
    "continued in the next line": ('; \r\n filename="a\r\n\tb.txt"', "a b.txt"),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_file_is_stored_under_its_whole_name(local_server: Server, case: str):
    parameters, name = NAMED[case]
    for order in (1, -1):
        folder = new_folder()
        parts = [part("path", folder.encode()), file_part(parameters)]
        response = post(local_server, *parts[::order])
        assert [file["path"] for file in response.json()["files"]] == [f"{folder}/{name}"], response.text
        assert get(local_server, quote(f"{folder}/{name}")).content == b"content"


UNNAMED = {
    "no file name": "",
    "a name that is no file name": '; file-name="a"',
    "a quote within": '; filename="a"b.txt"',
    "a quote within, then a parameter": '; filename="a"; b.txt"',
    "a quote at the end": '; filename="a""',
    "a quote at the beginning of a token": '; filename="a',
    "a quote within a token": '; filename=a"b',
    "a semicolon within a token": "; filename=a;b.txt",
    "a backslash at the end": '; filename="a\\"',
    "a backslash at the end, then a parameter": '; filename="a\\"; size="1"',
    "a backslash": '; filename="a\\b"',
    "two backslashes": '; filename="a\\\\b"',
    "a Windows path": '; filename="C:\\dir\\a.txt"',
    "a backslash in a token": "; filename=a\\b",
    "an encoded backslash": "; filename*=UTF-8''a%5Cb",
    "a line feed": '; filename="new%0Aline.txt"',
    "a carriage return": '; filename="new%0Dline.txt"',
    "an encoded line feed": "; filename*=UTF-8''new%0Aline.txt",
    "an encoded NUL": "; filename*=UTF-8''a%00b",
    "a NUL": '; filename="a\0b"',
    "a tabulator": '; filename="a\tb"',
    "a delete character": '; filename="a\x7fb"',
    "Latin-1": b'; filename="\xfc.txt"',
    "UTF-8 that is cut": b'; filename="\xc3"',
    "a surrogate": b'; filename="\xed\xa0\x80"',
    "extended, not UTF-8": "; filename*=UTF-8''%FF.txt",
    "extended, not UTF-8, and readable besides": "; filename=\"a\"; filename*=UTF-8''%FF.txt",
    "extended, in Latin-1": "; filename*=ISO-8859-1''%FC.txt",
    "extended, in Latin-1, and readable besides": "; filename*=ISO-8859-1''%FC.txt; filename=\"u.txt\"",
    "extended, in no charset": "; filename*=''a.txt",
    "extended, without its apostrophes": "; filename*=a.txt",
    "extended, with a percent sign": "; filename*=UTF-8''100%",
    "extended, wrong digits": "; filename*=UTF-8''a%zz",
    "in pieces": '; filename*0="a"; filename*1="b"',
    "in pieces, and readable besides": "; filename=\"a\"; filename*0*=UTF-8''b",
    "two of them": '; filename="a"; filename="b"',
    "two extended ones": "; filename*=UTF-8''a; filename*=UTF-8''b",
    "as in e-mail": '; filename="=?utf-8?B?w7wudHh0?="',
    "as in e-mail, by letters": '; filename="=?UTF-8?q?=C3=BC?="',
    "up": '; filename="../a"',
}


@pytest.mark.parametrize("case", UNNAMED)
def test_a_file_whose_name_cannot_be_taken_whole_is_refused(local_server: Server, case: str):
    for order in (1, -1):
        folder = new_folder()
        good = part("file1", b"good", "good")
        parts = [part("path", folder.encode()), file_part(UNNAMED[case]), good]
        line = assert_error(post(local_server, *parts[::order]), 400, local_server)
        assert "file0" in line or "the key has" in line
        assert keys(local_server, folder) == []
    wait_until_tidy(local_server)


def test_long_heads_cost_no_more_than_their_length():
    """Every pattern could be tried from each of these bytes on."""
    for filler in (' "', '"', "\\", " ", "; ", ";a=", "=?", "%", "'", "a", "; a= ", '="'):
        for start in ("; filename=", '; filename="', "; filename*=UTF-8''", ""):
            head = f'\r\nContent-Disposition: form-data; name="file0"{start}{filler * 30_000}'[: 32 * 1024]
            begin = time.process_time()
            with contextlib.suppress(BadForm):
                Part(head.encode()).file_name()
            assert time.process_time() - begin < 0.5, (start, filler)


# What a part may be


@pytest.mark.parametrize("order", [1, -1], ids=["path first", "path last"])
def test_a_path_may_be_a_file(local_server: Server, order: int):
    """KCIDB's ingesters send it so, as the last part."""
    folder = new_folder()
    path = part("path", folder.encode(), "path", "Content-Type: application/octet-stream")
    response = post(local_server, *[path, part("file0", b"content", "a")][::order])
    assert [file["path"] for file in response.json()["files"]] == [f"{folder}/a"]


def test_without_a_path_files_are_stored_at_the_top(local_server: Server):
    folder = new_folder()
    response = post(local_server, part("file0", b"content", f"{folder}/a"), part("file1", b"content", f"{folder}/b"))
    assert [file["path"] for file in response.json()["files"]] == [f"{folder}/a", f"{folder}/b"]
    assert_error(post(local_server, part("file0", b"content", "v1/a")), 400, local_server, says=["reserved"])


def test_kcidbs_ingester(local_server: Server):
    folder = new_folder()
    files: dict[str, object] = {"file0": ("log.txt", b"content"), "path": f"logexcerpt/{folder}"}
    response = requests.post(
        f"{local_server.url}/upload", headers=local_server.headers(), files=files, timeout=SECONDS
    )
    assert response.status_code == 200
    assert get(local_server, f"logexcerpt/{folder}/log.txt").content == b"content"


NESTED = b'--Y\r\nContent-Disposition: attachment; filename="x"\r\n\r\nx\r\n--Y--\r\n'

ODD = {
    "a field": file_part("", content=b"important"),
    "an empty field": file_part("", content=b""),
    "nested parts": file_part("", "Content-Type: multipart/mixed; boundary=Y", content=NESTED),
    "nested parts with a file name": file_part(
        '; filename="a"', "Content-Type: Multipart/Mixed; boundary=Y", content=NESTED
    ),
    "base64": file_part('; filename="a"', "Content-Transfer-Encoding: base64", content=b"aGVsbG8="),
    "quoted-printable": file_part('; filename="a"', "content-transfer-encoding: Quoted-Printable"),
    "an unknown encoding": file_part('; filename="a"', "Content-Transfer-Encoding: x-gzip"),
    "content without a file name": file_part('; filename=""', content=b"x"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_file_that_would_not_be_stored_as_it_is_refuses_the_form(local_server: Server, case: str):
    folder = new_folder()
    parts = [part("path", folder.encode()), part("file1", b"good", "good"), ODD[case]]
    for order in (1, -1):
        assert_error(post(local_server, *parts[::order]), 400, local_server, says=["file0"])
        assert keys(local_server, folder) == []
    wait_until_tidy(local_server)


@pytest.mark.parametrize("encoding", ["7bit", "8bit", "binary", "Binary", ""])
def test_a_file_may_say_that_it_is_not_encoded(local_server: Server, encoding: str):
    folder = new_folder()
    file = file_part('; filename="a"', f"Content-Transfer-Encoding: {encoding}")
    assert post(local_server, part("path", folder.encode()), file).status_code == 200
    assert get(local_server, f"{folder}/a").content == b"content"


@pytest.mark.parametrize(
    ("charset", "content", "status"),
    [
        ("utf-8", "ü", 200),
        ('"UTF-8"', "ü", 200),
        ("us-ascii", "u", 200),
        ("ISO-8859-1", "u", 200),
        ("ISO-8859-1", "ü", 400),
        ("utf-16", "u\0", 400),
    ],
)
def test_a_path_is_utf_8(local_server: Server, charset: str, content: str, status: int):
    """Apache's Java client says ISO-8859-1 by default, also of ASCII."""
    folder = new_folder()
    path = part("path", f"{folder}/{content}".encode(), None, f"Content-Type: text/plain; charset={charset}")
    assert post(local_server, path, part("file0", b"content", "a")).status_code == status
    assert keys(local_server, folder) == ([f"{folder}/{content}/a"] if status == 200 else [])


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Transfer-Encoding: base64"],
        ["Content-Type: multipart/mixed; boundary=Y"],
        ["Content-Transfer-Encoding: 8bit", "Content-Transfer-Encoding: binary"],
    ],
)
def test_a_path_is_sent_as_it_is(local_server: Server, headers: list[str]):
    path = part("path", b"cGF0aA==", None, *headers)
    assert_error(post(local_server, path, part("file0", b"content", "a")), 400, local_server)


def test_what_is_empty_and_nameless_is_skipped_beside_files(local_server: Server):
    """Browsers send a file field in which nothing was chosen, and buttons without a name."""
    nothing = [
        file_part('; filename=""', "Content-Type: application/octet-stream", content=b""),
        raw_part('Content-Disposition: form-data; filename="a"', content=b""),
        raw_part("Content-Disposition: form-data", content=b""),
        raw_part('Content-Disposition: form-data; name=""; filename=""', content=b""),
    ]
    folder = new_folder()
    response = post(local_server, nothing[0], part("path", folder.encode()), part("file1", b"x", "a"), *nothing)
    assert [file["path"] for file in response.json()["files"]] == [f"{folder}/a"]
    for empty in nothing:
        assert_error(post(local_server, part("path", b"x"), empty), 400, local_server, says=["no file"])


@pytest.mark.parametrize(
    "headers",
    [
        ['Content-Disposition: form-data; filename="a"'],
        ["Content-Disposition: form-data"],
        ['Content-Disposition: form-data; name=""; filename="a"'],
        ["Content-Type: text/plain"],
        [],
        ["nonsense", 'Content-Disposition: form-data; name="file1"; filename="a"'],
        ['Content-Disposition: form-data; name="file1', 'Content-Disposition: form-data; filename="a"'],
        ['Content-Disposition: form-data; name="file1"; filename="a"', "Content-Disposition: form-data"],
        [b'Content-Disposition: form-data; name="file\xff"; filename="a"'],
        ['Content-Disposition: form-data; filename="a\\"; name="file1"'],
    ],
    ids=repr,
)
def test_a_part_whose_name_cannot_be_read_refuses_the_form(local_server: Server, headers: list[str]):
    folder = new_folder()
    parts = part("path", folder.encode()), part("file0", b"x", "a"), raw_part(*headers)
    assert_error(post(local_server, *parts), 400, local_server, says=["the form has a part"])
    assert keys(local_server, folder) == []


def test_unknown_fields_may_be_anything(local_server: Server):
    folder = new_folder()
    unknown = [
        part("comment", b"\xff", None, "Content-Transfer-Encoding: base64"),
        part("File1", b"x", "../a"),
        part("file", b"x", "a\\"),
        part("file1x", NESTED, None, "Content-Type: multipart/mixed; boundary=Y"),
        part("_charset_", b"iso-8859-1"),
        raw_part("Content-Disposition: form-data; name=submit"),
    ]
    response = post(local_server, *unknown, part("path", folder.encode()), *unknown, part("file0", b"x", "a"))
    assert [file["path"] for file in response.json()["files"]] == [f"{folder}/a"]


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (f"Multipart/Form-Data; Boundary={BOUNDARY}", BOUNDARY),
        (f'multipart/form-data ; charset=utf-8; boundary="{BOUNDARY}"', BOUNDARY),
        (f"multipart/form-data;boundary={BOUNDARY};", BOUNDARY),
        ("multipart/form-data; boundary=----=_Part_1:(2)'+,/?", "----=_Part_1:(2)'+,/?"),
        ('multipart/form-data; boundary="a b"', "a b"),
        ("multipart/form-data; boundary=%22", "%22"),
    ],
)
def test_a_boundary_is_read_as_clients_write_it(local_server: Server, content_type: str, boundary: str):
    folder = new_folder()
    body = form(part("path", folder.encode()), part("file0", b"content", "a"))
    body = body.replace(BOUNDARY.encode(), boundary.encode())
    assert post_body(local_server, body, {"Content-Type": content_type}).status_code == 200
    assert keys(local_server, folder) == [f"{folder}/a"]


# Clients


class Client(NamedTuple):
    """How a client writes a file's name, and what comes of it."""

    written: Callable[[str], str]  # the parameter, or parameters, of Content-Disposition
    key: Callable[[str], str | None]  # the name in the key; None: the form is refused


def refused_or_whole(name: str) -> str | None:
    """What comes of a name from any client that writes it so that it can be read: a key has no such characters."""
    return None if any(char in name for char in "\\\r\n") else name


def or_quote(name: str) -> str | None:
    """The same, of a client that does not tell ``%22`` in a name from a quote."""
    whole = refused_or_whole(name)
    return None if whole is None else whole.replace("%22", '"')


def encoded_but_quotes(name: str) -> str | None:
    """What comes of a name that is percent-encoded as a whole."""
    return None if {"\r", "\n"} & set(name) else quote(name, safe="").replace("%22", '"')


def as_browsers(name: str) -> str:
    """The HTML Standard, 4.10.21.8."""
    return f'filename="{name.translate({10: "%0A", 13: "%0D", 34: "%22"})}"'


def with_backslashes(name: str) -> str:
    """RFC 822. A line break cannot be written in this way, so these clients write it as browsers do."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'filename="{escaped.translate({10: "%0A", 13: "%0D"})}"'


def as_httpx(name: str) -> str:
    """Percent-encoding as browsers do, with two backslashes for one."""
    return as_browsers(name.replace("\\", "\\\\"))


def percent_encoded(name: str) -> str:
    """Percent-encoding of all, which no server can tell from such a name."""
    return f'filename="{quote(name, safe="")}"'


def as_dotnet(name: str) -> str:
    """.NET, and PowerShell 7: quotes only where they must be, and the name twice."""
    is_token = all(char in string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~" for char in name)
    return f"filename={name if is_token else as_browsers(name)[9:]}; filename*=utf-8''{quote(name, safe='')}"


def as_email(name: str) -> str:
    """Python's email: the extended form only for names that are not ASCII."""
    message = EmailMessage(policy=HTTP)
    message["Content-Disposition"] = "form-data"
    if not name.isascii():
        return f"filename*=utf-8''{quote(name, safe='')}"
    return with_backslashes(name)


# What clients have sent, run by hand: curl 7.88.1, requests 2.34.2 with urllib3 2.8.0, requests-toolbelt 1.0.0,
# httpx 0.28.1, aiohttp 3.14.5, Node 20.20's fetch, axios 1.21.1 with its own forms and with form-data 4.0.6. Those
# that most machines have, and Chromium, are run below. By their documentation alone: Go, .NET and PowerShell. Java's
# HttpClient has no forms: each program writes its own.
CLIENTS = {
    "curl, requests, requests-toolbelt, fetch (Node, undici, Chromium), axios, form-data": Client(
        as_browsers, or_quote
    ),
    "curl --form-escape, curl before 7.81, Go, aiohttp with quote_fields=False": Client(with_backslashes, or_quote),
    "httpx, urllib3 before 2": Client(as_httpx, or_quote),
    "aiohttp": Client(percent_encoded, encoded_but_quotes),
    ".NET, PowerShell 7": Client(as_dotnet, refused_or_whole),
    "Python's email": Client(as_email, lambda name: or_quote(name) if name.isascii() else name),
}

NAMES = [
    *(f"a{char}b" for char in string.printable[:95] if char != "/"),
    " leading", "trailing ", "two  blanks", "sub/folder/a", 'quotes""', '"', "100%", "%41", "a%22b", NFC, NFD, "🎉",
    "文件.tar.gz", "a; filename=b", "a, b", "=", "'", "x" * 255, "end\\", "\\", "C:\\dir\\a", '\\"', "a\nb", "a\r\nb",
]  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_every_name_comes_back_or_is_refused(local_server: Server, client: str):
    written, key = CLIENTS[client]
    folder, expected = new_folder(), {}
    parts = [part("path", folder.encode())]
    for number, name in enumerate(NAMES):
        head = f'Content-Disposition: form-data; name="file{number}"; {written(name)}'
        file = raw_part(head, "Content-Type: application/octet-stream", content=name.encode())
        if (stored := key(name)) is None:
            assert_error(post(local_server, part("path", folder.encode()), file), 400, local_server)
        elif stored not in expected:
            expected[stored] = name.encode()
            parts.append(file)
    assert keys(local_server, folder) == []
    response = post(local_server, *parts)
    assert response.status_code == 200, response.text
    assert sorted(keys(local_server, folder)) == sorted(f"{folder}/{name}" for name in expected)
    for name, content in expected.items():
        assert get(local_server, quote(f"{folder}/{name}")).content == content


# Clients that are run


class Sent(NamedTuple):
    """An upload by a real client."""

    status: int
    text: str


def by_requests(server: Server, folder: str, name: str) -> Sent:
    response = requests.post(
        f"{server.url}/upload",
        headers=server.headers(),
        data={"path": folder},
        files={"file0": (name, b"content")},
        timeout=SECONDS,
    )
    return Sent(response.status_code, response.text)


def _run(*command: str, cwd: Path | None = None) -> Sent:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS, cwd=cwd)
    text, _, status = run.stdout.rstrip().rpartition("\n")
    return Sent(int(status), text)


def curl(server: Server, *arguments: str, cwd: Path | None = None) -> Sent:
    authorization = f"Authorization: {server.token()}"
    options = "-sS", "-w", "\n%{http_code}", "-H", authorization
    return _run("curl", *options, *arguments, f"{server.url}/upload", cwd=cwd)


def _curls_file(name: str) -> str:
    """curl's option has quotes and backslashes of its own."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'file0=content;filename="{escaped}"'


def by_curl(server: Server, folder: str, name: str) -> Sent:
    return curl(server, "-F", f"path={folder}", "-F", _curls_file(name))


def by_curl_with_backslashes(server: Server, folder: str, name: str) -> Sent:
    return curl(server, "--form-escape", "-F", f"path={folder}", "-F", _curls_file(name))


FETCH = """
const [url, token, path, name] = JSON.parse(process.argv[1]);
const form = new FormData();
form.append("path", path);
form.append("file0", new Blob(["content"]), name);
fetch(url, {method: "POST", headers: {Authorization: token}, body: form})
  .then(async answer => console.log(await answer.text() + "\\n" + answer.status));
"""


def by_fetch(server: Server, folder: str, name: str) -> Sent:
    return _run("node", "-e", FETCH, json.dumps([f"{server.url}/upload", server.token(), folder, name]))


def by_email(server: Server, folder: str, name: str) -> Sent:
    """Python's ``email``, which folds long headers unless its policy says otherwise."""
    message, path, file = MIMEMultipart("form-data"), MIMEText(folder), MIMEApplication("content", _encoder=_as_it_is)
    path.add_header("Content-Disposition", "form-data", name="path")
    file.add_header("Content-Disposition", "form-data", name="file0", filename=name)
    message.attach(path)
    message.attach(file)
    _, _, body = message.as_bytes(policy=message.policy.clone(linesep="\r\n")).partition(b"\r\n\r\n")
    response = post_body(server, body, {"Content-Type": message["Content-Type"]})
    return Sent(response.status_code, response.text)


def _as_it_is(message: MIMEApplication) -> None:
    message["Content-Transfer-Encoding"] = "binary"


RUN = {
    "requests": by_requests,
    "curl": by_curl,
    "curl --form-escape": by_curl_with_backslashes,
    "Node's fetch": by_fetch,
    "Python's email": by_email,
}
OF_CLIENTS = ["a b.txt", 'quo"te', "a;b, c=d", "100%", NFC, NFD, "🎉", "x" * 200, "end\\", "a\\b", '\\"', "sub/a"]


def assert_names_go_round(server: Server, upload: Callable[[Server, str, str], Sent]) -> None:
    """Upload a file under each name; it comes back under the same one, or is refused if no key may be so."""
    for name in OF_CLIENTS:
        folder = new_folder()
        sent = upload(server, folder, name)
        if refused_or_whole(name) is None:
            assert sent.status == 400, (name, sent)
            assert keys(server, folder) == []
        else:
            assert sent.status == 200, (name, sent)
            assert keys(server, folder) == [f"{folder}/{name}"]
            assert get(server, quote(f"{folder}/{name}")).content == b"content"


@pytest.mark.parametrize("client", RUN)
def test_names_from_real_clients(local_server: Server, client: str):
    assert_names_go_round(local_server, RUN[client])


IN_A_PAGE = """async ([url, token, path, name]) => {
  const form = new FormData();
  form.append("path", path);
  form.append("file0", new File(["content"], name));
  form.append("file1", new File([], ""));  // as of a field in which nothing was chosen
  const answer = await fetch(url, {method: "POST", headers: {Authorization: token}, body: form});
  return [answer.status, await answer.text()];
}"""


@pytest.mark.skipif(not is_installed(), reason="Chromium is not installed: apt-get install chromium")
def test_names_from_chromium(local_server: Server):
    with running_chromium() as browser:
        page = browser.new_page()
        page.goto(local_server.url)

        def upload(server: Server, folder: str, name: str) -> Sent:
            return Sent(*page.evaluate(IN_A_PAGE, [f"{server.url}/upload", server.token(), folder, name]))

        assert_names_go_round(local_server, upload)


CURL = {
    "a file": (["-F", "file0=@a b.txt"], {"a b.txt": b"a"}),
    "two files": (["-F", "file0=@a b.txt", "-F", "file1=@ü.txt"], {"a b.txt": b"a", "ü.txt": "ü".encode()}),
    "a type": (["-F", "file0=@a b.txt;type=text/x-log"], {"a b.txt": b"a"}),
    "another name": (["-F", 'file0=@a b.txt;filename="sub/x y"'], {"sub/x y": b"a"}),
    "another name without quotes": (["-F", "file0=@a b.txt;filename=x"], {"x": b"a"}),
    "further headers": (["-F", 'file0=@a b.txt;headers="X-A: b"'], {"a b.txt": b"a"}),
    "text as a file": (["-F", "file0=content;filename=x"], {"x": b"content"}),
    "standard input": (["-F", "file0=@-;filename=x"], {"x": b""}),
    "not encoded": (["-F", "file0=@a b.txt;encoder=8bit"], {"a b.txt": b"a"}),
    "binary": (["-F", "file0=@a b.txt;encoder=binary"], {"a b.txt": b"a"}),
    "base64": (["-F", "file0=@a b.txt;encoder=base64"], None),
    "quoted-printable": (["-F", "file0=@a b.txt;encoder=quoted-printable"], None),
    "two files in one part": (["-F", "file0=@a b.txt,ü.txt"], None),
    "content as a field": (["-F", "file0=<a b.txt"], None),
    "a text as a field": (["--form-string", "file0=@a b.txt"], None),
    "a nested form": (["-F", "=(;type=multipart/mixed", "-F", "file0=@a b.txt", "-F", "=)"], None),
}


@pytest.mark.parametrize("case", CURL)
@pytest.mark.parametrize("is_last", [False, True], ids=["path first", "path last"])
def test_the_spellings_of_curl(local_server: Server, tmp_path: Path, case: str, is_last: bool):
    arguments, expected = CURL[case]
    (tmp_path / "a b.txt").write_bytes(b"a")
    (tmp_path / "ü.txt").write_text("ü")
    folder = new_folder()
    path = ["-F", f"path={folder}"]
    sent = curl(local_server, *([*arguments, *path] if is_last else [*path, *arguments]), cwd=tmp_path)
    assert sent.status == (400 if expected is None else 200), sent
    stored: Mapping[str, bytes] = expected or {}
    assert sorted(keys(local_server, folder)) == sorted(f"{folder}/{name}" for name in stored)
    for name, content in stored.items():
        assert get(local_server, quote(f"{folder}/{name}")).content == content


POWERSHELL = (
    "--{b}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name=path\r\n\r\n"
    "{folder}\r\n"
    "--{b}\r\nContent-Disposition: form-data; name=file0; filename=a.txt; filename*=utf-8''a.txt\r\n"
    "Content-Type: application/octet-stream\r\n\r\ncontent\r\n--{b}--\r\n"
)


def test_powershells_form(local_server: Server):
    """``Invoke-WebRequest -Form``: tokens, and a boundary in quotes."""
    folder, boundary = new_folder(), "b1a3e2c4-0000-4000-8000-1234567890ab"
    body = POWERSHELL.format(b=boundary, folder=folder).encode()
    headers = {"Content-Type": f'multipart/form-data; boundary="{boundary}"'}
    assert post_body(local_server, body, headers).status_code == 200
    assert get(local_server, f"{folder}/a.txt").content == b"content"


def test_a_form_of_line_feeds(local_server: Server):
    """A program that writes its lines with a line feed alone."""
    folder = new_folder()
    body = form(part("path", folder.encode()), part("file0", b"content", "a")).replace(b"\r\n", b"\n")
    connection = http.client.HTTPConnection("127.0.0.1", local_server.port, timeout=SECONDS)
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    connection.request("POST", "/upload", body, {**local_server.headers(), "Content-Type": content_type})
    assert connection.getresponse().status == 200
    connection.close()
    assert get(local_server, f"{folder}/a").content == b"content"
