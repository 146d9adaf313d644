# SPDX-License-Identifier: LGPL-2.1-or-later
"""The figures: as a table, and as JSON."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import psutil

from benchmarks.measuring import Row, number
from benchmarks.scale import Scale
from benchmarks.yardsticks import MissingProgram, find

PROGRAMS = {  # the option that prints the version, and the Debian package
    "nginx": ("-v", "nginx"),
    "varnishd": ("-V", "varnish"),
    "wrk": ("-v", "wrk"),
    "curl": ("--version", "curl"),
}
PACKAGES = ("gunicorn", "flask", "werkzeug", "azure-storage-blob")


def table(rows: Sequence[Row], scale: Scale, left_out: Iterable[str] = ()) -> str:
    """All figures: one table per group, and one for the CPU time."""
    runs = f"{scale.rounds} interleaved runs" if scale.rounds > 1 else "one run"
    head = f"{scale.name} scale, medians of {runs}; in brackets: our speed as a share of theirs"
    note = "(of the CPU time: theirs as a share of ours; so above 1, we are better)"
    parts = [head, note, *(f"left out: {reason}" for reason in left_out)]
    for group, found in itertools.groupby(rows, key=lambda row: row.group):
        members = list(found)
        parts += ["", *_lines(_group_cells(group, members)), "", *_lines(_cpu_cells(group, members))]
    return "\n".join(parts)


def _systems(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(system for row in rows for system in row.values))


def _group_cells(group: str, rows: Sequence[Row]) -> Iterator[list[str]]:
    systems = _systems(rows)
    yield [group, "", *systems]
    for row in rows:
        yield [row.title, row.measure.unit, *_figures(systems, row.medians, row.ratios)]


def _figures(systems: Iterable[str], medians: Mapping[str, float], ratios: Mapping[str, float]) -> Iterator[str]:
    for system in systems:
        figure = number(medians[system]) if system in medians else ""
        yield f"{figure} ({ratios[system]:.2f})" if system in ratios else figure


def _cpu_cells(group: str, rows: Sequence[Row]) -> Iterator[list[str]]:
    """The CPU time of the servers, which stays comparable on a machine with other load."""
    used = [row for row in rows if row.cpu_ms]
    systems = [system for system in _systems(used) if any(system in row.cpu_ms for row in used)]
    yield [f"{group}: CPU time of one", "", *systems]
    for row in used:
        yield [row.workload, "ms", *_figures(systems, row.cpu_medians, row.cpu_ratios)]


def _lines(cells: Iterable[list[str]]) -> Iterator[str]:
    """Columns of one width each; the first two are text, the others figures.

    >>> list(_lines([["hits", "", "ours"], ["4 KiB", "requests/s", "12"]]))
    ['hits               ours', '4 KiB  requests/s    12']
    """
    rows = list(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()


def document(rows: Iterable[Row], scale: Scale, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """All figures, and the machine and the programs, for JSON."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "scale": asdict(scale),
        "machine": _machine(),
        "programs": dict(_versions()),
        "left_out": list(left_out),
        "rows": [_row(row) for row in rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "group": row.group,
        "workload": row.workload,
        **asdict(row.measure),
        "medians": row.medians,
        "ratios": row.ratios,
        "cpu_ms_per_operation": row.cpu_medians,
        "cpu_ratios": row.cpu_ratios,
        "runs": row.values,
        "cpu_ms_per_operation_runs": row.cpu_ms,
    }


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def _versions() -> Iterator[tuple[str, str]]:
    for program, (option, package) in PROGRAMS.items():
        try:
            shown = subprocess.run([find(program, package), option], capture_output=True, text=True)
        except MissingProgram:
            continue
        yield program, (shown.stdout + shown.stderr).partition("\n")[0].strip()
    for package in PACKAGES:
        yield package, version(package)
