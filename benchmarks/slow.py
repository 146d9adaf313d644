# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many slow readers of one file, and hits beside them."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Self

from benchmarks import load
from benchmarks.hits import Ours, Target, random_file
from benchmarks.measuring import OURS, BenchError, Measure, Sample, Workload, cpu_seconds
from benchmarks.scale import GIB, KIB, MIB, size_text
from benchmarks.stage import Stage

RATE = 64 * KIB  # bytes that each reader reads per second
PROBES = 4  # connections that request hits in turn, so that each worker has some
PAUSE = 0.01  # seconds between two hits
SETTLING_SECONDS = 10  # at most, before a measurement, for buffers to fill and paces to settle
START_SECONDS = 120  # until all readers have an answer
LARGE, SMALL = "slow/large.bin", "slow/small.bin"


def workloads(stage: Stage) -> Iterator[Workload]:
    """The workloads of this group."""
    random_file(stage.files / LARGE, stage.scale.large)
    random_file(stage.files / SMALL, 4 * KIB)
    targets: dict[str, Target] = {OURS: Ours(stage.local_server)}
    if stage.nginx:
        targets["nginx"] = stage.nginx
    measures = (Measure("ms", "a hit's median"), Measure("ms", "a hit's p99"), Measure("MiB/s", "taken", True))
    for count in stage.scale.readers:
        turns = {name: partial(_turn, target, count, stage.scale.seconds) for name, target in targets.items()}
        yield Workload("slow", f"{count:,} readers of {size_text(RATE)}/s", measures, turns)


def _turn(target: Target, count: int, seconds: int) -> Sample:
    """One operation is a GiB that the readers have read. The hits follow, so that they are not in its CPU time."""
    with _Readers(target.port, count) as readers:
        readers.wait_until_answered()
        time.sleep(min(SETTLING_SECONDS, seconds))
        taken, used, started = readers.taken(), cpu_seconds(target.pid), time.monotonic()
        time.sleep(2 * seconds)
        taken, used = readers.taken() - taken, cpu_seconds(target.pid) - used
        rate = taken / (time.monotonic() - started)
        latencies = _latencies(target.port, seconds)
        readers.taken()
    p99 = statistics.quantiles(latencies, n=100)[98]
    return Sample((1000 * statistics.median(latencies), 1000 * p99, rate / MIB), taken / GIB, used)


def _latencies(port: int, seconds: float) -> list[float]:
    """The seconds that each of many hits took, to its last byte."""
    paths = itertools.repeat(f"/{SMALL}")
    probes = [load.Reader(port, paths) for _ in range(PROBES)]
    latencies = []
    deadline = time.monotonic() + seconds
    for probe in itertools.cycle(probes):
        time.sleep(PAUSE)
        probe.ask()
        while not probe.take():
            pass
        latencies.append(probe.downloads[-1].seconds)
        if time.monotonic() > deadline:
            break
    for probe in probes:
        probe.sock.close()
    return latencies


class _Readers:
    """The process of the slow readers."""

    def __init__(self, port: int, count: int):
        command = [sys.executable, "-m", "benchmarks.readers", str(port), f"/{LARGE}", str(count), str(RATE)]
        self._count = count
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def wait_until_answered(self) -> None:
        """Wait until all readers have a response.

        :raises BenchError: that takes too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while self._figures()[0] < self._count:
            if time.monotonic() > deadline:
                raise BenchError(f"{self._figures()[0]} of {self._count} slow readers have an answer")
            time.sleep(0.1)

    def taken(self) -> int:
        """How many bytes all readers have read so far.

        :raises BenchError: one of them was cut.
        """
        answered, cut, taken = self._figures()
        if cut or answered < self._count:
            raise BenchError(f"{cut} of {self._count} slow readers were cut")
        return taken

    def _figures(self) -> tuple[int, int, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(file=self._process.stdin, flush=True)
            answered, cut, taken = self._process.stdout.readline().split()
        except (OSError, ValueError):
            raise BenchError("the process of the slow readers has ended") from None
        return int(answered), int(cut), int(taken)
