# SPDX-License-Identifier: LGPL-2.1-or-later
"""Large files of archives: sent to the backend while the archive is being received, committed only after its end."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest

from kci_storage.archives import files as archive_files
from kci_storage.archives import staging
from kci_storage.archives.files import MAX_STAGED, UPLOAD_MEMORY, ArchivePlan
from kci_storage.archives.run import ArchiveReport
from kci_storage.config.reading import load
from kci_storage.errors import StorageError
from kci_storage.http.multipart import READ_SIZE
from kci_storage.services import Services, build_services
from tests.archives.test_archive import post, resident
from tests.archives.test_unpacking import ZEROS, entry
from tests.monitoring.test_metrics import scrape
from tests.support.azurite import Azurite
from tests.support.cold import Bench, cold_bench
from tests.support.disks import small_disk
from tests.support.faultproxy import PUT, Say
from tests.support.harness import START_SECONDS, Server, toml, wait_until
from tests.support.wire import (
    BOUNDARY,
    FORM_TYPE,
    SECONDS,
    Answer,
    Wire,
    access,
    exchange,
    form,
    get,
    keys,
    new_folder,
    part,
    put,
    request,
    temporary_files,
    wait_until_tidy,
)

MIB = 1 << 20
LARGE = 10 * MIB  # bytes: two blocks
REST = entry("rest", bytes(300_000))  # follows the files of the test
BEGUN = 100_000  # bytes of ``rest`` that are sent as well, so that the server knows that the files have ended


def large(seed: int, size: int = LARGE) -> bytes:
    """Content of a file that is staged."""
    return random.Random(seed).randbytes(size)


def entries(content: Mapping[str, bytes]) -> bytes:
    """Files as a tar archive has them."""
    return b"".join(entry(name, data) for name, data in content.items())


class Sending:
    """An archive that is being sent: the server has got some files and the beginning of another one.

    :param begun: those files, in tar's form.
    :param end: what follows the file after them.
    :param parts: of the form, before the archive; and those after it.
    """

    def __init__(
        self,
        server: Server,
        begun: bytes,
        end: bytes = ZEROS,
        parts: tuple[bytes, ...] = (),
        parts_after: tuple[bytes, ...] = (),
    ):
        archive = part("archive", begun + REST + end, "a.tar")
        body = form(*parts, archive, *parts_after)
        self._body = memoryview(body)
        self._split = body.index(begun) + len(begun) + BEGUN
        self._server = server
        self._wire = Wire(server)
        self.request_id = new_folder()

    def __enter__(self) -> Self:
        fields = {**self._server.headers(), **FORM_TYPE, "X-Request-ID": self.request_id}
        self._wire.send(request("POST", "/v1/archive", {**fields, "Content-Length": len(self._body)}))
        self._wire.send(self._body[: self._split])
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._wire.close()

    def finish(self) -> Answer:
        """Send the rest; returns the answer."""
        self._wire.send(self._body[self._split :])
        return self._wire.answer()

    def leave(self) -> None:
        """Close the connection."""
        self._wire.wait_until_taken()
        self._wire.reset()


def sending(server: Server, folder: str, content: Mapping[str, bytes], end: bytes = ZEROS) -> Sending:
    """An archive of these files and ``rest``, partly sent."""
    return Sending(server, entries(content), end, parts=(part("path", folder.encode()),))


def staged(server: Server, key: str) -> int:
    """Bytes of a file that were sent to the backend: as many as its copy, or it, has on this machine's disk."""
    digest = hashlib.sha512(key.encode()).hexdigest()
    copies = list(server.cache_directory.glob(f"??/{digest}.*.part"))
    if server.document["driver"] == "local":
        copies = list((server.storage_path / ".kci" / "tmp").glob("*"))
    return size_of(copies)


def size_of(paths: Iterable[Path]) -> int:
    """The size of files in bytes; some may not exist any more."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def wait_until_staged(server: Server, key: str, size: int = LARGE) -> None:
    """Wait until a file has been sent completely."""
    wait_until(lambda: staged(server, key) == size, SECONDS, f"{key} to be staged")


def assert_all_stored(answer: Answer, server: Server, folder: str, content: Mapping[str, bytes]) -> None:
    """Check that the archive was stored, and is served."""
    assert answer.status == 200, answer.body
    assert sorted(keys(server, folder)) == sorted(f"{folder}/{name}" for name in (*content, "rest"))
    for name, data in content.items():
        assert get(server, f"{folder}/{name}").content == data, name
    wait_until_tidy(server)


# The order of events


def test_blocks_are_sent_while_the_archive_comes(bench: Bench) -> None:
    folder, content = new_folder(), {"a": large(1), "b": large(2)}
    with sending(bench.server, folder, content) as archive:
        for name in content:
            wait_until(lambda key=f"{folder}/{name}": blocks(bench, key) == 2, SECONDS, "the file's blocks")
        assert nothing_is_stored(bench, folder)
        assert get(bench.server, f"{folder}/a").status_code == 404
        answer = archive.finish()
    assert_all_stored(answer, bench.server, folder, content)
    assert get(bench.server, f"{folder}/a").headers["X-Cache"] == "hit"
    for name in content:
        assert (blocks(bench, f"{folder}/{name}"), commits(bench, f"{folder}/{name}")) == (2, 1)


def blocks(bench: Bench, key: str) -> int:
    """How many blocks of a file were sent to the backend."""
    return sum(each.operation == "PUT block" for each in bench.proxy.requests if each.key == key)


def commits(bench: Bench, key: str) -> int:
    """How many times the backend was asked to commit a file."""
    return sum(each.operation in ("PUT", "PUT blocklist") for each in bench.proxy.requests if each.key == key)


def nothing_is_stored(bench: Bench, folder: str) -> bool:
    """Whether the backend has no object, and was asked to commit none."""
    asked = sum(commits(bench, each.key) for each in list(bench.proxy.requests) if each.key.startswith(f"{folder}/"))
    return not asked and not list(bench.container.list_blob_names(name_starts_with=f"{folder}/"))


def test_files_go_to_their_disk_while_the_archive_comes(local_server: Server) -> None:
    folder, content = new_folder(), {"a": large(1)}
    with sending(local_server, folder, content) as archive:
        wait_until_staged(local_server, f"{folder}/a")
        assert keys(local_server, folder) == []
        answer = archive.finish()
    assert_all_stored(answer, local_server, folder, content)


def test_small_files_are_one_request_each(bench: Bench) -> None:
    folder = new_folder()
    content = {
        "large": large(1),
        "medium": large(2, staging.MIN_STAGED_SIZE),
        "small": large(3, staging.MIN_STAGED_SIZE - 1),
    }
    with sending(bench.server, folder, content) as archive:
        wait_until(lambda: blocks(bench, f"{folder}/large") == 2, SECONDS, "the large file's blocks")
        answer = archive.finish()
    assert_all_stored(answer, bench.server, folder, content)
    assert (blocks(bench, f"{folder}/medium"), commits(bench, f"{folder}/medium")) == (1, 1)
    assert (blocks(bench, f"{folder}/small"), commits(bench, f"{folder}/small")) == (0, 1)


def test_where_the_path_comes_last_nothing_is_sent_before(bench: Bench) -> None:
    folder, content = new_folder(), {"a": large(1)}
    before = len(bench.proxy.requests)
    with Sending(bench.server, entries(content), parts_after=(part("path", folder.encode()),)) as archive:
        wait_until(lambda: spooled(bench.server) > LARGE, SECONDS, "the archive")
        assert len(bench.proxy.requests) == before
        answer = archive.finish()
    assert_all_stored(answer, bench.server, folder, content)
    assert {each.key for each in bench.proxy.requests[before:] if each.operation == "PUT block"} == {f"{folder}/a"}
    assert blocks(bench, f"{folder}/a") == 2


def spooled(server: Server) -> int:
    """How many bytes of archives have been unpacked."""
    return size_of((server.cache_directory / "spool").iterdir())


# Archives that are refused at their end


REFUSED = {
    "dots": (entry("../x", b"x") + ZEROS, "leads out"),
    "link": (entry("x", kind=b"2", linkname="a") + ZEROS, "a link"),
    "cut short": (entry("x", bytes(1000))[:700], "cut short"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_archive_that_is_refused_at_its_end_has_stored_nothing(bench: Bench, name: str) -> None:
    folder = new_folder()
    end, says = REFUSED[name]
    with sending(bench.server, folder, {"a": large(1)}, end) as archive:
        wait_until_staged(bench.server, f"{folder}/a")
        answer = archive.finish()
    assert (answer.status, says.encode() in answer.body) == (400, True), answer.body
    assert nothing_is_stored(bench, folder)
    wait_until_tidy(bench.server)


def test_a_client_that_leaves_has_stored_nothing(server: Server) -> None:
    folder = new_folder()
    with sending(server, folder, {"a": large(1)}) as archive:
        wait_until_staged(server, f"{folder}/a")
        archive.leave()
    assert access(server, archive.request_id)["status"] == "400"
    assert keys(server, folder) == []
    wait_until_tidy(server)


def test_without_permission_nothing_is_sent(start_server: Callable[..., Server]) -> None:
    server = start_server(users=[{"name": "user@example.com", "prefixes": ["f/mine"]}])
    with sending(server, "f", {"mine/a": large(1), "other/a": large(2)}) as archive:
        answer = archive.finish()
    assert (answer.status, keys(server, "")) == (403, [])
    wait_until_tidy(server)


# The same file from elsewhere


def test_of_two_files_of_one_name_the_last_is_stored(bench: Bench) -> None:
    folder = new_folder()
    first, second = large(1), large(2, LARGE + MIB)
    with Sending(
        bench.server,
        entry("a", first) + entry("./a", second) + entry("b", first) + entry("b", b"small"),
        parts=(part("path", folder.encode()),),
    ) as archive:
        wait_until_staged(bench.server, f"{folder}/a", len(second))  # alone
        wait_until(lambda: not staged(bench.server, f"{folder}/b"), SECONDS, "the replaced one to be given up")
        answer = archive.finish()
    assert_all_stored(answer, bench.server, folder, {"a": second, "b": b"small"})


def test_archives_of_the_same_files_do_not_wait_for_each_other(server: Server) -> None:
    folder = new_folder()
    contents = [{"a": large(1), "b": large(2)}, {"b": large(3), "a": large(4)}]
    with sending(server, folder, contents[0]) as one, sending(server, folder, contents[1]) as other:
        wait_until(lambda: all_staged(server, folder, 2), SECONDS, "both to be staged")
        with ThreadPoolExecutor(2) as clients:
            answers = [clients.submit(archive.finish) for archive in (one, other)]
            assert [answer.result().status for answer in answers] == [200, 200]
    for name in "ab":
        assert get(server, f"{folder}/{name}").content in [content[name] for content in contents]
    wait_until_tidy(server)


def all_staged(server: Server, folder: str, times: int) -> bool:
    names = "a" if server.document["driver"] == "local" else "ab"  # there all files are seen at once
    size = len("ab") // len(names) * times * LARGE
    return all(staged(server, f"{folder}/{name}") == size for name in names)


@pytest.mark.parametrize("driver", ["local", "azure"])
def test_a_stalled_archive_delays_no_other_request(start_server: Callable[..., Server], driver: str) -> None:
    server = start_server(driver, server={"lock_timeout": 0.5})
    for other in (b"small", large(2), None):
        put(server, "f/a", b"old")
        content = {"a": large(1)}
        with sending(server, "f", content) as archive:
            wait_until_staged(server, "f/a")
            replace(server, "f/a", other)
            answer = archive.finish()
        assert_all_stored(answer, server, "f", content)


def replace(server: Server, key: str, content: bytes | None) -> None:
    """Overwrite a key, or delete it."""
    if content is None:
        assert exchange(server, request("DELETE", f"/{key}", server.headers())).status == 204
        assert key not in keys(server, "")
    else:
        assert put(server, key, content).status_code == 200
        assert get(server, key).content == content


def test_one_thread_is_enough(start_server: Callable[..., Server]) -> None:
    server = start_server("local", environ={"KCI_STORAGE_ARCHIVE_PARALLELISM": "1"})
    content = {f"f{number}": large(number, 3 * MIB) for number in range(4)} | {"small": b"1"}
    with sending(server, "f", content) as archive:
        assert_all_stored(archive.finish(), server, "f", content)


# Failures


def test_a_file_that_cannot_be_staged_is_sent_at_the_end(bench: Bench) -> None:
    folder, content = new_folder(), {"a": large(1), "b": large(2)}
    before = scrape(bench.server)
    rule = bench.proxy.inject(Say(403, "AuthorizationFailure"), PUT, f"{folder}/a")
    with sending(bench.server, folder, content) as archive:
        wait_until(lambda: rule.hits and not staged(bench.server, f"{folder}/a"), SECONDS, "it to fail")
        rule.end()
        answer = archive.finish()
    assert_all_stored(answer, bench.server, folder, content)
    after = scrape(bench.server)
    changed = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    uploads = {dict(labels)["result"]: by for (name, labels), by in changed.items() if "uploads_total" in name}
    assert uploads == {"ok": 3}
    assert after["kci_storage_archives_in_progress", frozenset()] == 0


def test_a_file_that_cannot_be_committed_has_failed_alone(bench: Bench) -> None:
    folder = new_folder()
    with sending(bench.server, folder, {"a": large(1), "b": large(2)}) as archive:
        wait_until(lambda: blocks(bench, f"{folder}/b") == 2, SECONDS, "the blocks")
        wait_until_staged(bench.server, f"{folder}/a")
        bench.proxy.inject(Say(403, "AuthorizationFailure"), key=f"{folder}/a", kind=None)
        answer = archive.finish()
    assert (answer.status, b'"uploaded": 2, "failed": 1' in answer.body) == (500, True), answer.body
    assert sorted(bench.container.list_blob_names(name_starts_with=folder)) == [f"{folder}/b", f"{folder}/rest"]
    wait_until_tidy(bench.server)


def test_staged_copies_are_dropped_when_the_disk_is_full(azurite: Azurite, tmp_path: Path) -> None:
    """The disk has space for the archive, but not for a copy of its first file as well."""
    content = {"a": large(1), "b": large(2)}
    with small_disk(tmp_path / "cache", 26 * MIB), cold_bench(azurite, tmp_path, {}) as bench:
        with Sending(
            bench.server, entry("a", content["a"]), entry("b", content["b"]) + ZEROS, parts=(part("path", b"f"),)
        ) as archive:
            wait_until_staged(bench.server, "f/a")
            answer = archive.finish()
        assert_all_stored(answer, bench.server, "f", content)


@pytest.mark.expected_errors(r"was sent SIGKILL|was terminated")
@pytest.mark.parametrize("driver", ["local", "azure"])
def test_a_worker_that_dies_has_stored_nothing(start_server: Callable[..., Server], driver: str) -> None:
    server = start_server(driver)
    put(server, "f/a", b"old")
    with sending(server, "f", {"a": large(1)}):
        wait_until_staged(server, "f/a")
        [pid] = {pid for path in temporary_files(server) for pid in server.holders(path)}
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in (pids := server.worker_pids()) and len(pids) == 2, START_SECONDS, "a successor")
    assert get(server, "f/a").content == b"old"
    server.restart()
    server.wait_until_swept()
    assert (get(server, "f/a").content, temporary_files(server)) == (b"old", [])
    with sending(server, "f", {"a": large(2)}) as archive:
        assert_all_stored(archive.finish(), server, "f", {"a": large(2)})


# Memory and shared limits, seen from within


def test_memory_is_bounded(start_server: Callable[..., Server]) -> None:
    """If staged files were kept in memory until the archive's end, they would need 290 MiB."""
    server = start_server("azure", server={"workers": 1})
    [pid] = server.worker_pids()
    post(server, "warm", entry("a") + ZEROS)
    data = gzip.compress(entries({f"f{number}": bytes(24 * MIB) for number in range(12)}) + ZEROS, 1)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is what it is now (proc(5))
    before = resident(pid, "VmRSS")
    assert post(server, "f", data).json()["uploaded"] == 12
    assert resident(pid, "VmHWM") - before < 220 * MIB


class Service:
    """The parts of a worker that receive archives, with a folder of files as if on another machine."""

    def __init__(self, folder: Path):
        path = folder / "config.toml"
        folders = {"cache": {"directory": folder / "cache"}, "local": {"storage_path": folder / "storage"}}
        path.write_text(toml({"driver": "local", "jwt_secret": "x" * 32, **folders}))
        self.services: Services = build_services(load(path))
        self.uploader = self.services.archives.uploader
        self.temporary = folder / "storage" / ".kci" / "tmp"

    def store(self, body: Body) -> ArchiveReport:
        """Receive and store an archive."""
        plan = ArchivePlan(
            admit_folder=lambda folder: None,
            admit=lambda key: None,
            content_type=lambda key: "text/plain",
            tags=lambda key: {},
            stored=lambda stored: None,
        )
        return self.services.archives.store(body, BOUNDARY.encode(), plan)

    def staged(self) -> int:
        """Bytes that are staged."""
        return size_of(self.temporary.glob("*"))

    def holds_nothing(self) -> bool:
        """Whether the limits that archives share are unused."""
        free = self.uploader.memory._free, self.uploader.staged._value
        return free == (UPLOAD_MEMORY, MAX_STAGED)


class Body:
    """An archive's form, whose rest is sent when the test allows it."""

    def __init__(self, begun: bytes, end: bytes = ZEROS):
        self._whole = memoryview(form(part("path", b"f"), part("archive", begun + REST + end, "a.tar")))
        self._stop = bytes(self._whole).index(begun) + len(begun) + BEGUN
        self._position = 0
        self.length = len(self._whole)
        self.rest = threading.Event()

    def readinto(self, buffer: memoryview) -> int:
        if self._position == self._stop:
            assert self.rest.wait(SECONDS)
            self._stop = len(self._whole)
        size = min(len(buffer), READ_SIZE, self._stop - self._position)
        buffer[:size] = self._whole[self._position : self._position + size]
        self._position += size
        return size


@contextmanager
def receiving(service: Service, body: Body) -> Iterator[Future[ArchiveReport]]:
    """The future outcome of an archive, whose rest is sent after the block."""
    with ThreadPoolExecutor(1) as client:
        try:
            yield client.submit(service.store, body)
        finally:
            body.rest.set()


@pytest.mark.parametrize("end", [ZEROS, b"\x01" * 512], ids=["accepted", "refused"])
def test_a_staged_file_that_waits_for_the_archives_end_holds_no_memory(tmp_path: Path, end: bytes) -> None:
    service = Service(tmp_path)
    body = Body(entry("a", large(1)) + entry("b", large(2)) + entry("a", large(3)), end)
    with receiving(service, body) as report:
        wait_until(lambda: service.staged() == 2 * LARGE, SECONDS, "two files to be staged")
        wait_until(lambda: service.uploader.memory._free == UPLOAD_MEMORY, SECONDS, "the memory to be released")
        assert service.uploader.staged._value < MAX_STAGED
    if end == ZEROS:
        assert report.result().uploaded == 3
    else:
        with pytest.raises(StorageError):
            report.result()
    assert service.holds_nothing()
    assert service.staged() == 0


@pytest.mark.parametrize("bound", ["of one archive", "of the worker", "of memory"])
def test_no_more_is_staged_than_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    if bound == "of one archive":
        monkeypatch.setattr(staging, "MAX_STAGED_OF_ONE", 1)
    elif bound == "of the worker":
        monkeypatch.setattr(archive_files, "MAX_STAGED", 1)
    service = Service(tmp_path)
    if bound == "of memory":
        service.uploader.memory.acquire(UPLOAD_MEMORY - 13 * MIB)
    content = {name: large(seed) for seed, name in enumerate("abc")}
    body = Body(entries(content))
    with receiving(service, body) as report:
        wait_until(lambda: service.staged() >= LARGE, SECONDS, "one to be staged")
        if bound != "of memory":  # there it is a matter of when the first one has ended
            assert service.staged() == LARGE
    assert report.result().uploaded == 4


def test_waiting_uploads_get_memory_before_staging() -> None:
    budget = archive_files.Budget(10)
    budget.acquire(8)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(budget.acquire, 5)
        wait_until(lambda: budget._waiting, SECONDS, "the thread to wait")
        assert not budget.try_acquire(1)
        budget.release(8)
        waiting.result(SECONDS)
    assert not budget.try_acquire(6)
    assert budget.try_acquire(5)
