# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measuring: systems run in turns, their times and CPU seconds, and the comparison with ours."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import psutil

OURS = "ours"  # the system that all others are compared with


class BenchError(Exception):
    """The run cannot go on, or its figures would be wrong. The message is one line for the user."""


@dataclass(frozen=True)
class Measure:
    """One figure of a workload."""

    unit: str
    name: str = ""  # if a workload has several measures
    more_is_better: bool = False


RATE = Measure("requests/s", more_is_better=True)
TIME = Measure("s")
P99 = Measure("ms", "p99")


@dataclass(frozen=True)
class Sample:
    """The result of one turn."""

    values: tuple[float, ...]  # one for each of the workload's measures
    operations: float = 1  # how many requests were answered
    cpu_seconds: float | None = None  # of the system's processes, user and system; None: not measured


@dataclass(frozen=True)
class Workload:
    """A load, and the function that puts it on each system."""

    group: str
    title: str
    measures: tuple[Measure, ...]
    turns: Mapping[str, Callable[[], Sample]]  # by system


@dataclass
class Row:
    """All turns of one measure."""

    group: str
    workload: str
    measure: Measure
    values: dict[str, list[float]]  # by system, in the order of the turns
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)  # by system: milliseconds for one operation

    @property
    def title(self) -> str:
        """The workload and the measure."""
        return f"{self.workload}: {self.measure.name}" if self.measure.name else self.workload

    @property
    def medians(self) -> dict[str, float]:
        """The median by system."""
        return {system: statistics.median(values) for system, values in self.values.items()}

    @property
    def cpu_medians(self) -> dict[str, float]:
        """The median CPU time per operation by system, in milliseconds."""
        return {system: statistics.median(values) for system, values in self.cpu_ms.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """By yardstick: our speed as a share of its speed."""
        return ratios(self.medians, self.measure.more_is_better)

    @property
    def cpu_ratios(self) -> dict[str, float]:
        """By yardstick: its CPU time as a share of ours."""
        return ratios(self.cpu_medians, more_is_better=False)


def ratios(medians: Mapping[str, float], more_is_better: bool) -> dict[str, float]:
    """Our speed as a share of each other system's. Values of 0 are not compared."""
    ours = medians.get(OURS)
    if not ours:
        return {}
    others = {system: value for system, value in medians.items() if value and system != OURS}
    return {system: ratio(ours, value, more_is_better) for system, value in others.items()}


def ratio(ours: float, other: float, more_is_better: bool) -> float:
    """Our speed as a share of another's: above 1, we are faster.

    >>> ratio(50, 100, more_is_better=True), ratio(2.0, 1.0, more_is_better=False)
    (0.5, 0.5)
    """
    part, whole = (ours, other) if more_is_better else (other, ours)
    return part / whole


def run(workload: Workload, rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Give each system its turn, in several rounds, so that the machine's other load affects all of them alike.

    Each round begins with another system. On a virtual machine the first one gets memory that the host has to find
    first, the others memory that the one before has just freed. For 1 GiB that was a second of processor time.
    """
    samples: dict[str, list[Sample]] = {system: [] for system in workload.turns}
    for number in range(1, rounds + 1):
        for system in rotated(list(workload.turns), number - 1):
            sample = workload.turns[system]()
            samples[system].append(sample)
            progress(f"{workload.group}: {workload.title}, {number} of {rounds}: {system} {_shown(workload, sample)}")
    return list(_rows(workload, samples))


def rotated(names: list[str], places: int) -> list[str]:
    """The names in their order, beginning ``places`` further on.

    >>> rotated(["a", "b", "c"], 4)
    ['b', 'c', 'a']
    """
    start = places % len(names)
    return names[start:] + names[:start]


def _shown(workload: Workload, sample: Sample) -> str:
    pairs = zip(workload.measures, sample.values, strict=True)
    return ", ".join(" ".join((measure.name, number(value), measure.unit)).strip() for measure, value in pairs)


def _rows(workload: Workload, samples: Mapping[str, list[Sample]]) -> Iterator[Row]:
    cpu_ms = {
        system: [1000 * sample.cpu_seconds / sample.operations for sample in found if sample.cpu_seconds is not None]
        for system, found in samples.items()
    }
    cpu_ms = {system: found for system, found in cpu_ms.items() if found}
    for index, measure in enumerate(workload.measures):
        values = {system: [sample.values[index] for sample in found] for system, found in samples.items()}
        yield Row(workload.group, workload.title, measure, values, cpu_ms if index == 0 else {})


def number(value: float) -> str:
    """A figure with three significant digits.

    >>> number(7712.4), number(45.67), number(1.234), number(0.01234), number(0)
    ('7,712', '45.7', '1.23', '0.0123', '0')
    """
    if not value:
        return "0"
    decimals = max(0, 2 - int(f"{value:e}".partition("e")[2]))
    return f"{value:,.{decimals}f}"


# Processes


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process and its descendants so far, user and system, in seconds; ended ones included."""
    return sum(_cpu_seconds(process) for process in family(pid))


def _cpu_seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return times.user + times.system + times.children_user + times.children_system
    return 0.0


class PrivateMemory:
    """Samples, during a block, the private memory (USS) of each of some processes, and keeps the peaks."""

    INTERVAL = 0.02  # seconds between two samples

    def __init__(self, pids: Iterable[int]):
        self._processes = [psutil.Process(pid) for pid in pids]
        self._before = self._sizes()
        self._peaks = list(self._before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()
        self._sample()

    @property
    def growth(self) -> int:
        """The largest growth among the processes, in bytes."""
        return max(peak - before for peak, before in zip(self._peaks, self._before, strict=True))

    def _watch(self) -> None:
        while not self._ended.wait(self.INTERVAL):
            self._sample()

    def _sample(self) -> None:
        self._peaks = [max(pair) for pair in zip(self._peaks, self._sizes(), strict=True)]

    def _sizes(self) -> list[int]:
        return [process.memory_full_info().uss for process in self._processes]
