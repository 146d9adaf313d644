"""Objects that no cache has yet: through us, nginx and Varnish, and straight from Azurite."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks import load
from benchmarks.hits import put, random_file
from benchmarks.measuring import OURS, RATE, BenchError, Measure, PrivateMemory, Sample, Workload, cpu_seconds
from benchmarks.scale import KIB, MIB, size_text
from benchmarks.stage import Stage
from benchmarks.yardsticks import Program
from kci_storage.cache import CONTENT, FILL, PART, Cache, last_use
from tests.harness import Server, wait_until

CLIENTS, CROWD, FOLLOWERS, CONNECTIONS = 16, 50, 64, 16
SMALL = 16 * KIB  # bytes
FIRST_BYTE, TOTAL = Measure("s", "first byte"), Measure("s", "total")
MEMORY = Measure("MiB", "a worker's memory grows by")
FILL_SECONDS = 60
_numbers = itertools.count()


class System(Protocol):
    """What stands before Azurite, or Azurite itself."""

    port: int
    pid: int | None  # None: its CPU seconds are not asked for

    def path(self, key: str) -> str:
        """A key's path."""

    def forget(self, keys: Sequence[str]) -> None:
        """Have objects be cold again."""


def workloads(stage: Stage) -> Iterator[Workload]:
    """Of this group."""
    systems = _systems(stage)
    one, followed, small = _stored(stage)
    bench = _Cold(stage, systems)
    medium = size_text(stage.scale.medium)
    yield Workload("cold", f"{medium}, one client", (TOTAL, FIRST_BYTE), bench.turns([one], 1, stage.scale.medium))
    crowded = bench.turns([one] * CLIENTS, CLIENTS, stage.scale.medium)
    yield Workload("cold", f"{medium}, {CLIENTS} clients", (TOTAL, FIRST_BYTE), crowded)
    labs = bench.turns([one] * CROWD, CROWD, stage.scale.medium)
    yield Workload("cold", f"{medium}, {CROWD} clients", (TOTAL, FIRST_BYTE), labs)
    many = bench.turns(small, CONNECTIONS, SMALL, rate=True)
    yield Workload("cold", f"{len(small)} files of {size_text(SMALL)}", (RATE,), many)
    title = f"{size_text(stage.scale.followed)}, {FOLLOWERS} clients"
    yield Workload("cold", title, (MEMORY,), {OURS: lambda: bench.memory(followed)})


def _systems(stage: Stage) -> dict[str, System]:
    """In the order of their turns."""
    systems: dict[str, System] = {OURS: Ours(stage.azure_server)}
    if stage.nginx_cache:
        systems["nginx"] = NginxCache(stage.nginx_cache, stage.folder / "nginx-cache" / "cache")
    if stage.varnish:
        systems["Varnish"] = Varnish(stage.varnish)
    return systems | {"Azurite": Direct(*stage.backend)}


def _stored(stage: Stage) -> tuple[str, str, list[str]]:
    """Put objects into Azurite: one, a larger one, and small ones. Through our server, so that they have digests."""
    sizes = {"cold/medium.bin": stage.scale.medium, "cold/followed.bin": stage.scale.followed}
    small = [f"cold/small/{number:04}.bin" for number in range(stage.scale.cold_files)]
    stage.progress("storing the cold objects")
    for key, size in {**sizes, **dict.fromkeys(small, SMALL)}.items():
        path = stage.folder / "cold.bin"
        random_file(path, size)
        put(stage.azure_server, key, path)
        path.unlink()
    one, followed = sizes
    return one, followed, small


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
            wait_until(lambda files=files: not _are_written(files()), FILL_SECONDS, f"the end of the fill of {key}")
            for path in files():
                if path.suffix == CONTENT and not self._cache.evict(path, last_use(path.stat())):
                    raise BenchError(f"{key} cannot be evicted")


def _are_written(files: Iterable[Path]) -> bool:
    """Whether somebody is at work on an entry that has these files."""
    return any(path.suffix in (PART, FILL) for path in files)


class NginxCache:
    """nginx: every round asks under a name of its own, which nginx leaves out when it asks Azurite."""

    def __init__(self, program: Program, directory: Path):
        self.port = program.port
        self.pid = program.pid
        self._directory = directory
        self._round = next(_numbers)

    def path(self, key: str) -> str:
        """A key's path."""
        return f"/{key}?{self._round}"

    def forget(self, keys: Sequence[str]) -> None:
        """Ask under another name from now on; the files are removed, for their room."""
        self._round = next(_numbers)
        for folder in self._directory.iterdir():
            shutil.rmtree(folder, ignore_errors=True)


class Varnish:
    """Varnish, whose configuration lets us purge."""

    def __init__(self, program: Program):
        self.port = program.port
        self.pid = program.pid
        self._round = next(_numbers)

    def path(self, key: str) -> str:
        """A key's path."""
        return f"/{key}?{self._round}"

    def forget(self, keys: Sequence[str]) -> None:
        """Purge; and ask under another name, to be sure."""
        for key in keys:
            if load.ask(self.port, "PURGE", self.path(key)).status != 200:
                raise BenchError("Varnish does not purge")
        self._round = next(_numbers)


class Direct:
    """Azurite itself: the time below which nobody can come who has an empty cache."""

    pid = None

    def __init__(self, host: str, prefix: str):
        self.port = int(host.rpartition(":")[2])
        self._prefix = prefix

    def path(self, key: str) -> str:
        """A key's path."""
        return f"{self._prefix}/{key}"

    def forget(self, keys: Sequence[str]) -> None:
        """It has no cache."""


# The loads


class _Cold:
    def __init__(self, stage: Stage, systems: dict[str, System]):
        self._stage = stage
        self._systems = systems

    def turns(
        self, keys: Sequence[str], connections: int, size: int, rate: bool = False
    ) -> dict[str, Callable[[], Sample]]:
        """Each system's turn to give cold objects, all of one size, to so many connections.

        :param rate: measure requests a second, not the seconds of each.
        """
        return {
            name: lambda name=name, system=system: self._turn(name, system, keys, connections, size, rate)
            for name, system in self._systems.items()
        }

    def _turn(
        self, name: str, system: System, keys: Sequence[str], connections: int, size: int, rate: bool
    ) -> Sample:
        system.forget(sorted(set(keys)))
        self._stage.settle()
        before = cpu_seconds(system.pid) if system.pid else 0
        downloads, seconds = load.crowd(system.port, [system.path(key) for key in keys], connections, size)
        used = cpu_seconds(system.pid) - before if system.pid else None
        if name == OURS and downloads[0].cache != "miss":
            raise BenchError(f"the object was not cold: {downloads[0]}")
        first_byte = statistics.median(download.first_byte for download in downloads)
        return Sample((len(keys) / seconds,) if rate else (seconds, first_byte), len(keys), used)

    def memory(self, key: str) -> Sample:
        """How much more memory a worker has at most while a crowd follows a fill."""
        server = self._stage.azure_server
        ours = self._systems[OURS]
        self._follow(ours, "cold/medium.bin", self._stage.scale.medium)  # threads and what they need are there then
        with PrivateMemory(server.worker_pids()) as memory:
            sample = self._follow(ours, key, self._stage.scale.followed)
        return Sample((memory.growth / MIB,), FOLLOWERS, sample.cpu_seconds)

    def _follow(self, ours: System, key: str, size: int) -> Sample:
        return self._turn(OURS, ours, [key] * FOLLOWERS, FOLLOWERS, size, rate=False)
