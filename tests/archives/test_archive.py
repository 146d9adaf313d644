# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives over HTTP: what is stored, and what is refused as a whole."""

from __future__ import annotations

import gzip
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from kci_storage.archives.files import Budget
from tests.archives.test_unpacking import COMPRESS, ZEROS, entry, pax
from tests.monitoring.test_metrics import scrape
from tests.support.backends import Pauses
from tests.support.harness import Server, running, wait_until
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Wire,
    access,
    form,
    get,
    keys,
    logged,
    new_folder,
    part,
    put,
    request,
    wait_until_tidy,
)

MIB = 1 << 20
SMALL = {"max_files": 20, "max_file_bytes": MIB, "max_total_bytes": 4 * MIB}
CONTENT = {
    "Image": random.Random(1).randbytes(300_000),
    "dtbs/a.dtb": b"tree",
    "dtbs/é/b.dtb": bytes(70_000),
    "logs/build.log": b"built\n",
    "empty": b"",
}


def tar(content: Mapping[str, bytes] = CONTENT) -> bytes:
    """A tar archive, with folders as `tar -c .` has them."""
    folders = entry("./", kind=tarfile.DIRTYPE) + entry("./dtbs/", kind=tarfile.DIRTYPE)
    return folders + b"".join(entry(f"./{name}", data) for name, data in content.items()) + ZEROS


def post(
    server: Server, folder: str, data: bytes, name: str = "a.tar", headers: Mapping[str, str] | None = None
) -> requests.Response:
    """Send an archive."""
    return post_parts(server, part("path", folder.encode()), part("archive", data, name), headers=headers)


def post_parts(server: Server, *parts: bytes, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Send a form."""
    return requests.post(
        f"{server.url}/v1/archive",
        form(*parts),
        headers={**server.headers(), **FORM_TYPE, **(headers or {})},
        timeout=4 * SECONDS,
    )


def assert_stored(response: requests.Response, folder: str, content: Mapping[str, bytes] = CONTENT) -> None:
    """Check that every file of the archive was stored."""
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert response.json() == {
        "status": "ok",
        "uploaded": len(content),
        "failed": 0,
        "bytes": sum(map(len, content.values())),
        "prefix": folder,
        "failures": [],
    }


def assert_refused(response: requests.Response, server: Server, folder: str, status: int = 400) -> str:
    """Check that nothing of the archive was stored or left behind; returns the reason of the refusal."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    [reason] = response.json()["failures"]
    assert response.json() == {
        "status": "error", "uploaded": 0, "failed": 0, "bytes": 0, "prefix": folder, "failures": [reason],
    }  # fmt: skip
    assert len(reason.splitlines()) == 1
    for secret in ("Traceback", str(server.folder), server.secret):
        assert secret not in reason
    assert keys(server, folder) == []
    wait_until_tidy(server)
    return reason


@pytest.fixture(scope="module")
def shared_limited_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of the fixture ``limited``."""
    document = {"archive": SMALL, "server": {"max_upload_bytes": 64 * MIB}}
    with running(Server(tmp_path_factory.mktemp("limited"), document)) as server:
        yield server


@pytest.fixture
def limited(shared_limited_server: Server) -> Server:
    """A server with small limits."""
    return shared_limited_server


# Stored archives


@pytest.mark.parametrize("order", ["path first", "archive first"])
@pytest.mark.parametrize("suffix", ["tar", *COMPRESS])
def test_every_file_is_stored(server: Server, suffix: str, order: str):
    folder = new_folder()
    data = COMPRESS.get(suffix, bytes)(tar())
    unknown = [part("comment"), part("file0", b"not stored", "x")]
    parts = [part("path", folder.encode()), *unknown, part("archive", data, "x")]
    response = post_parts(server, *(parts if order == "path first" else reversed(parts)))
    assert_stored(response, folder)
    assert sorted(keys(server, folder)) == sorted(f"{folder}/{name}" for name in CONTENT)
    for name, content in CONTENT.items():
        answer = get(server, f"{folder}/{name}")
        assert (answer.status_code, answer.content, answer.headers["X-Cache"]) == (200, content, "hit")
    assert get(server, f"{folder}/logs/build.log").headers["Content-Type"] == "text/plain; charset=utf-8"
    wait_until_tidy(server)


@pytest.mark.parametrize("path", ["{}/", "/{}", "//{}//"])
def test_spare_slashes_of_the_path_do_not_count(local_server: Server, path: str):
    folder = new_folder()
    assert_stored(post(local_server, path.format(folder), tar()), folder)


@pytest.mark.parametrize("path", ["", "/", "."])
def test_the_path_may_be_the_root(local_server: Server, path: str):
    folder = new_folder()
    assert_stored(post(local_server, path, tar({f"{folder}/a": b"1"})), "", {"a": b"1"})
    assert get(local_server, f"{folder}/a").content == b"1"


def test_the_archive_may_be_a_plain_field(local_server: Server):
    folder = new_folder()
    assert_stored(post_parts(local_server, part("archive", tar()), part("path", folder.encode())), folder)


def test_files_are_replaced(server: Server):
    folder = new_folder()
    put(server, f"{folder}/a", b"old")
    assert_stored(post(server, folder, tar({"a": b"new", "b": b"1"})), folder, {"a": b"new", "b": b"1"})
    assert_stored(post(server, folder, tar({"a": b"newer"})), folder, {"a": b"newer"})
    assert get(server, f"{folder}/a").content == b"newer"
    assert get(server, f"{folder}/b").content == b"1"


def test_of_two_files_of_one_name_the_last_is_stored(server: Server):
    folder = new_folder()
    data = b"".join(entry(name, name.encode() + b"!" * 1000) for name in ("a", "b", "./a", "b", ".//a")) + ZEROS
    response = post(server, folder, data)
    assert (response.status_code, response.json()["uploaded"]) == (200, 2)
    assert get(server, f"{folder}/a").content == b".//a" + b"!" * 1000
    assert get(server, f"{folder}/b").content == b"b" + b"!" * 1000


def test_the_type_may_be_said_for_all(local_server: Server):
    folder = new_folder()
    assert_stored(post(local_server, folder, tar(), headers={"Content-Type-Upstream": "text/x-tree"}), folder)
    assert get(local_server, f"{folder}/dtbs/a.dtb").headers["Content-Type"].startswith("text/x-tree")


def test_it_may_come_in_chunks(local_server: Server):
    folder = new_folder()
    body = form(part("path", folder.encode()), part("archive", gzip.compress(tar()), "a.tgz"))
    pieces = (body[start : start + 5000] for start in range(0, len(body), 5000))
    headers = {**local_server.headers(), **FORM_TYPE}
    assert_stored(requests.post(f"{local_server.url}/v1/archive", pieces, headers=headers, timeout=SECONDS), folder)


def test_the_log_names_user_and_key_of_each_file(local_server: Server):
    folder = new_folder()
    response = post(local_server, folder, tar())
    assert access(local_server, response)["user"] == "user@example.com"
    request_id = response.headers["X-Request-ID"]
    lines = logged(local_server, request_id, "stored")
    assert {line["key"] for line in lines} == {f"{folder}/{name}" for name in CONTENT}
    assert {line["user"] for line in lines} == {"user@example.com"}
    [line] = logged(local_server, request_id, "archive_stored")
    assert (line["prefix"], line["uploaded"], line["failed"]) == (folder, str(len(CONTENT)), "0")


# Refused archives: nothing is stored


HOSTILE = {
    "absolute": (entry("/etc/passwd", b"x"), "leads out"),
    "dots": (entry("a/../../b", b"x"), "leads out"),
    "dots in pax": (pax(("path", b"../b")) + entry("b", b"x"), "leads out"),
    "dots in a long name": (entry("././@LongLink", b"../b\0", tarfile.GNUTYPE_LONGNAME) + entry("b"), "leads out"),
    "folder": (entry("../x/", kind=tarfile.DIRTYPE), "leads out"),
    "symbolic link": (entry("b", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "hard link": (entry("b", kind=tarfile.LNKTYPE, linkname="good"), "a link"),
    "device": (entry("b", kind=tarfile.CHRTYPE), "a device"),
    "pipe": (entry("b", kind=tarfile.FIFOTYPE), "a named pipe"),
    "sparse": (entry("b", kind=tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "sparse in pax": (
        pax(("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")) + entry("b", b"x"),
        "a sparse file",
    ),
    "unknown": (entry("b", kind=b"Z"), "neither a file nor a folder"),
    "not UTF-8": (entry(b"b\xff", b"x"), "not UTF-8"),
    "not UTF-8 in pax": (pax(("path", b"b\xff")) + entry("b", b"x"), "not UTF-8"),
    "control character": (entry("b\n", b"x"), "control character"),
    "backslash": (entry("b\\c", b"x"), "backslash"),
    "no name": (entry(".", b"x"), "file name is empty"),
    "long name": (pax(("path", b"n/" * 600 + b"x")) + entry("b", b"x"), "more than 1024"),
    "long segment": (pax(("path", b"n" * 300)) + entry("b", b"x"), "255 bytes"),
    "long header": (entry("b", kind=tarfile.XHDTYPE, size=2**33), "too long"),
    "large in pax": (pax(("size", b"99999999999")) + entry("b", b"x"), "more than 1.0 MiB"),
    "no number": (pax(("size", b"many")) + entry("b", b"x"), "size makes no sense"),
    "negative": (entry("b", size=-1), "size makes no sense"),
    "file too large": (entry("b", bytes(MIB + 1)), "more than 1.0 MiB"),
    "all too large": (b"".join(entry(f"f{n}", bytes(MIB)) for n in range(5)), "more than 4.0 MiB"),
    "too many": (b"".join(entry(f"f{n}") for n in range(21)), "more than 20 files"),
    "broken header": (b"\x01" * 512, "makes no sense"),
}


BAD_KEYS = {
    "not UTF-8", "not UTF-8 in pax", "control character", "backslash", "no name", "long name", "long segment",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_as_a_whole(limited: Server, name: str):
    folder = new_folder()
    bad, says = HOSTILE[name]
    data = gzip.compress(entry("good", b"1") + bad + entry("good too", b"2") + ZEROS)
    assert says in assert_refused(post(limited, folder, data), limited, folder)
    known = folder if name in BAD_KEYS else ""  # other errors are found before the path has come
    response = post_parts(limited, part("archive", data, "a"), part("path", folder.encode()))
    assert says in assert_refused(response, limited, known)


@pytest.mark.parametrize("suffix", ["tar", *COMPRESS])
def test_an_archive_that_is_cut_short_is_refused(local_server: Server, suffix: str):
    folder = new_folder()
    data = COMPRESS.get(suffix, bytes)(tar())
    for cut in (0, 3, len(data) // 2, len(data) - 1025):
        response = post(local_server, folder, data[:cut], f"a.{suffix}")
        assert "cut short" in assert_refused(response, local_server, folder)


def test_10001_files_are_too_many(local_server: Server):
    folder = new_folder()
    data = gzip.compress(b"".join(entry(f"d{n % 100}/f{n}") for n in range(10_001)) + ZEROS, 1)
    reason = assert_refused(post(local_server, folder, data), local_server, folder)
    assert reason == "the archive has more than 10000 files"


def test_a_file_of_more_than_512_mib_is_refused_by_its_header(local_server: Server):
    folder = new_folder()
    reason = assert_refused(post(local_server, folder, entry("a", size=512 * MIB + 1)), local_server, folder)
    assert reason == "the archive's file 'a' has more than 512.0 MiB"


def test_a_bomb_is_refused_before_the_rest_of_it_is_sent(limited: Server):
    folder = new_folder()
    data = gzip.compress(entry("a") + ZEROS + bytes(64 * MIB))[:20_000]
    body = form(part("path", folder.encode()), part("archive", data, "a"))[:-50]
    with Wire(limited) as wire:
        fields = {**limited.headers(), **FORM_TYPE, "Content-Length": 50_000_000}
        wire.send(request("POST", "/v1/archive", fields), body)
        answer = wire.answer()
    assert (answer.status, b"more than 4.0 MiB" in answer.body) == (400, True)
    assert keys(limited, folder) == []


@pytest.mark.parametrize("key", ["upload", "v1/x", "metrics", ".kci/x"])
def test_reserved_keys_are_refused(local_server: Server, key: str):
    response = post(local_server, "", tar({f"{new_folder()}": b"1", key: b"2"}))
    assert response.status_code == 400
    assert "reserved" in response.json()["failures"][0]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "no archive"),
        ([part("path", b"p")], "no archive"),
        ([part("archive", tar(), "a")], "no field path"),
        ([part("path", b"p"), part("path", b"p"), part("archive", tar(), "a")], "more than one field path"),
        ([part("path", b"p"), part("archive", tar(), "a"), part("archive", tar(), "a")], "more than one archive"),
        ([part("path", b"p/../q"), part("archive", tar(), "a")], "segment '..'"),
        ([part("path", b"\xff"), part("archive", tar(), "a")], "not UTF-8"),
        ([part("path", b"p" * 9000), part("archive", tar(), "a")], "too long"),
        ([part("path", b"p"), part("archive", ZEROS, "a")], "has no file"),
        ([part("path", b"p"), part("archive", b"hello" * 200, "a")], "not a tar archive"),
        ([part("path", b"p"), part("archive", b"", "a")], "cut short"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forms_that_are_none_of_an_archive_are_refused(limited: Server, parts: list[bytes], says: str):
    response = post_parts(limited, *parts)
    assert (response.status_code, response.json()["status"]) == (400, "error")
    assert says in response.json()["failures"][0]
    assert keys(limited, "") == []
    wait_until_tidy(limited)


def test_other_bodies_are_refused(local_server: Server):
    response = requests.post(f"{local_server.url}/v1/archive", tar(), headers=local_server.headers(), timeout=SECONDS)
    assert (response.status_code, response.json()["status"]) == (400, "error")


def test_an_archive_may_not_be_larger_than_an_upload(limited: Server):
    with Wire(limited) as wire:
        fields = {**limited.headers(), **FORM_TYPE, "Content-Length": 70 * MIB}
        wire.send(request("POST", "/v1/archive", fields))
        answer = wire.answer()
    assert (answer.status, answer.headers["Content-Type"]) == (413, "application/json")


# Permissions


def test_a_token_is_needed(local_server: Server):
    with Wire(local_server) as wire:
        wire.send(request("POST", "/v1/archive", {**FORM_TYPE, "Content-Length": 10**9}))
        answer = wire.answer()
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="kci-storage"')
    assert b'"failures": ["Unauthorized"]' in answer.body


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose user has permission for some folders."""
    document = {"users": [{"name": "user@example.com", "prefixes": ["/builds/mine", "/logs/x*"]}]}
    with running(Server(tmp_path_factory.mktemp("shared"), document)) as server:
        yield server


def test_each_key_needs_permission(shared: Server):
    assert_stored(post(shared, "builds/mine", tar()), "builds/mine")
    content = {"mine/a": b"1", "mine/b": b"2"}
    assert_stored(post(shared, "builds", tar(content)), "builds", content)
    assert_stored(post(shared, "", tar({"logs/x1": b"1"})), "", {"logs/x1": b"1"})
    stored = sorted(keys(shared, ""))
    for parts in (
        [part("path", b"builds"), part("archive", tar({**content, "mine/c": b"", "mined/d": b"3"}), "a")],
        [part("archive", tar({"new": b"1", "x1": b"1"}), "a"), part("path", b"logs")],
    ):
        response = post_parts(shared, *parts)
        assert (response.status_code, response.json()["status"]) == (403, "error")
        assert response.json()["failures"] == ["this token has no permission for this key"]
    assert sorted(keys(shared, "")) == stored


@pytest.mark.parametrize("folder", ["other", "build", "builds/mined", "logs/y", "logs/y/x"])
def test_where_nothing_may_be_written_the_archive_is_not_read(shared: Server, folder: str):
    body = form(part("path", folder.encode()), part("archive", b"", "a"))[:-60]
    with Wire(shared) as wire:
        fields = {**shared.headers(), **FORM_TYPE, "Content-Length": 10**9, "Expect": "100-continue"}
        wire.send(request("POST", "/v1/archive", fields))
        assert wire.head().status == 100
        wire.send(body)
        answer = wire.answer()
    assert (answer.status, b"no permission there" in answer.body) == (403, True)


# Failures


def test_a_client_that_leaves_has_stored_nothing(local_server: Server):
    folder = new_folder()
    body = form(part("path", folder.encode()), part("archive", tar(), "a"))
    for size in (len(body) - 1, len(body) - 200, len(body) // 2):
        with Wire(local_server) as wire:
            name = f"{folder}{size}"
            fields = {**local_server.headers(), **FORM_TYPE, "Content-Length": len(body), "X-Request-ID": name}
            wire.send(request("POST", "/v1/archive", fields), body[:size])
            wire.wait_until_taken()
            wire.reset()
        assert access(local_server, name)["status"] == "400"
    assert keys(local_server, folder) == []
    wait_until_tidy(local_server)


def test_a_file_that_cannot_be_stored_keeps_no_other_from_it(local_server: Server):
    folder = new_folder()
    put(local_server, f"{folder}/b", b"a file where the archive has a folder")
    content = {"a": b"1", "b/c": b"2", "b/d": b"3", "e": b"4"}
    before = scrape(local_server)
    response = post(local_server, folder, tar(content))
    document = response.json()
    assert (response.status_code, document["status"]) == (500, "partial_failure")
    assert (document["uploaded"], document["failed"], document["bytes"], document["prefix"]) == (2, 2, 2, folder)
    assert [line.partition(": ")[0] for line in document["failures"]] == [f"{folder}/b/c", f"{folder}/b/d"]
    assert all("is a file" in line for line in document["failures"]), document
    assert sorted(keys(local_server, folder)) == [f"{folder}/{name}" for name in ("a", "b", "e")]
    after = scrape(local_server)
    for name, label, count in (
        ("kci_storage_archives_total", "partial_failure", 1),
        ("kci_storage_archive_files_total", "ok", 2),
        ("kci_storage_archive_files_total", "failed", 2),
        ("kci_storage_uploads_total", "key_conflict", 2),
    ):
        series = (name, frozenset({("result", label)}))
        assert after[series] - before[series] == count, name


def test_archives_are_counted(limited: Server):
    results = ("ok", "bad_archive", "unauthorized")
    series = [("kci_storage_archives_total", frozenset({("result", result)})) for result in results]
    stored = ("kci_storage_archive_bytes_total", frozenset[tuple[str, str]]())
    before = scrape(limited)
    post(limited, new_folder(), tar())
    post(limited, new_folder(), b"hello")
    post(limited, new_folder(), tar(), headers={"Authorization": "nonsense"})
    after = scrape(limited)
    assert [after[name] - before[name] for name in series] == [1, 1, 1]
    assert after[stored] - before[stored] == sum(map(len, CONTENT.values()))
    assert after["kci_storage_archives_in_progress", frozenset()] == 0


def test_a_key_that_another_upload_holds_fails_alone(start_server: Callable[..., Server]):
    server = start_server(server={"lock_timeout": 0.2})
    with Wire(server) as wire:
        fields = {**server.headers(), "Content-Length": 100}
        wire.send(request("PUT", "/f/a", fields), b"begun")
        wait_until(server.is_writing, SECONDS, "the upload")
        response = post(server, "f", tar({"a": b"1", "b": b"2"}))
    assert response.json()["failures"] == [
        "f/a: another upload of this file has been running for 0.2 seconds; try later"
    ]
    assert (response.status_code, keys(server, "f")) == (500, ["f/b"])


def test_when_the_backend_is_away_the_rest_is_not_tried(start_server: Callable[..., Server]):
    server = start_server(
        "azure",
        azure={"endpoint": "http://127.0.0.1:9/account"},  # where no server listens
        server={"workers": 1},
        environ={"KCI_STORAGE_ARCHIVE_PARALLELISM": "3"},
    )
    response = post(server, "f", tar({f"f{number:02}": b"1" for number in range(40)}))
    document = response.json()
    assert (response.status_code, document["status"], document["uploaded"], document["failed"]) == (
        500, "partial_failure", 0, 40,
    )  # fmt: skip
    reasons = [line.partition(": ")[2] for line in document["failures"]]
    assert 30 < reasons.count("not tried, since the uploads before it failed") < 40
    assert "cannot be reached" in reasons[0]
    wait_until_tidy(server)


# Concurrency and memory


def test_as_many_files_are_uploaded_at_a_time_as_configured(start_server: Callable[..., Server], tmp_path: Path):
    """The limit is per worker, however many archives the files belong to."""
    pauses = Pauses(tmp_path, "local")
    server = start_server(
        "pausing", server={"workers": 1}, environ={**pauses.environ, "KCI_STORAGE_ARCHIVE_PARALLELISM": "3"}
    )
    content = {f"f{number}": b"1" for number in range(10)}
    with ThreadPoolExecutor(2) as clients:
        with pauses.during("before-commit"):
            responses = [clients.submit(post, server, folder, tar(content)) for folder in "ab"]
            wait_until(lambda: len(pauses.waiting("before-commit")) >= 3, SECONDS, "three uploads")
            wait_until(lambda: scrape(server)["kci_storage_archives_in_progress", frozenset()] == 2, SECONDS, "both")
            assert len(pauses.waiting("before-commit")) == 3
        for folder, response in zip("ab", responses, strict=True):
            assert_stored(response.result(), folder, content)


def test_archives_of_the_same_files_wait_for_each_other(server: Server):
    folder = new_folder()
    contents = [{f"f{number}": bytes([letter]) * 1000 for number in range(30)} for letter in b"abcd"]
    with ThreadPoolExecutor(4) as clients:
        for response in clients.map(lambda content: post(server, folder, tar(content)), contents):
            assert response.status_code == 200, response.text
    for number in range(30):
        assert get(server, f"{folder}/f{number}").content in [content[f"f{number}"] for content in contents]


def test_memory_is_bounded(start_server: Callable[..., Server]):
    """If all files were uploaded at once, they would need 380 MiB."""
    server = start_server("azure", server={"workers": 1})
    [pid] = server.worker_pids()
    post(server, "warm", tar())
    data = gzip.compress(tar({f"f{number}": bytes(6 * MIB) for number in range(64)}), 1)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is what it is now (proc(5))
    before = resident(pid, "VmRSS")
    assert post(server, "f", data).json()["uploaded"] == 64
    assert resident(pid, "VmHWM") - before < 220 * MIB


def resident(pid: int, name: str) -> int:
    """The resident memory in bytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def test_the_budget_is_for_all():
    budget = Budget(10)
    budget.acquire(6)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(budget.acquire, 5)
        assert not waiting.done()
        budget.release(1)
        waiting.result(SECONDS)
    budget.release(10)
