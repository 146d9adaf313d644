# SPDX-License-Identifier: LGPL-2.1-or-later
"""Downloads of stored files: from the cache, and from a folder."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from benchmarks import load
from benchmarks.measuring import OURS, P99, RATE, TIME, BenchError, Measure, Sample, Workload, cpu_seconds
from benchmarks.scale import KIB, MIB, size_text
from benchmarks.stage import Stage
from tests.support.harness import Server

CONNECTIONS = 32
UPLOADERS = 4
RANGES = 1000
_numbers = itertools.count()
SMALL, MEBIBYTE, LARGE = "hits/small", "hits/mebibyte", "hits/large.bin"


class Target(Protocol):
    """A server under load."""

    port: int

    @property
    def pid(self) -> int:
        """The process ID of its first process."""


class Ours:
    """One of our servers as a target."""

    def __init__(self, server: Server):
        self.port = server.port
        self.pid = server.process.pid


def workloads(stage: Stage) -> Iterator[Workload]:
    """The workloads of this group."""
    keys = _store(stage)
    local = _Load(stage, _targets(stage, stage.local_server))
    cached = _Load(stage, _targets(stage, _filled(stage, keys)))
    small, mebibytes = keys[SMALL], keys[MEBIBYTE]
    yield cached.many(size_text(4 * KIB), small, 4 * KIB)
    yield local.many(f"{size_text(4 * KIB)}, local driver", small, 4 * KIB)
    yield _Load(stage, _rules(stage)).many(f"{size_text(4 * KIB)}, every rule on", small, 4 * KIB)
    yield cached.unchanged("304 Not Modified", small)
    yield cached.many(size_text(MIB), mebibytes, MIB)
    yield cached.ranges(f"ranges of {size_text(MIB)} of {size_text(stage.scale.large)}", LARGE)
    yield cached.one(f"one download of {size_text(stage.scale.large)}", LARGE)


def rules(stage: Stage) -> Workload:
    """Hits with every rule, without rules, and again without rules; the last two differ by chance alone."""
    keys = _store_kind(stage, SMALL, stage.scale.small_files, 4 * KIB)
    targets = {**_rules(stage), "default rules again": Ours(stage.second_local_server)}
    return _Load(stage, targets).many(f"{size_text(4 * KIB)}, every rule on", keys, 4 * KIB)


def _targets(stage: Stage, server: Server) -> dict[str, Target]:
    """One of our servers and the yardsticks, in the order of their turns."""
    bare: dict[str, Target] = {"gunicorn": stage.gunicorn, "our worker": stage.worker}
    nginx = {"nginx": stage.nginx} if stage.nginx else {}
    return {OURS: Ours(server), **bare, **nginx}


def _rules(stage: Stage) -> dict[str, Target]:
    """Our server with every rule of access control, and with its default configuration."""
    return {OURS: Ours(stage.guarded_server), "default rules": Ours(stage.local_server)}


# The files


def _store(stage: Stage) -> dict[str, list[str]]:
    """Store files in the folder that all servers share; returns the keys by kind."""
    scale = stage.scale
    return {
        SMALL: _store_kind(stage, SMALL, scale.small_files, 4 * KIB),
        MEBIBYTE: _store_kind(stage, MEBIBYTE, scale.mebibyte_files, MIB),
        LARGE: _store_files(stage, [LARGE], scale.large),
    }


def _store_kind(stage: Stage, folder: str, count: int, size: int) -> list[str]:
    return _store_files(stage, [f"{folder}/{number:04}.bin" for number in range(count)], size)


def _store_files(stage: Stage, keys: list[str], size: int) -> list[str]:
    for key in keys:
        random_file(stage.files / key, size)
    return keys


def random_file(path: Path, size: int) -> None:
    """Write a file of random content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    block = os.urandom(min(size, MIB))
    with path.open("wb") as file:
        for number in range(0, size, len(block)):
            file.write(number.to_bytes(8, "big") + block[8:])


def _filled(stage: Stage, keys: Mapping[str, Sequence[str]]) -> Server:
    """The server with Azurite as its backend, with the same files in its cache."""
    server = stage.azure_server
    stage.progress("storing the files")
    put_all(server, (key for found in keys.values() for key in found), stage.files)
    return server


def put_all(server: Server, keys: Iterable[str], folder: Path) -> None:
    """Upload a folder's files to one of our servers."""

    def put(key: str) -> None:
        load.curl(f"{server.url}/{key}", "--upload-file", folder / key, *authorization(server), status=201)

    with ThreadPoolExecutor(UPLOADERS) as uploaders:
        list(uploaders.map(put, keys))


def authorization(server: Server) -> list[str]:
    """curl's options for a request with a valid token."""
    return ["--header", f"Authorization: {server.headers()['Authorization']}"]


# The loads


class _Load:
    """Puts a load on each of some servers."""

    def __init__(self, stage: Stage, targets: Mapping[str, Target]):
        self._stage = stage
        self._scale = stage.scale
        self._targets = targets

    def _workload(
        self, title: str, turn: Callable[[str, Target], Sample], measures: tuple[Measure, ...] = (RATE, P99)
    ) -> Workload:
        turns = {name: _bound(turn, name, target) for name, target in self._targets.items()}
        return Workload("hits", title, measures, turns)

    def many(self, title: str, keys: Sequence[str], size: int) -> Workload:
        """Downloads of whole objects of one size."""
        for target in self._targets.values():
            self._check(target, f"/{keys[-1]}", {}, 200, (self._stage.files / keys[-1]).read_bytes())
        requests = self._requests(f"/{key}" for key in keys)
        return self._workload(title, lambda _, target: self._wrk(target, requests, size))

    def unchanged(self, title: str, keys: Sequence[str]) -> Workload:
        """Conditional requests that are answered with 304."""
        requests = {name: self._conditions(target, keys) for name, target in self._targets.items()}
        return self._workload(title, lambda name, target: self._wrk(target, requests[name], 0))

    def _conditions(self, target: Target, keys: Sequence[str]) -> Path:
        tags = {key: load.ask(target.port, "GET", f"/{key}").headers["etag"] for key in keys}
        self._check(target, f"/{keys[0]}", {"If-None-Match": tags[keys[0]]}, 304, b"")
        return self._requests(f"/{key}\tIf-None-Match\t{tag}" for key, tag in tags.items())

    def ranges(self, title: str, key: str) -> Workload:
        """Downloads of random parts of a large file."""
        chance = random.Random(1)
        starts = [chance.randrange(self._scale.large - MIB) for _ in range(RANGES)]
        with (self._stage.files / key).open("rb") as file:
            file.seek(starts[0])
            expected = file.read(MIB)
        for target in self._targets.values():
            self._check(target, f"/{key}", {"Range": f"bytes={starts[0]}-{starts[0] + MIB - 1}"}, 206, expected)
        requests = self._requests(f"/{key}\tRange\tbytes={start}-{start + MIB - 1}" for start in starts)
        return self._workload(title, lambda _, target: self._wrk(target, requests, MIB))

    def one(self, title: str, key: str) -> Workload:
        """Downloads of a large file by one client."""
        return self._workload(title, lambda _, target: self._curl(target, key), (TIME,))

    def _curl(self, target: Target, key: str) -> Sample:
        before = cpu_seconds(target.pid)
        seconds = load.curl(f"http://127.0.0.1:{target.port}/{key}", downloaded=self._scale.large)
        return Sample((seconds,), cpu_seconds=cpu_seconds(target.pid) - before)

    def _wrk(self, target: Target, requests: Path, size: int) -> Sample:
        before = cpu_seconds(target.pid)
        arguments = (self._scale.seconds, self._stage.folder, "get.lua", requests)
        rate = load.wrk(target.port, CONNECTIONS, *arguments, body=size)
        return Sample((rate.per_second, 1000 * rate.p99), rate.requests, cpu_seconds(target.pid) - before)

    def _requests(self, lines: Iterable[str]) -> Path:
        """Write the file that get.lua reads."""
        path = self._stage.folder / f"requests-{next(_numbers)}.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    @staticmethod
    def _check(target: Target, path: str, headers: Mapping[str, str], status: int, body: bytes) -> None:
        """Check the bytes, which wrk does not see.

        :raises BenchError: they are wrong.
        """
        answer = load.ask(target.port, "GET", path, headers)
        if (answer.status, answer.body) != (status, body):
            raise BenchError(f"port {target.port}: GET {path} gave {answer.status} and {len(answer.body)} bytes")


def _bound(turn: Callable[[str, Target], Sample], name: str, target: Target) -> Callable[[], Sample]:
    return lambda: turn(name, target)
