# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects that are in no cache: through our server, nginx and Varnish, and directly from Azurite."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks import load
from benchmarks.hits import put_all, random_file
from benchmarks.measuring import OURS, RATE, BenchError, Measure, PrivateMemory, Sample, Workload, cpu_seconds
from benchmarks.scale import KIB, MIB, size_text
from benchmarks.stage import Stage
from benchmarks.yardsticks import LARGE_BUFFERS, Program
from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import last_use
from kci_storage.cache.names import CONTENT, FILL, PART
from tests.support.harness import Server, wait_until

CLIENTS, CROWD, FOLLOWERS, CONNECTIONS = 16, 50, 64, 16
SMALL = 16 * KIB  # bytes
FIRST_BYTE, TOTAL = Measure("s", "first byte"), Measure("s", "total")
MEMORY = Measure("MiB", "a worker's memory grows by")
FILL_SECONDS = 60
MEDIUM, CROWDED, FOLLOWED = "cold/medium.bin", "cold/crowded.bin", "cold/followed.bin"
_numbers = itertools.count()


class System(Protocol):
    """A cache in front of Azurite, or Azurite itself."""

    @property
    def port(self) -> int:
        """The port on which it listens."""

    @property
    def pid(self) -> int | None:
        """The first of its processes; None: its CPU time is not measured."""

    def path(self, key: str) -> str:
        """A key's path."""

    def forget(self, keys: Sequence[str]) -> None:
        """Make the objects cold again."""


def workloads(stage: Stage) -> Iterator[Workload]:
    """The workloads of this group."""
    scale, caches = stage.scale, _caches(stage)
    everything: dict[str, System] = {**caches, "Azurite": Direct(*stage.backend)}
    small = _store(stage)
    load_of = _Load(stage)
    load_of.check(everything)
    one, both = [MEDIUM], (TOTAL, FIRST_BYTE)
    turns = load_of.turns(everything, one, 1, scale.medium)
    yield Workload("cold", f"{size_text(scale.medium)}, one client", both, turns)
    turns = load_of.turns(caches, one * CLIENTS, CLIENTS, scale.medium)
    yield Workload("cold", f"{size_text(scale.medium)}, {CLIENTS} clients", both, turns)
    turns = load_of.turns(caches, [CROWDED] * CROWD, CROWD, scale.crowded)
    yield Workload("cold", f"{size_text(scale.crowded)}, {CROWD} clients", both, turns)
    turns = load_of.turns(everything, small, CONNECTIONS, SMALL, rate=True)
    yield Workload("cold", f"{len(small)} files of {size_text(SMALL)}", (RATE,), turns)
    turns = {OURS: lambda: load_of.memory(caches[OURS])}
    yield Workload("cold", f"{size_text(scale.followed)}, {FOLLOWERS} clients", (MEMORY,), turns)


def _caches(stage: Stage) -> dict[str, System]:
    """The caches, in the order of their turns."""
    caches: dict[str, System] = {OURS: Ours(stage.azure_server)}
    for name, buffers in (("nginx", ""), ("nginx, tuned", LARGE_BUFFERS)):
        folder = stage.new_folder(f"cache-{name}".replace(", ", "-"))
        if program := stage.nginx_cache(folder, buffers):
            caches[name] = NginxCache(program, folder / "cache")
    if varnish := stage.varnish():
        caches["Varnish"] = Varnish(varnish)
    return caches


def _store(stage: Stage) -> list[str]:
    """Store the objects in Azurite through our server, which adds digests; returns the keys of the small ones."""
    scale = stage.scale
    small = [f"cold/small/{number:04}.bin" for number in range(scale.cold_files)]
    sizes = {MEDIUM: scale.medium, CROWDED: scale.crowded, FOLLOWED: scale.followed, **dict.fromkeys(small, SMALL)}
    stage.progress("storing the cold objects")
    source = stage.new_folder("source")
    for key, size in sizes.items():
        random_file(source / key, size)
    put_all(stage.azure_server, sizes, source)
    return small


# The systems


class Ours:
    """Our server."""

    def __init__(self, server: Server):
        self.port = server.port
        self.pid = server.process.pid
        self._cache = Cache(server.cache_directory)

    def path(self, key: str) -> str:
        """A key's path."""
        return f"/{key}"

    def forget(self, keys: Sequence[str]) -> None:
        """Evict the copies, as housekeeping does."""
        for key in keys:
            digest = hashlib.sha512(key.encode()).hexdigest()
            files = partial((self._cache.directory / digest[:2]).glob, f"{digest}.*")
            wait_until(partial(_are_complete, files), FILL_SECONDS, f"the end of the fill of {key}")
            for path in files():
                if path.suffix == CONTENT and not self._cache.evict(path, last_use(path.stat())):
                    raise BenchError(f"{key} cannot be evicted")


def _are_complete(files: Callable[[], Iterable[Path]]) -> bool:
    """Whether no fill works on the entry that has these files."""
    return not any(path.suffix in (PART, FILL) for path in files())


class NginxCache:
    """nginx. Each round requests its own URLs, by a query that nginx does not pass on to Azurite."""

    def __init__(self, program: Program, directory: Path):
        self.port = program.port
        self.pid = program.pid
        self._directory = directory
        self._round = next(_numbers)

    def path(self, key: str) -> str:
        """A key's path."""
        return f"/{key}?{self._round}"

    def forget(self, keys: Sequence[str]) -> None:
        """Use another query from now on; the files are removed to free their space."""
        self._round = next(_numbers)
        for folder in self._directory.iterdir():
            shutil.rmtree(folder, ignore_errors=True)


class Varnish:
    """Varnish, whose configuration allows purging."""

    def __init__(self, program: Program):
        self.port = program.port
        self.pid = program.pid
        self._round = next(_numbers)

    def path(self, key: str) -> str:
        """A key's path."""
        return f"/{key}?{self._round}"

    def forget(self, keys: Sequence[str]) -> None:
        """Purge the objects, and use another query, to be sure."""
        for key in keys:
            if load.ask(self.port, "PURGE", self.path(key)).status != 200:
                raise BenchError("Varnish does not purge")
        self._round = next(_numbers)


class Direct:
    """Azurite itself: no server with an empty cache can be faster."""

    pid = None

    def __init__(self, host: str, prefix: str):
        self.port = int(host.rpartition(":")[2])
        self._prefix = prefix

    def path(self, key: str) -> str:
        """A key's path."""
        return f"{self._prefix}/{key}"

    def forget(self, keys: Sequence[str]) -> None:
        """Do nothing: it has no cache."""


# The loads


class _Load:
    def __init__(self, stage: Stage):
        self._stage = stage

    def check(self, systems: Mapping[str, System]) -> None:
        """Check that each system sends the right bytes, cold and then from its cache.

        :raises BenchError: one does not.
        """
        expected = (self._stage.folder / "source" / MEDIUM).read_bytes()
        for name, system in systems.items():
            system.forget([MEDIUM])
            if any(load.ask(system.port, "GET", system.path(MEDIUM)).body != expected for _ in range(2)):
                raise BenchError(f"{name} gives other bytes than were stored")

    def turns(
        self, systems: Mapping[str, System], keys: Sequence[str], connections: int, size: int, rate: bool = False
    ) -> dict[str, Callable[[], Sample]]:
        """Each system's turn to send cold objects of one size.

        :param connections: how many clients download at a time.
        :param rate: measure requests per second, not the seconds of each.
        """
        return {name: partial(self._turn, system, keys, connections, size, rate) for name, system in systems.items()}

    def _turn(self, system: System, keys: Sequence[str], connections: int, size: int, rate: bool) -> Sample:
        system.forget(sorted(set(keys)))
        self._stage.settle()
        before = cpu_seconds(system.pid) if system.pid else 0
        downloads, seconds = load.crowd(system.port, [system.path(key) for key in keys], connections, size)
        used = cpu_seconds(system.pid) - before if system.pid else None
        # The last clients of a crowd may hit a small object, but each object must have been missed once.
        if sum(download.cache.lower() != "hit" for download in downloads) < len(set(keys)):
            raise BenchError(f"an object was not cold: {downloads[0]}")
        first_byte = statistics.median(download.first_byte for download in downloads)
        return Sample((len(keys) / seconds,) if rate else (seconds, first_byte), len(keys), used)

    def memory(self, ours: System) -> Sample:
        """By how much a worker's memory grows at most while a crowd follows a fill."""
        scale = self._stage.scale
        self._turn(ours, [CROWDED] * FOLLOWERS, FOLLOWERS, scale.crowded, rate=False)  # starts all threads
        with PrivateMemory(self._stage.azure_server.worker_pids()) as memory:
            sample = self._turn(ours, [FOLLOWED] * FOLLOWERS, FOLLOWERS, scale.followed, rate=False)
        ours.forget([FOLLOWED])  # the fill may still be published when its followers have finished
        return Sample((memory.growth / MIB,), FOLLOWERS, sample.cpu_seconds)
