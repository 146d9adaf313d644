# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hits on three servers, directly and through the balancer of ``deploy/``: ``python -m benchmarks.machines``.

All of them run on one machine, so the rates say little about three machines; the CPU time per request does.
docs/scaling.md has the output.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import Rate, wrk
from benchmarks.measuring import cpu_seconds, number
from tests.deploy.machines import Cluster, cluster
from tests.support.azurite import running_azurite
from tests.support.cold import MIB, some_bytes
from tests.support.wire import get, wait_until_tidy

ROUNDS, SECONDS, CONNECTIONS, OBJECTS = 7, 3, 32, 60
SIZES = {"4 KiB": 4096, "1 MiB": MIB}  # bytes


@dataclass(frozen=True)
class Sample:
    """The result of one system's turn."""

    rate: Rate
    server_ms: float  # CPU time of all servers per request, in milliseconds
    balancer_ms: float  # CPU time of nginx per request, in milliseconds


class Turns:
    """The systems under one load."""

    def __init__(self, machines: Cluster, folder: Path, size: int):
        self._machines = machines
        self._folder = folder
        self._size = size
        self._keys = [machines.store(some_bytes(size)) for _ in range(OBJECTS)]
        for server in machines.servers:
            assert all(get(server, key).status_code == 200 for key in self._keys)
            wait_until_tidy(server)

    def systems(self) -> dict[str, Callable[[], Sample]]:
        """A function for each system's turn."""
        direct, balanced = self._machines.servers[0].port, self._machines.balancer.port
        hot = [key for key in self._keys if self._machines.owner(key) is self._machines.servers[0]][:1]
        return {
            "one server, directly": lambda: self._turn(direct, self._keys),
            "three servers through the balancer": lambda: self._turn(balanced, self._keys),
            "one object, directly": lambda: self._turn(direct, hot),
            "one object through the balancer": lambda: self._turn(balanced, hot),
        }

    def _turn(self, port: int, keys: Sequence[str]) -> Sample:
        paths = self._folder / "paths"
        paths.write_text("".join(f"/{key}\n" for key in keys))
        before = self._cpu_seconds()
        rate = wrk(port, CONNECTIONS, SECONDS, self._folder, "get.lua", paths, body=self._size)
        servers, balancer = (after - was for after, was in zip(self._cpu_seconds(), before, strict=True))
        return Sample(rate, 1000 * servers / rate.requests, 1000 * balancer / rate.requests)

    def _cpu_seconds(self) -> tuple[float, float]:
        servers = sum(cpu_seconds(server.process.pid) for server in self._machines.servers)
        return servers, cpu_seconds(self._machines.balancer.pid)


def measure(turns: Turns, title: str) -> None:
    """Give each system its turns, and print the medians."""
    samples: dict[str, list[Sample]] = {}
    systems = turns.systems()
    for _ in range(ROUNDS):
        for system, turn in systems.items():
            samples.setdefault(system, []).append(turn())
    print(f"\n{title}: medians of {ROUNDS} turns of {SECONDS} s, {CONNECTIONS} connections")
    for system, found in samples.items():
        medians = (
            statistics.median(values)
            for values in zip(
                *((each.rate.per_second, each.server_ms, each.balancer_ms) for each in found),
                strict=True,
            )
        )
        rate, server, balancer = (number(value) for value in medians)
        print(f"| {system} | {rate} requests/s | servers {server} ms | nginx {balancer} ms |")


def main() -> None:
    """Measure and print."""
    folder = Path(tempfile.mkdtemp(prefix="kci-storage-machines-", dir=os.environ.get("BENCH_DIR", "/var/tmp")))
    try:
        (folder / "azurite").mkdir()
        (folder / "machines").mkdir()
        options = {"cache": {"revalidate_after": 60, "low_disk_percent": 0, "recover_disk_percent": 0}}
        with (
            running_azurite(folder / "azurite") as azurite,
            cluster(azurite, folder / "machines", options) as machines,
        ):
            for title, size in SIZES.items():
                measure(Turns(machines, folder, size), title)
                sys.stdout.flush()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
