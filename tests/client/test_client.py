# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's commands with real servers; a proxy in between, or a server with false answers, causes faults."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pty
import re
import secrets
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import kci_storage
from kci_storage.cli import main as cli
from kci_storage.client import actions
from kci_storage.client.errors import ServerRefused
from kci_storage.client.paths import part_name
from kci_storage.client.progress import Lines
from kci_storage.client.storage import Storage
from kci_storage.client.uploads import FileBody
from tests.support.faultproxy import CONTENT, PROPERTIES, PUT, Cut, FaultProxy, Flip, Hold, Refuse, Say, Stall
from tests.support.harness import Server, running, wait_until
from tests.support.wire import get, keys, new_folder, put, stored_by_another_program

MIB = 1024 * 1024
SECONDS = 60  # for which a command may run
CONTENTS = secrets.token_bytes(3 * MIB + 17)
DOCUMENT = (Path(kci_storage.__file__).parent.parent / "docs/client.md").read_text()
Result = subprocess.CompletedProcess[str]


class Client:
    """Runs commands in its own folder, as a user without any settings."""

    def __init__(self, folder: Path, url: str, token: str):
        self.folder = folder
        self.environ = {"KCI_STORAGE_URL": url, "KCI_STORAGE_TOKEN": token}

    def __call__(self, *arguments: str, **environ: str) -> Result:
        return subprocess.run(timeout=SECONDS, text=True, stdout=-1, stderr=-1, **self._options(arguments, environ))

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        """Start a command in the background."""
        return subprocess.Popen(text=True, stdout=-1, stderr=-1, **self._options(arguments, environ))

    def _options(self, arguments: tuple[str, ...], environ: dict[str, str]) -> dict[str, Any]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("KCI_STORAGE_", "XDG_"))
        }
        return {
            "args": [sys.executable, "-m", "kci_storage.cli", *arguments],
            "cwd": self.folder,
            "env": {**inherited, "HOME": str(self.folder / "home"), **self.environ, **environ},
        }

    def write(self, path: str, content: bytes = CONTENTS) -> Path:
        """Write a local file."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def files(self, path: str = ".") -> dict[str, bytes]:
        """All local files in a folder."""
        root = self.folder / path
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def objects(result: Result) -> list[dict[str, Any]]:
    """The printed objects of a command with ``--json``."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_done(result: Result) -> None:
    assert result.returncode == 0, result.stderr


def assert_failed(result: Result, *says: str, code: int = 1) -> None:
    """Check that a command failed with one line of text that contains this."""
    assert result.returncode == code, (result.stdout, result.stderr)
    [line] = result.stderr.splitlines()
    assert line.startswith("kci-storage: ")
    for text in says:
        assert text in line


@pytest.fixture
def local_client(local_server: Server, tmp_path: Path) -> Client:
    return Client(tmp_path, local_server.url, local_server.token())


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Client:
    """A client of a server with each driver."""
    return Client(tmp_path, server.url, server.token())


# There and back


def test_a_folder_goes_and_comes_back(client, server):
    top = new_folder()
    tree = {
        "build/Image": CONTENTS, "build/empty": b"", "build/logs/a b.log": b"x\n", "build/.hidden": b"h",
        "build/logs/100%25 #1?.txt": b"odd", "build/größe/文.bin": b"utf-8",
    }  # fmt: skip
    for path, content in tree.items():
        client.write(path, content)
    assert_done(client("upload", "build", "--to", f"/{top}//x/"))
    assert sorted(keys(server, f"{top}/")) == sorted(f"{top}/x/{path}" for path in tree)
    assert_done(client("download", f"{top}/x/", "-o", "out"))
    assert client.files("out") == {f"x/{path}": content for path, content in tree.items()}


def test_what_is_in_a_folder_goes_without_its_name(local_client, local_server):
    top = new_folder()
    local_client.write("build/a", b"1")
    local_client.write("build/b/c", b"2")
    assert_done(local_client("upload", "build/.", "--to", top))
    assert keys(local_server, f"{top}/") == [f"{top}/a", f"{top}/b/c"]


def test_single_files_go_and_come_by_their_names(local_client, local_server):
    top = new_folder()
    local_client.write("build/one", b"1")
    local_client.write("two", b"2")
    assert_done(local_client("upload", "build/one", str(local_client.folder / "two"), "--to", top))
    assert keys(local_server, f"{top}/") == [f"{top}/one", f"{top}/two"]
    assert_done(local_client("download", f"{top}/one", f"/{top}/two", "-o", "out/deep"))
    assert local_client.files("out") == {"deep/one": b"1", "deep/two": b"2"}


def test_a_folder_is_one_by_its_slash_or_by_the_option(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a/x", b"1")
    assert_failed(local_client("download", f"{top}/a"), f"{top}/a: 404 ")
    assert_done(local_client("download", "-r", f"{top}/a"))
    assert local_client.files("a") == {"x": b"1"}


def test_a_name_that_begins_with_a_dash_follows_two_of_them(local_client, local_server):
    top = new_folder()
    local_client.write("-x", b"1")
    assert_done(local_client("upload", "--to", top, "--", "-x"))
    assert keys(local_server, f"{top}/") == [f"{top}/-x"]


def test_results_as_json(local_client, local_server):
    top = new_folder()
    local_client.write("a")
    sha256 = hashlib.sha256(CONTENTS).hexdigest()
    [uploaded] = objects(local_client("upload", "a", "--to", top, "--json"))
    etag = get(local_server, f"{top}/a").headers["ETag"]
    common = {
        "key": f"{top}/a", "size": len(CONTENTS), "sha256": sha256, "etag": etag,
        "url": f"{local_server.url}/{top}/a",
    }  # fmt: skip
    assert uploaded == {"action": "upload", "result": "uploaded", "file": "a", **common}
    [downloaded] = objects(local_client("download", f"{top}/a", "-o", "out", "--json"))
    assert downloaded == {"action": "download", "result": "downloaded", "file": "out/a", **common}
    failed = local_client("download", f"{top}/b", "--json")
    assert objects(failed) == [
        {
            "action": "download", "key": f"{top}/b", "file": "b", "result": "failed", "status": 404,
            "error": "404 no such file",
        }
    ]  # fmt: skip
    assert_failed(failed)


def test_what_is_there_already_is_not_fetched_again(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a", CONTENTS)
    put(local_server, f"{top}/b", b"new")
    local_client.write(f"{top}/a")
    local_client.write(f"{top}/b", b"old")
    before = (local_client.folder / top / "a").stat()
    result = local_client("download", f"{top}/", "--json")
    assert {each["key"]: each["result"] for each in objects(result)} == {
        f"{top}/a": "unchanged", f"{top}/b": "downloaded",
    }  # fmt: skip
    assert (local_client.folder / top / "a").stat().st_ino == before.st_ino
    assert local_client.files(top) == {"a": CONTENTS, "b": b"new"}


def test_quiet_is_quiet_and_failures_are_still_told(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a", b"1")
    result = local_client("download", "-q", f"{top}/a", f"{top}/b")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"kci-storage: {top}/b: 404 no such file", "kci-storage: 1 of 2 failed",
    ]  # fmt: skip
    assert local_client.files() == {"a": b"1"}


def test_a_file_without_a_known_digest_comes_too(local_client, local_server):
    top = new_folder()
    stored_by_another_program(local_server, f"{top}/a", CONTENTS)
    [result] = objects(local_client("download", f"{top}/a", "--json"))
    assert (result["result"], "sha256" in result) == ("downloaded", False)
    assert local_client.files() == {"a": CONTENTS}


# Folders and links


def test_links_to_files_are_stored_and_links_to_folders_left_out(local_client, local_server):
    top = new_folder()
    local_client.write("elsewhere/secret", b"s")
    real = local_client.write("build/real", b"1")
    (real.parent / "link").symlink_to("real")
    (real.parent / "outside").symlink_to(local_client.folder / "elsewhere")
    (real.parent / "round").symlink_to(".")
    os.mkfifo(real.parent / "fifo")
    result = local_client("upload", "build", "--to", top)
    assert_done(result)
    assert keys(local_server, f"{top}/") == [f"{top}/build/link", f"{top}/build/real"]
    assert result.stderr.splitlines() == [
        "kci-storage: build/fifo: left out, neither a file nor a folder",
        "kci-storage: build/outside: left out, a symbolic link to a folder",
        "kci-storage: build/round: left out, a symbolic link to a folder",
    ]


def test_a_link_to_a_folder_that_is_named_itself_is_followed(local_client, local_server):
    top = new_folder()
    local_client.write("build/a", b"1")
    (local_client.folder / "latest").symlink_to("build")
    assert_done(local_client("upload", "latest", "--to", top))
    assert keys(local_server, f"{top}/") == [f"{top}/latest/a"]


def test_a_link_that_leads_nowhere_fails_alone(local_client, local_server):
    top = new_folder()
    file = local_client.write("build/a", b"1")
    (file.parent / "broken").symlink_to("nowhere")
    result = local_client("upload", "build", "--to", top)
    assert result.returncode == 1
    assert "kci-storage: build/broken: No such file or directory" in result.stderr.splitlines()
    assert keys(local_server, f"{top}/") == [f"{top}/build/a"]


def test_two_files_for_one_key_are_refused_before_anything_is_sent(local_client, local_server):
    top = new_folder()
    local_client.write("a/log", b"1")
    local_client.write("b/log", b"2")
    assert_failed(
        local_client("upload", "a/log", "b/log", "--to", top), f"a/log and b/log would both become {top}/log", code=2
    )
    assert keys(local_server, f"{top}/") == []


def test_two_keys_for_one_file_are_refused_before_anything_is_fetched(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a/log", b"1")
    put(local_server, f"{top}/b/log", b"2")
    result = local_client("download", f"{top}/a/log", f"{top}/b/log", "-o", "out")
    assert_failed(result, f"{top}/a/log and {top}/b/log would both become out/log", code=2)
    assert local_client.files() == {}


def test_a_file_beside_a_folder_of_its_name_fails_and_the_folder_comes(azure_server, tmp_path):
    client, top = Client(tmp_path, azure_server.url, azure_server.token()), new_folder()
    for key in (f"{top}/a", f"{top}/a/b", f"{top}/a.txt"):
        assert put(azure_server, key, key.encode()).status_code == 201
    result = client("download", f"{top}/")
    assert result.returncode == 1
    assert (
        f"kci-storage: {top}/a: {top}/a is a folder, for other files of this download" in result.stderr.splitlines()
    )
    assert client.files(top) == {"a/b": f"{top}/a/b".encode(), "a.txt": f"{top}/a.txt".encode()}


def test_a_file_that_cannot_be_placed_leaves_what_is_there(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a", b"1")
    put(local_server, f"{top}/b/c", b"2")
    local_client.write(f"{top}/a/mine", b"m")
    local_client.write(f"{top}/b", b"mine")
    result = local_client("download", f"{top}/")
    assert result.returncode == 1
    assert f"kci-storage: {top}/a: {top}/a is a folder" in result.stderr.splitlines()
    assert f"kci-storage: {top}/b/c: File exists" in result.stderr.splitlines()
    assert local_client.files(top) == {"a/mine": b"m", "b": b"mine"}


def test_the_longest_name_comes(local_client, local_server):
    top, name = new_folder(), "n" * 255
    put(local_server, f"{top}/{name}", CONTENTS)
    assert_done(local_client("download", f"{top}/{name}"))
    assert local_client.files() == {name: CONTENTS}


def test_parts_of_different_files_have_different_names():
    names = {part_name(name, f"http://s/{name}") for name in ("x", "x.part", "é" * 127 + "a", "é" * 127 + "b")}
    assert len(names) == 4
    assert all(len(f"{name}.json".encode()) <= 255 for name in names)


# Looking and deleting


def test_ls_shows_a_level_and_everything_below(client, server):
    top = new_folder()
    put(server, f"{top}/b/c", b"12")
    put(server, f"{top}/a", b"1" * 2048)
    put(server, f"{top}x/other", b"")
    date = r"20\d\d-\d\d-\d\d \d\d:\d\d"
    level = client("ls", f"/{top}").stdout.splitlines()
    assert len(level) == 2
    assert re.fullmatch(rf" +-  {' ' * 16}  {top}/b/", level[0])
    assert re.fullmatch(rf" +2.0 KiB  {date}  {top}/a", level[1])
    below = client("ls", "-r", f"{top}/").stdout.splitlines()
    assert [line.split()[-1] for line in below] == [f"{top}/a", f"{top}/b/c"]
    assert [line.split()[-1] for line in client("ls", f"{top}/a").stdout.splitlines()] == [f"{top}/a"]
    assert [line.split()[-1] for line in client("ls", "-r", f"{top}/a").stdout.splitlines()] == [f"{top}/a"]


def test_ls_as_json(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/b/c", b"12")
    put(local_server, f"{top}/a", b"1")
    headers = get(local_server, f"{top}/a").headers
    file = {
        "path": f"{top}/a", "type": "file", "size": 1, "etag": headers["ETag"],
        "last_modified": headers["Last-Modified"],
    }  # fmt: skip
    folder = {"path": f"{top}/b/", "type": "folder"}
    assert objects(local_client("ls", top, "--json")) == [folder, file]
    assert objects(local_client("ls", top, "-r", "--json"))[0] == file
    assert folder["path"][:-2] in {each["path"] for each in objects(local_client("ls", "--json"))}


def test_ls_shows_all_pages(local_client, local_server):
    top = new_folder()
    for number in range(1001):
        stored_by_another_program(local_server, f"{top}/{number}", b"")
    shown = [each["path"] for each in objects(local_client("ls", top, "--json"))]
    assert sorted(shown) == sorted(f"{top}/{number}" for number in range(1001))


def test_ls_into_a_pipe_that_is_closed_ends_quietly(local_client, local_server):
    top = new_folder()
    for number in range(3000):
        stored_by_another_program(local_server, f"{top}/{number}", b"")
    process = local_client.start("ls", "-r", top)
    with process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("options", [[], ["-r"]])
def test_ls_of_nothing_fails(local_client, options):
    assert_failed(local_client("ls", "nowhere", *options), "nowhere: no such file or folder")


def test_stat_prints_all_properties(client, server):
    top = new_folder()
    put(server, f"{top}/a.txt", b"1" * 2048)
    headers = get(server, f"{top}/a.txt").headers
    [properties] = objects(client("stat", f"{top}/a.txt", "--json"))
    assert properties == {
        "key": f"{top}/a.txt", "size": 2048, "etag": headers["ETag"], "last_modified": headers["Last-Modified"],
        "content_type": "text/plain; charset=utf-8", "sha256": hashlib.sha256(b"1" * 2048).hexdigest(),
        "url": f"{server.url}/{top}/a.txt",
    }  # fmt: skip
    lines = client("stat", f"{top}/a.txt").stdout.splitlines()
    assert lines[1].split(maxsplit=1) == ["size", "2048 (2.0 KiB)"]
    assert lines[5].split() == ["sha256", properties["sha256"]]


def test_stat_goes_on_after_a_file_that_is_not_there(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a", b"1")
    result = local_client("stat", f"{top}/b", f"{top}/a")
    assert_failed(result, f"{top}/b: 404 no such file")
    assert result.stdout.startswith(f"key            {top}/a\n")


def test_rm_deletes_several_and_says_what_was_not_there(client, server):
    top = new_folder()
    for name in ("a", "b", "c"):
        put(server, f"{top}/{name}", b"1")
    result = client("rm", f"{top}/a", f"{top}/nothing", f"/{top}/b", "--json")
    assert result.returncode == 1
    assert {each["key"]: each["result"] for each in objects(result)} == {
        f"{top}/a": "deleted", f"{top}/b": "deleted", f"{top}/nothing": "failed",
    }  # fmt: skip
    assert keys(server, f"{top}/") == [f"{top}/c"]
    assert_done(client("rm", "-f", f"{top}/nothing"))


@pytest.mark.parametrize("command", ["rm", "stat", "download"])
def test_a_key_that_would_be_resolved_to_another_is_refused(local_client, local_server, command):
    top = new_folder()
    put(local_server, f"{top}/victim", b"1")
    result = local_client(command, f"{top}/x/../victim")
    assert_failed(result, "the key has the segment '..'")
    assert keys(local_server, f"{top}/") == [f"{top}/victim"]
    assert local_client.files() == {}


# Settings


def test_no_server_is_one_line(local_client):
    assert_failed(local_client("ls", KCI_STORAGE_URL=""), "give --url, or set KCI_STORAGE_URL", code=2)


@pytest.mark.parametrize(
    "url", ["storage", "ftp://x", "http://", "http://user:secret@x", "http://x/?y", "http://x:0"]
)
def test_what_is_no_servers_url_is_one_line(local_client, url):
    assert_failed(local_client("ls", "--url", url), "is no server's URL", code=2)


@pytest.mark.parametrize("command", [["upload", "a"], ["rm", "a"]])
def test_no_token_is_one_line(local_client, command):
    local_client.write("a", b"1")
    own = local_client.folder / "home/.config/kci-storage/token"
    expected = f"no token: give --token-file, set KCI_STORAGE_TOKEN, or write it to {own}"
    assert_failed(local_client(*command, KCI_STORAGE_TOKEN=""), expected, code=2)


def test_reading_needs_no_token(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a", b"1")
    for command in (["ls", top], ["stat", f"{top}/a"], ["download", f"{top}/a"]):
        assert_done(local_client(*command, KCI_STORAGE_TOKEN=""))


@pytest.mark.parametrize("source", ["option", "environment", "own file", "XDG_CONFIG_HOME"])
def test_the_first_token_found_is_used(local_client, local_server, source):
    """The sources of lower priority have an invalid token."""
    top, good, wrong = new_folder(), local_server.token(), "not.a.token"
    order = ["option", "environment", "own file"]
    place = order.index(source) if source in order else 2
    value = {name: wrong if at > place else good if at == place else "" for at, name in enumerate(order)}
    options = ["--token-file", str(local_client.write("token", f"{good}\n".encode()))] if value["option"] else []
    folder = "home/.config" if source != "XDG_CONFIG_HOME" else "xdg"
    local_client.write(f"{folder}/kci-storage/token", f"Bearer {value['own file']}\n".encode())
    environ = {"XDG_CONFIG_HOME": str(local_client.folder / "xdg")} if folder == "xdg" else {}
    local_client.write("a", b"1")
    command = ["upload", "a", "--to", top, *options]
    assert_done(local_client(*command, KCI_STORAGE_TOKEN=value["environment"], **environ))
    assert keys(local_server, f"{top}/") == [f"{top}/a"]


@pytest.mark.parametrize("content", [b"", b"two words", b"two\nlines", b"\xff\xfe"])
def test_what_is_no_token_is_one_line_and_is_not_shown(local_client, content):
    local_client.write("a", b"1")
    local_client.write("token", content)
    result = local_client("upload", "a", "--token-file", "token")
    assert_failed(result, "kci-storage: token: ", code=2)
    assert "two" not in result.stderr


def test_a_password_in_netrc_does_not_take_the_tokens_place(local_client, local_server):
    netrc = local_client.write("home/.netrc", b"machine 127.0.0.1 login user password secret\n")
    netrc.chmod(0o600)
    local_client.write("a", b"1")
    assert_done(local_client("upload", "a", "--to", new_folder()))


# Refusals


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that refuses much: two users have permission for some prefixes, and files must be small."""
    users = [{"name": "user@example.com", "prefixes": ["/allowed"]}]
    document = {"driver": "local", "users": users, "server": {"max_upload_bytes": 4 * MIB}}
    with running(Server(tmp_path_factory.mktemp("strict"), document)) as server:
        yield server


@pytest.fixture
def strict_client(strict_server: Server, tmp_path: Path) -> Client:
    return Client(tmp_path, strict_server.url, strict_server.token())


def test_a_wrong_token_is_one_line_for_each_file(strict_client):
    strict_client.write("a", b"1")
    strict_client.write("b", b"1")
    result = strict_client("upload", "a", "b", "--to", "allowed", KCI_STORAGE_TOKEN="wrong")
    assert result.returncode == 1
    assert set(result.stderr.splitlines()) == {
        "kci-storage: a: 401 Unauthorized", "kci-storage: b: 401 Unauthorized", "kci-storage: 2 of 2 failed",
    }  # fmt: skip


def test_a_prefix_that_is_not_ones_own_is_refused(strict_client):
    strict_client.write("a", b"1")
    assert_failed(strict_client("upload", "a", "--to", "other"), "a: 403 ")
    assert_failed(strict_client("rm", "other/a"), "other/a: 403 ")


def test_the_answer_that_comes_before_a_large_body_was_sent_is_shown(strict_client):
    with strict_client.write("large").open("r+b") as file:
        file.truncate(300 * MIB)
    assert_failed(strict_client("upload", "large", "--to", "other"), "large: 403 ")
    assert_failed(strict_client("upload", "large", "--to", "allowed"), "large: 413 ")


def test_if_absent_replaces_nothing(client, server):
    top = new_folder()
    put(server, f"{top}/a", b"old")
    client.write("a", b"new")
    client.write("b", b"new")
    result = client("upload", "a", "b", "--to", top, "--if-absent")
    assert result.returncode == 1
    assert any(line.startswith("kci-storage: a: 412 ") for line in result.stderr.splitlines())
    assert (get(server, f"{top}/a").content, get(server, f"{top}/b").content) == (b"old", b"new")
    assert_done(client("upload", "a", "--to", top))
    assert get(server, f"{top}/a").content == b"new"


def test_a_key_that_cannot_stand_beside_another_is_refused(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a", b"1")
    local_client.write("b", b"1")
    assert_failed(local_client("upload", "b", "--to", f"{top}/a"), "b: 409 ")


def test_a_server_that_is_not_there_is_one_line(local_client):
    result = local_client("ls", "--url", "http://127.0.0.1:1", "--retries", "0")
    assert_failed(result, "the connection failed: Connection refused")


def test_a_file_that_is_not_there_stops_the_upload_before_it_begins(local_client, local_server):
    top = new_folder()
    local_client.write("a", b"1")
    assert_failed(local_client("upload", "a", "b", "--to", top), "b: no such file or folder", code=2)
    assert keys(local_server, f"{top}/") == []


# Faults on the way down

AT = MIB + 5  # where the connection breaks


@pytest.fixture
def proxy(local_server: Server) -> Iterator[FaultProxy]:
    """A proxy between the client and the server; its key is the part of the path after the second slash."""
    proxy = FaultProxy(local_server.url)
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(proxy: FaultProxy, local_server: Server, tmp_path: Path) -> Client:
    """A client that reaches the server through the proxy."""
    return Client(tmp_path, proxy.endpoint, local_server.token())


@pytest.fixture
def key(local_server: Server) -> str:
    """A file in the store."""
    key = f"{new_folder()}/x/Image"
    assert put(local_server, key, CONTENTS).status_code == 201
    return key


def part_of(client: Client) -> Path:
    """The only part in a folder."""
    [part] = client.folder.glob("*.part")
    return part


def ranges(proxy: FaultProxy) -> list[int]:
    """The offsets at which the downloads through the proxy began."""
    return [each.start for each in proxy.requests if each.kind == CONTENT]


def test_a_download_that_broke_is_resumed_by_the_next_run(proxied, proxy, key):
    proxy.inject(Cut(AT), times=1)
    assert_failed(proxied("download", key, "--retries", "0"), f"{key}: ")
    assert set(proxied.files()) == {part_of(proxied).name, f"{part_of(proxied).name}.json"}
    assert part_of(proxied).read_bytes() == CONTENTS[:AT]
    assert_done(proxied("download", key))
    assert ranges(proxy) == [0, AT]
    assert proxied.files() == {"Image": CONTENTS}


def test_a_download_that_breaks_is_resumed_at_once(proxied, proxy, key):
    proxy.inject(Cut(AT, reset=True), times=1)
    proxy.inject(Cut(10), times=1)
    result = proxied("download", key)
    assert_done(result)
    assert result.stderr.count("; trying again in ") == 2
    assert ranges(proxy)[0] == 0 and 0 < ranges(proxy)[1] <= AT and ranges(proxy)[2] > ranges(proxy)[1]
    assert proxied.files() == {"Image": CONTENTS}


def test_failures_do_not_count_while_it_gets_further(proxied, proxy, key):
    proxy.inject(Cut(AT), times=2)
    assert_done(proxied("download", key, "--retries", "1"))
    assert proxied.files() == {"Image": CONTENTS}


def test_what_was_replaced_meanwhile_is_fetched_anew(proxied, proxy, key, local_server):
    proxy.inject(Cut(AT), times=1)
    assert_failed(proxied("download", key, "--retries", "0"))
    new = secrets.token_bytes(len(CONTENTS))
    put(local_server, key, new)
    assert_done(proxied("download", key))
    assert ranges(proxy) == [0, AT]
    assert proxied.files() == {"Image": new}


def test_what_was_replaced_by_less_than_has_come_is_fetched_anew(proxied, proxy, key, local_server):
    proxy.inject(Cut(AT), times=1)
    assert_failed(proxied("download", key, "--retries", "0"))
    put(local_server, key, b"less")
    assert_done(proxied("download", key))
    assert proxied.files() == {"Image": b"less"}


def test_what_was_deleted_meanwhile_leaves_nothing(proxied, proxy, key, local_server):
    proxy.inject(Cut(AT), times=1)
    assert_failed(proxied("download", key, "--retries", "0"))
    assert_done(proxied("rm", key))
    assert_failed(proxied("download", key), "404 no such file")
    assert proxied.files() == {}


def test_a_part_that_lacks_only_its_name_is_finished(proxied, proxy, key, local_server):
    proxy.inject(Cut(AT), times=1)
    assert_failed(proxied("download", key, "--retries", "0"))
    part_of(proxied).write_bytes(CONTENTS)
    assert_done(proxied("download", key))
    assert ranges(proxy)[1:] == [len(CONTENTS) - 1]
    assert proxied.files() == {"Image": CONTENTS}


@pytest.mark.parametrize("damage", ["content", "record", "no record", "longer"])
def test_a_part_that_is_wrong_never_becomes_the_file(proxied, proxy, key, damage):
    proxy.inject(Cut(AT), times=1)
    assert_failed(proxied("download", key, "--retries", "0"))
    part = part_of(proxied)
    record = part.with_name(f"{part.name}.json")
    if damage == "content":
        part.write_bytes(b"\0" * AT)
    elif damage == "longer":
        part.write_bytes(CONTENTS + b"more")
    elif damage == "record":
        record.write_text(record.read_text()[:-5])
    else:
        record.unlink()
    assert_done(proxied("download", key))
    assert ranges(proxy)[-1] == 0
    assert proxied.files() == {"Image": CONTENTS}


def test_what_is_damaged_on_the_way_is_fetched_again(proxied, proxy, key):
    proxy.inject(Flip(AT), times=1)
    assert_done(proxied("download", key))
    assert ranges(proxy) == [0, 0]
    assert proxied.files() == {"Image": CONTENTS}


def test_what_is_always_damaged_never_gets_its_name(proxied, proxy, key):
    proxied.write("Image", b"what was there")
    proxy.inject(Flip(AT))
    assert_failed(proxied("download", key), "another SHA-256")
    assert ranges(proxy) == [0, 0]
    assert proxied.files() == {"Image": b"what was there"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_is_kept_and_resumed(proxied, proxy, key, number):
    rule = proxy.inject(Stall(AT), times=1)
    with proxied.start("download", key) as process:
        rule.wait_until_reached()
        wait_until(lambda: proxied.files() and part_of(proxied).stat().st_size == AT, SECONDS, "all that came")
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert number != signal.SIGINT or said.splitlines() == [
        "kci-storage: interrupted; what has come is kept: run it again to have the rest"
    ]
    assert "Image" not in proxied.files()
    assert_done(proxied("download", key))
    assert ranges(proxy) == [0, AT]
    assert proxied.files() == {"Image": CONTENTS}


def test_a_second_download_to_the_same_place_does_not_disturb_the_first(proxied, proxy, key, local_server):
    rule = proxy.inject(Stall(AT), times=1)
    with proxied.start("download", key) as first:
        rule.wait_until_reached()
        wait_until(lambda: list(proxied.folder.glob("*.part.json")), SECONDS, "the first one's beginning")
        assert_failed(proxied("download", key), "another download to Image is running")
        rule.release()
        first.communicate(timeout=SECONDS)
    assert first.returncode == 0
    assert proxied.files() == {"Image": CONTENTS}


def test_so_many_are_fetched_at_once_as_jobs_say(proxied, proxy, local_server):
    top = new_folder()
    for number in range(5):
        put(local_server, f"{top}/x/{number}", b"1")
    rule = proxy.inject(Hold())
    with proxied.start("download", f"{top}/x/", "--jobs", "3") as process:
        wait_until(lambda: proxy.count(CONTENT) == 3, SECONDS, "three at once")
        rule.release()
        process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert proxy.count(CONTENT) == 5
    assert len(proxied.files("x")) == 5


@pytest.mark.parametrize("fault", [Refuse(), Say(503, "Busy"), Say(500, "Error")], ids=["reset", "503", "500"])
def test_everything_is_tried_again(proxied, proxy, key, fault):
    commands = {
        CONTENT: ["download", key],
        PROPERTIES: ["stat", key],
        PUT: ["upload", "a", "--to", key.rpartition("/")[0]],
    }
    proxied.write("a", CONTENTS)
    for kind, command in commands.items():
        rule = proxy.inject(fault, kind=kind, times=1)
        assert_done(proxied(*command))
        assert rule.hits == 1
    assert_done(proxied("rm", f"{key.rpartition('/')[0]}/a"))


def test_a_refusal_is_not_tried_again(proxied, proxy, key):
    assert_failed(proxied("stat", f"{key}x"), "404")
    assert proxy.count(PROPERTIES) == 1


def test_retries_end(proxied, proxy, key):
    rule = proxy.inject(Say(503, "Busy"))
    result = proxied("download", key, "--retries", "1")
    assert (result.returncode, rule.hits) == (1, 2)
    assert [line.partition("; ")[0] for line in result.stderr.splitlines()] == [f"kci-storage: {key}: 503 Fault"] * 2


# Faults on the way up


@pytest.mark.parametrize("options", [[], ["--if-absent"]])
def test_an_upload_whose_answer_is_lost_is_no_failure(proxied, proxy, local_server, options):
    """The second attempt, with If-None-Match, finds the file with the same content."""
    top = new_folder()
    proxied.write("a")
    rule = proxy.inject(Cut(0), kind=PUT, times=1)
    assert_done(proxied("upload", "a", "--to", f"{top}/x", *options))
    assert (rule.hits, proxy.count(PUT)) == (1, 2)
    assert get(local_server, f"{top}/x/a").content == CONTENTS


def test_a_file_of_another_that_came_in_between_is_not_taken_for_ours(proxied, proxy, local_server):
    top = new_folder()
    proxied.write("a")
    rule = proxy.inject(Refuse(), kind=PUT, times=1)
    put(local_server, f"{top}/x/a", b"theirs")
    result = proxied("upload", "a", "--to", f"{top}/x", "--if-absent")
    assert result.returncode == 1 and "a: 412 " in result.stderr
    assert rule.hits == 1
    assert get(local_server, f"{top}/x/a").content == b"theirs"


def test_a_deletion_whose_answer_is_lost_is_no_failure(local_server, tmp_path, key):
    with lying(Answer(reset=True), Answer(404, b"no such file\n")) as liar:
        client = Client(tmp_path, liar.url, "token")
        assert_done(client("rm", key))
        assert_failed(client("rm", key), "404 no such file")


def test_a_content_that_changed_on_the_way_is_not_stored(local_server):
    top = new_folder()
    put(local_server, f"{top}/a", b"old")
    storage = Storage(local_server.url, local_server.token())
    digest = hashlib.sha256(b"what was read first").hexdigest()
    with pytest.raises(ServerRefused) as caught:
        storage.upload(f"{top}/a", FileBody(io.BytesIO(b"what was sent"), 13), 13, digest)
    assert caught.value.status == 400
    assert get(local_server, f"{top}/a").content == b"old"


# Servers that lie


class Answer:
    """A response of a :class:`Liar`."""

    def __init__(self, status: int = 200, body: bytes = b"", reset: bool = False, **headers: str):
        self.status = status
        self.body = body
        self.reset = reset
        self.headers = {"Content-Type": "text/plain", **{name.replace("_", "-"): v for name, v in headers.items()}}


class Liar:
    """A server that gives prepared answers, the last one for ever, and records its requests."""

    def __init__(self, answers: tuple[Answer, ...]):
        self.asked: list[tuple[float, str, str, dict[str, str]]] = []
        liar, left = self, list(answers)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                liar.asked.append((time.monotonic(), self.command, self.path, dict(self.headers)))
                answer = left.pop(0) if len(left) > 1 else left[0]
                if answer.reset:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)
                self.close_connection = int(answer.headers.get("Content-Length", 0)) > len(answer.body)

            do_GET = do_HEAD = do_PUT = do_DELETE = answer

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextlib.contextmanager
def lying(*answers: Answer) -> Iterator[Liar]:
    """A server with false answers, during the block."""
    liar = Liar(answers)
    thread = threading.Thread(target=liar.server.serve_forever)
    thread.start()
    try:
        yield liar
    finally:
        liar.server.shutdown()
        thread.join()
        liar.server.server_close()


def listing(*paths: str) -> Answer:
    """A list with these keys."""
    lines = [json.dumps({"path": path, "size": 1, "etag": '"x"', "last_modified": ""}) for path in paths]
    return Answer(200, "".join(f"{line}\n" for line in lines).encode(), Content_Type="application/x-ndjson")


EVIL = [
    "f/../../evil", "f/..", "/etc/evil", "f//etc/evil", "../evil", "f/a/./b", "other/evil", "f/", "", "f/\x00",
    "f\\..\\evil",
    "f/\x1b[31m", "f/a\nb", "f/\ud800",
]  # fmt: skip


def test_no_list_leads_out_of_the_folder(tmp_path):
    work = tmp_path / "a/b/work"
    work.mkdir(parents=True)
    with lying(listing(*EVIL, "f/good"), Answer(200, b"1", ETag='"x"')) as liar:
        result = Client(work, liar.url, "")("download", "f/", "-o", "out")
    assert result.returncode == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [work / "out/f/good"]
    assert len(result.stderr.splitlines()) == len(EVIL) + 1
    assert "\x1b" not in result.stderr + result.stdout
    assert [path for _, _, path, _ in liar.asked[1:]] == ["/f/good"]


def test_the_server_says_when_to_come_back(local_client):
    with lying(Answer(503, b"busy\n", Retry_After="3"), Answer(200, b"1", ETag='"x"')) as liar:
        assert_done(local_client("download", "a", "--url", liar.url))
    first, second = (moment for moment, *_ in liar.asked)
    assert second - first >= 3


def test_a_redirected_upload_is_an_error_and_the_token_goes_nowhere(local_client):
    local_client.write("a", b"1")
    with lying(Answer(200)) as other, lying(Answer(302, Location=f"{other.url}/elsewhere")) as liar:
        assert_failed(local_client("upload", "a", "--url", liar.url), "the server is elsewhere", other.url)
        assert other.asked == []


def test_a_redirected_download_is_followed_without_a_token(local_client):
    content = Answer(200, b"1", ETag='"x"')
    with lying(content) as other, lying(Answer(307, Location=f"{other.url}/elsewhere")) as liar:
        assert_done(local_client("download", "a", "--url", liar.url))
        assert all("Authorization" not in headers for *_, headers in other.asked + liar.asked)
    assert local_client.files() == {"a": b"1"}


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, b"hello"),
        Answer(201, b'{"files": []}', Content_Type="application/json"),
        Answer(201, json.dumps({"files": [{"path": "a", "size": 1, "sha256": "0" * 64, "etag": '"x"'}]}).encode()),
    ],
    ids=["text", "nothing stored", "something else stored"],
)
def test_an_upload_that_is_not_confirmed_is_a_failure(local_client, answer):
    local_client.write("a", b"1")
    with lying(answer) as liar:
        assert_failed(local_client("upload", "a", "--url", liar.url), "a: the server ")


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"Content_Range": "bytes 0-9/20"}, "another part"),
        ({"Content_Range": "nonsense"}, "another part"),
        ({"Content_Encoding": "gzip"}, "encoded in another way"),
        ({"Content_Length": "-1"}, "how large"),
    ],
)
def test_a_download_that_makes_no_sense_is_a_failure(local_client, headers, says):
    status = 206 if "Content_Range" in headers else 200
    with lying(Answer(status, b"0123456789", ETag='"x"', **headers)) as liar:
        assert_failed(local_client("download", "a", "--url", liar.url), "a: ", says)
    assert local_client.files() == {}


def test_a_proxys_page_is_not_shown(local_client):
    with lying(Answer(403, b"<html>\n<h1>Forbidden</h1>", Content_Type="text/html")) as liar:
        assert_failed(local_client("download", "a", "--url", liar.url), "a: 403 Forbidden")


def test_what_an_error_says_cannot_command_the_terminal(local_client):
    with lying(Answer(400, b"bad\x1b[2J\r\nmore\n")) as liar:
        assert_failed(local_client("download", "a", "--url", liar.url), "a: 400 bad?[2J  more")


def test_a_download_without_an_etag_is_not_resumed(local_client):
    with lying(Answer(200, b"12345", Content_Length="10"), Answer(200, b"0123456789")) as liar:
        assert_done(local_client("download", "a", "--url", liar.url))
        assert all("Range" not in headers for *_, headers in liar.asked)
    assert local_client.files() == {"a": b"0123456789"}


# Memory, the terminal, the shell

_MEASURED = """
import sys
from kci_storage.cli.main import main
code = main(sys.argv[1:])
[line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(line.split()[1], file=sys.stderr)
sys.exit(code)
"""


def peak(client: Client, *arguments: str) -> int:
    """A command's peak memory, in bytes (``proc(5)``)."""
    options = client._options(arguments, {})
    options["args"][1:3] = ["-c", _MEASURED]
    result = subprocess.run(timeout=2 * SECONDS, text=True, stdout=-1, stderr=-1, **options)
    assert_done(result)
    return int(result.stderr.split()[-1]) * 1024


def test_memory_does_not_grow_with_a_file(local_client, local_server):
    top = new_folder()
    local_client.write("small", CONTENTS)
    with local_client.write("large", b"").open("wb") as file:
        for _ in range(96):
            file.write(secrets.token_bytes(MIB))
    peaks = {}
    for name in ("small", "large"):
        peaks[name, "up"] = peak(local_client, "upload", name, "--to", top)
        peaks[name, "down"] = peak(local_client, "download", f"{top}/{name}", "-o", "out")
    print("\n" + ", ".join(f"{' '.join(which)} {size / MIB:.1f} MiB" for which, size in peaks.items()))
    for way in ("up", "down"):
        assert peaks["large", way] - peaks["small", way] < 24 * MIB
    assert sha256_of(local_client.folder / "out/large") == sha256_of(local_client.folder / "large")
    put(local_server, f"{top}/large", b"")
    shutil.rmtree(local_client.folder)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone(local_client, local_server, terminal):
    top = new_folder()
    put(local_server, f"{top}/a", CONTENTS)
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (24, 100))
    process = subprocess.Popen(
        stdout=-1, stderr=writer, text=True, **local_client._options(("download", f"{top}/a"), {})
    )
    os.close(writer)
    seen = b""
    with contextlib.suppress(OSError):  # reading a terminal whose other side is closed is an error
        while data := os.read(reader, 65536):
            seen += data
    os.close(reader)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert f"{top}/a -> a  3.0 MiB" in out
    assert (b"100%" in seen and b"3.00M/3.00M" in seen) if terminal else seen == b"", seen


def test_a_log_gets_a_line_now_and_then(capsys):
    lines = Lines(interval=0)
    lines.expect(2 * MIB)
    lines.add(MIB)
    assert capsys.readouterr().err.splitlines()[-1] == "kci-storage: 1.0 MiB of 2.0 MiB"
    quiet = Lines(interval=3600)
    quiet.add(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("kci-storage up", {"upload"}),
        ("kci-storage upload --if", {"--if-absent"}),
        ("kci-storage completion ", {"bash", "zsh"}),
        ("kci-storage upload loc", {"local-file", "local-folder"}),
        ("kci-storage download -o loc", {"local-folder"}),
    ],
)
def test_bash_completes(local_client, typed, offered):
    local_client.write("local-file", b"")
    (local_client.folder / "local-folder").mkdir()
    words = typed.split(" ")
    script = (
        'eval "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        "read -ra complete < <(complete -p kci-storage); function=${complete[-2]}\n"
        '"$function" kci-storage "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    completion = local_client("completion", "bash")
    assert_done(completion)
    result = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", completion.stdout, *words],
        cwd=local_client.folder, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert {line.strip().rstrip("/") for line in result.stdout.splitlines() if line.strip()} == offered, result.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(local_client):
    completion = local_client("completion", "zsh")
    local_client.write("functions/_kci-storage", completion.stdout.encode())
    script = "fpath=(functions $fpath); autoload -U compinit; compinit -D; autoload +X _kci-storage || exit"
    script += "; print $_comps[kci-storage]"
    result = subprocess.run(
        ["zsh", "-f", "-c", script], cwd=local_client.folder, capture_output=True, text=True, timeout=SECONDS
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "_kci-storage", "")


def test_the_client_needs_nothing_of_the_server():
    others = ["flask", "werkzeug", "gunicorn", "azure", "jwt", "portalocker", "prometheus_client", "psutil"]
    block = f"import sys; sys.modules.update(dict.fromkeys({others!r}))"
    code = f"{block}; import kci_storage.cli.client, kci_storage.client.actions, kci_storage.cli.completion"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)


def test_it_works_without_the_libraries_for_show(local_client, local_server):
    top = new_folder()
    put(local_server, f"{top}/a", b"1")
    code = "import sys; sys.modules.update(tqdm=None, shtab=None); import kci_storage.cli.__main__"
    options = local_client._options(("download", f"{top}/a"), {})
    options["args"][1:3] = ["-c", code]
    assert_done(subprocess.run(text=True, capture_output=True, timeout=SECONDS, **options))
    options["args"][3:] = ["completion", "bash"]
    result = subprocess.run(text=True, capture_output=True, timeout=SECONDS, **options)
    assert_failed(result, "pip install 'kci-storage[client]'", code=2)


# Usage, and what is written about it


@pytest.mark.parametrize(
    "arguments",
    [
        ["upload"], ["download"], ["rm"], ["stat"], ["completion", "fish"], ["upload", "a", "--jobs", "0"],
        ["upload", "a", "-j", "65"], ["ls", "--retries", "-1"], ["ls", "a", "b"],
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_2(local_client, arguments):
    result = local_client(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: kci-storage")


def options_of_the_parser() -> dict[str, set[str]]:
    """The client's commands, and the options of each."""
    [commands] = [action for action in cli._parser()._actions if hasattr(action, "choices") and action.choices]
    return {
        name: {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        for name, parser in commands.choices.items()
        if parser.get_default("action") or name == "completion"
    }


def test_every_command_and_option_is_documented_and_no_other():
    commands = options_of_the_parser()
    for name in commands:
        assert f"kci-storage {name} " in DOCUMENT or f"`{name} " in DOCUMENT, name
    spans = re.findall(r"```sh\n(.*?)```", DOCUMENT, flags=re.DOTALL) + re.findall(r"`([^`\n]+)`", DOCUMENT)
    written = {option for span in spans for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", span)}
    assert written == set().union(*commands.values())


def test_the_exit_codes_are_documented():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCUMENT, flags=re.MULTILINE)}
    assert codes == {actions.DONE, actions.FAILED, actions.USAGE, actions.INTERRUPTED}
