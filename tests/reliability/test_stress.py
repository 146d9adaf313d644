# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many clients of a server whose workers are killed all the time: nothing torn, nothing stale, nothing left behind.

``KCI_STORAGE_STRESS_SECONDS`` is how long, ``KCI_STORAGE_STRESS_SEED`` what the clients' choices begin with.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import requests

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import last_use
from tests.reliability.history import Kind, Operation, violations
from tests.support.harness import START_SECONDS, Server, wait_until
from tests.support.peers import peers
from tests.support.wire import SECONDS, temporary_files

DURATION = float(os.environ.get("KCI_STORAGE_STRESS_SECONDS", "10"))  # seconds
SEED = int(os.environ.get("KCI_STORAGE_STRESS_SEED", str(random.SystemRandom().randrange(10**6))))
CLIENTS, WORKERS = 6, 3
KEYS = ("stress/a.txt", "stress/b.bin", "stress/folder/c.log", "stress/folder/d")
KILL_EVERY = (0.3, 1.5)  # seconds
EVICT_EVERY = 0.05  # seconds
LINE, HEAD = 1024, 64  # bytes; a line says at its beginning what it is of
SIZES = ((64, 1), (100_000, 16), (8 * 1024**2, 64))  # bytes: of a kind of files, and more for each version
VERSIONS = 4096  # more than a client uploads
WANTED = ("upload 200", "read 200", "read 404", "delete 204")


# Versions: each says whose it is and which, on every line


def size_of(version: int) -> int:
    """How many bytes a version has; no other one has as many. Azure gets the largest in blocks."""
    [(base, step)] = random.Random(version).choices(SIZES, [5, 4, 1])
    return base + step * version


def version_of(size: int) -> int:
    """The version of a content of this size; the reverse of :func:`size_of`.

    >>> all(version_of(size_of(version)) == version for version in range(VERSIONS, 10 * VERSIONS, 7))
    True
    """
    base, step = max(kind for kind in SIZES if kind[0] <= size)
    return (size - base) // step


def content_of(key: str, version: int) -> bytes:
    """A version's content.

    >>> content_of("k", 7)[:64]
    b'k 7 0                                                          .'
    """
    size = size_of(version)
    lines = (f"{key} {version} {number}".ljust(HEAD - 1, " ").ljust(LINE, ".") for number in range(-(-size // LINE)))
    return "".join(lines).encode()[:size]


# Clients


@dataclass(frozen=True)
class Setting:
    """The parameters of a client."""

    url: str
    headers: dict[str, str]
    seed: int
    first_version: int
    end: End


@dataclass(frozen=True)
class End:
    """When there has been enough of it: after some time, but not before each outcome that matters was seen.

    On a busy machine a few seconds are time for a few requests, of which some meet no worker.
    """

    folder: Path  # has a file for each outcome that some client has seen
    until: float  # on the monotonic clock, which is the same for all processes

    def saw(self, outcome: str) -> None:
        """An outcome was seen: the end need not wait for it any more."""
        if outcome in WANTED:
            (self.folder / outcome).touch()

    def has_come(self) -> bool:
        """Whether the test may end."""
        return time.monotonic() > self.until and len(os.listdir(self.folder)) == len(WANTED)


def be_client(setting: Setting) -> tuple[list[Operation], Counter[str], list[str]]:
    """For a peer: use the server until the end.

    :returns: what was done, how often what came out, and what was wrong with contents.
    """
    client = Client(setting)
    while not setting.end.has_come():
        client.do_something()
    return client.operations, client.outcomes, client.wrong


class Client:
    """A client that sends random requests, and records them."""

    def __init__(self, setting: Setting):
        self._url = setting.url
        self._headers = setting.headers
        self._random = random.Random(setting.seed)
        self._next_version = setting.first_version
        self.operations: list[Operation] = []
        self._end = setting.end
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def do_something(self) -> None:
        """One request."""
        key = self._random.choice(KEYS)
        [action] = self._random.choices(
            [self._put, self._post, self._delete, self._get, self._get_range, self._head], [20, 8, 5, 55, 7, 5]
        )
        action(key)

    def _request(self, method: str, path: str, **options: Any) -> requests.Response | None:
        """An answer with its whole body, or None. Each has a connection of its own: any worker may answer."""
        headers = {**self._headers, "Accept-Encoding": "identity", **options.pop("headers", {})}
        try:
            return requests.request(method, f"{self._url}/{path}", headers=headers, timeout=SECONDS, **options)
        except (requests.RequestException, ConnectionError):
            return None

    def _note(self, operation: Operation, answer: requests.Response | None) -> None:
        outcome = f"{operation.kind.value} {answer.status_code if answer is not None else 'failed'}"
        self.operations.append(operation)
        self.outcomes[outcome] += 1
        self._end.saw(outcome)

    # Writing

    def _new_version(self) -> int:
        self._next_version += 1
        assert self._next_version % VERSIONS, "it has uploaded more than it has names for"
        return self._next_version - 1

    def _put(self, key: str) -> None:
        version = self._new_version()
        body = content_of(key, version)
        begin = time.monotonic()
        answer = self._request("PUT", key, data=body)
        self._note_upload(key, version, begin, answer)

    def _post(self, key: str) -> None:
        """A form of one or two files."""
        chosen = sorted({key, self._random.choice(KEYS)})
        versions = [self._new_version() for _ in chosen]
        files = {
            f"file{number}": (name.removeprefix("stress/"), content_of(name, version))
            for number, (name, version) in enumerate(zip(chosen, versions, strict=True))
        }
        begin = time.monotonic()
        answer = self._request("POST", "upload", data={"path": "stress"}, files=files)
        for name, version in zip(chosen, versions, strict=True):
            self._note_upload(name, version, begin, answer)

    def _note_upload(self, key: str, version: int, begin: float, answer: requests.Response | None) -> None:
        end = time.monotonic() if answer is not None and answer.ok else inf
        self._note(Operation(Kind.UPLOAD, key, begin, end, version), answer)

    def _delete(self, key: str) -> None:
        begin = time.monotonic()
        answer = self._request("DELETE", key)
        now = time.monotonic()
        self._note(Operation(Kind.DELETE, key, begin, now if answer is not None and answer.ok else inf), answer)
        if answer is not None and answer.status_code == 404:  # it has seen that nothing is there
            self.operations.append(Operation(Kind.READ, key, begin, now))

    # Reading

    def _get(self, key: str) -> None:
        self._read(key, "GET")

    def _get_range(self, key: str) -> None:
        start = self._random.randrange(20 * LINE)
        self._read(key, "GET", {"Range": f"bytes={start}-{start + self._random.randrange(2 * LINE, 500 * LINE)}"})

    def _head(self, key: str) -> None:
        self._read(key, "HEAD")

    def _read(self, key: str, method: str, headers: dict[str, str] | None = None) -> None:
        begin = time.monotonic()
        answer = self._request(method, key, headers=headers or {})
        operation = Operation(Kind.READ, key, begin, time.monotonic())
        if answer is None or answer.status_code not in (200, 206, 404):
            self.outcomes[f"read {answer.status_code if answer is not None else 'failed'}"] += 1
        elif answer.status_code == 404:
            self._note(operation, answer)
        elif (version := self._version_in(key, answer)) is not None:
            self._note(replace(operation, version=version), answer)

    def _version_in(self, key: str, answer: requests.Response) -> int | None:
        """The version that was read, byte for byte; None: the answer does not say."""
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        start, size = (
            map(int, content_range.groups()) if content_range else (0, int(answer.headers["Content-Length"]))
        )
        if answer.request.method == "HEAD":
            return version_of(size)
        head = answer.content[-start % LINE :][:HEAD].split()
        if len(head) < 3:
            return None
        version = int(head[1])
        expected = content_of(key, version)
        if size != len(expected) or answer.content != expected[start : start + len(answer.content)]:
            self.wrong.append(f"{key}: {len(answer.content)} bytes from {start} are not those of version {version}")
        return version


def be_evictor(directory: Path, end: End) -> int:
    """For a peer: evict copies, young as they are, so that there are always some to be fetched; how many."""
    cache = Cache(directory)
    evicted = 0
    while not end.has_come():
        for file, status in cache.contents():
            evicted += cache.evict(Path(file.path), last_use(status))
        time.sleep(EVICT_EVERY)
    return evicted


# The test


@pytest.mark.expected_errors("was sent SIGKILL")
@pytest.mark.timeout(180 + 6 * DURATION)
@pytest.mark.parametrize("driver", ["local", "azure"])
def test_stress(start_server: Callable[..., Server], tmp_path: Path, driver: str) -> None:
    server = start_server(driver, server={"workers": WORKERS, "lock_timeout": 5})
    with peers(CLIENTS + 1) as [evictor, *clients]:
        end = End(tmp_path, time.monotonic() + DURATION)
        evictor.start(be_evictor, server.cache_directory, end)
        for number, client in enumerate(clients):
            setting = Setting(server.url, server.headers(), SEED + number, (number + 1) * VERSIONS, end)
            client.start(be_client, setting)
        kills = kill_workers(server, end)
        results = [client.answer() for client in clients]
        evicted = evictor.answer()
    history = [operation for operations, _, _ in results for operation in operations]
    outcomes = sum((outcomes for _, outcomes, _ in results), Counter())
    print(f"\n{driver}: seed {SEED}, {kills} kills, {evicted} evictions, {dict(sorted(outcomes.items()))}")
    history += final_reads(server, end)
    assert [problem for _, _, wrong in results for problem in wrong] == []
    assert violations(history) == [], f"seed {SEED}"
    leave_nothing(server)


def kill_workers(server: Server, end: End) -> int:
    """SIGKILL a worker now and then, but none before the server answers again; how many."""
    choice, kills = random.Random(SEED), 0
    while not end.has_come():
        time.sleep(choice.uniform(*KILL_EVERY))
        wait_until(lambda: answers(server), START_SECONDS, "a worker")
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(choice.choice(server.worker_pids()), signal.SIGKILL)
            kills += 1
    return kills


def answers(server: Server) -> bool:
    """Whether a worker answers."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{server.url}/v1/health", timeout=SECONDS).ok
    return False


def final_reads(server: Server, end: End) -> Iterator[Operation]:
    """When all is quiet, every worker serves the same."""
    for number in range(10 * WORKERS):
        client = Client(Setting(server.url, server.headers(), number, 0, end))
        for key in KEYS:
            client._get(key)
        assert client.outcomes["read failed"] == 0 and client.wrong == []
        yield from client.operations


def leave_nothing(server: Server) -> None:
    """A start sweeps what the dead have left; the harness then looks at what is there."""
    server.stop()
    Cache(server.cache_directory).sweep()
    server.start()
    server.wait_until_swept()
    server.stop()
    assert temporary_files(server) == []


# The judge


def up(version: int, begin: float, end: float) -> Operation:
    return Operation(Kind.UPLOAD, "key", begin, end, version)


def rm(begin: float, end: float) -> Operation:
    return Operation(Kind.DELETE, "key", begin, end)


def get(version: int | None, begin: float, end: float) -> Operation:
    return Operation(Kind.READ, "key", begin, end, version)


POSSIBLE = {
    "nothing yet": [get(None, 0, 1)],
    "what was uploaded": [up(1, 0, 1), get(1, 2, 3)],
    "what is being uploaded": [up(1, 0, 10), get(1, 2, 3), get(1, 4, 5)],
    "not yet what is being uploaded": [up(1, 0, 1), up(2, 2, 10), get(1, 3, 4), get(1, 9, 11)],
    "first not yet, then already": [up(1, 0, 1), up(2, 2, 10), get(1, 3, 4), get(2, 5, 6)],
    "either of two at once": [up(1, 0, 10), up(2, 0, 10), get(1, 11, 12), get(1, 13, 14)],
    "one of two at once, then the other": [up(1, 0, 10), up(2, 0, 10), get(1, 1, 2), get(2, 11, 12)],
    "a failure that had no effect": [up(1, 0, 1), up(2, 2, inf), get(1, 3, 4), get(1, 100, 101)],
    "a failure that had an effect": [up(1, 0, 1), up(2, 2, inf), get(2, 3, 4), get(2, 100, 101)],
    "a failure that has a late effect": [up(1, 0, 1), up(2, 2, inf), get(1, 50, 51), get(2, 100, 101)],
    "a late effect after another upload": [up(1, 0, inf), up(2, 2, 3), get(2, 4, 5), get(1, 6, 7)],
    "a reader that began before the change": [up(1, 0, 1), get(1, 2, 10), up(2, 3, 4)],
    "nothing after a deletion": [up(1, 0, 1), rm(2, 3), get(None, 4, 5)],
    "nothing during a deletion": [up(1, 0, 1), rm(2, 10), get(None, 3, 4), get(None, 5, 6)],
    "not yet nothing": [up(1, 0, 1), rm(2, 10), get(1, 3, 4)],
    "nothing after a deletion that failed": [up(1, 0, 1), rm(2, inf), get(1, 3, 4), get(None, 50, 51)],
    "a deletion and an upload at once": [up(1, 0, 1), rm(2, 10), up(2, 3, 9), get(None, 11, 12)],
    "deleted and uploaded again": [up(1, 0, 1), rm(2, 3), get(None, 4, 5), up(2, 6, 7), get(2, 8, 9)],
    "nothing while the first upload runs": [up(1, 0, 10), get(None, 1, 2), get(1, 3, 4)],
}
IMPOSSIBLE = {
    "stale after an overwrite": [up(1, 0, 1), up(2, 2, 3), get(1, 4, 5)],
    "stale after two overwrites at once": [up(1, 0, 1), up(2, 2, 5), up(3, 3, 6), get(1, 7, 8)],
    "stale after a deletion": [up(1, 0, 1), rm(2, 3), get(1, 4, 5)],
    "back to the old version": [up(1, 0, 1), up(2, 2, 10), get(2, 3, 4), get(1, 5, 6)],
    "back to the old one, both failed": [up(1, 0, inf), up(2, 0, inf), get(1, 1, 2), get(2, 3, 4), get(1, 5, 6)],
    "back to the old one after a failure was seen": [up(1, 0, 1), up(2, 2, inf), get(2, 3, 4), get(1, 5, 6)],
    "to and fro": [up(1, 0, 9), up(2, 0, 9), get(1, 10, 11), get(2, 12, 13)],
    "from the future": [get(1, 0, 1), up(1, 2, 3)],
    "from nowhere": [get(1, 0, 1)],
    "nothing after an upload": [up(1, 0, 1), get(None, 2, 3)],
    "nothing after an upload that was seen": [up(1, 0, inf), get(1, 1, 2), get(None, 3, 4)],
    "nothing after an upload after a deletion": [rm(0, 1), up(1, 2, 3), get(None, 4, 5)],
    "nothing, and then the same again": [up(1, 0, 1), rm(2, 10), get(None, 3, 4), get(1, 5, 6)],
    "a deletion that did nothing": [up(1, 0, 1), get(1, 2, 3), rm(4, 5), get(1, 6, 7)],
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_possible_histories_pass(name: str) -> None:
    assert violations(POSSIBLE[name]) == []


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_histories_are_found(name: str) -> None:
    assert violations(IMPOSSIBLE[name])


def test_keys_have_nothing_to_do_with_each_other() -> None:
    other = [replace(operation, key="other") for operation in (up(2, 2, 3),)]
    assert violations([up(1, 0, 1), *other, get(1, 4, 5)]) == []
