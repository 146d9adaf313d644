# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the bench.

    python -m benchmarks [hits] [uploads] [archives] [cold] [slow]

Without a name, all groups run. Environment: ``BENCH_ONLY`` names groups too, with commas; ``BENCH_QUICK=1`` is a
short run; ``BENCH_DIR`` is a folder on the disk to use; ``BENCH_OUT`` is the folder for bench.json and bench.svg.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from benchmarks import archives, chart, cold, hits, measuring, report, slow, uploads
from benchmarks.measuring import BenchError, Row
from benchmarks.scale import SCALES, Scale
from benchmarks.stage import Stage, stage

GROUPS = {
    "hits": hits.workloads,
    "uploads": uploads.workloads,
    "archives": archives.workloads,
    "cold": cold.workloads,
    "slow": slow.workloads,
}


def main(arguments: Sequence[str]) -> int:
    """Run the groups, print the table, write the files; returns the exit code.

    If the bench fails, the figures until then are printed, but no file is written.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        groups, scale = chosen(arguments), chosen_scale()
        with stage(scale) as found:
            rows = run(groups, found)
        write(rows, found)
    except (BenchError, pytest.skip.Exception) as exc:  # skip: the tests' helper has found no Azurite
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    return 0


def _interrupt(signum: int, frame: object) -> None:
    """End everything that was started. Further signals are ignored, so that they do not interrupt that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def chosen(arguments: Sequence[str]) -> list[str]:
    """The groups to run, in the order of :data:`GROUPS`.

    :raises BenchError: there is no such group.
    """
    names = {*arguments, *filter(None, os.environ.get("BENCH_ONLY", "").split(","))}
    if unknown := names - GROUPS.keys():
        raise BenchError(f"there is no group {', '.join(sorted(unknown))}, only {', '.join(GROUPS)}")
    return [group for group in GROUPS if not names or group in names]


def chosen_scale() -> Scale:
    """The size of the run.

    :raises BenchError: there is no such scale.
    """
    name = os.environ.get("BENCH_SCALE") or ("quick" if os.environ.get("BENCH_QUICK") else "full")
    if name not in SCALES:
        raise BenchError(f"BENCH_SCALE is one of {', '.join(SCALES)}, not {name}")
    return SCALES[name]


def run(groups: Iterable[str], found: Stage) -> list[Row]:
    """Run some groups, and print their rows; returns these."""
    rows: list[Row] = []
    try:
        for workload in (workload for group in groups for workload in GROUPS[group](found)):
            rows += measuring.run(workload, found.scale.rounds, found.progress)
    finally:
        if rows:
            print(report.table(rows, found.scale, found.left_out), flush=True)
    return rows


def write(rows: Sequence[Row], found: Stage) -> None:
    """Write bench.json and bench.svg."""
    folder = Path(os.environ.get("BENCH_OUT") or "build/bench")
    folder.mkdir(parents=True, exist_ok=True)
    figures = report.document(rows, found.scale, found.left_out)
    (folder / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "bench.svg").write_text(chart.svg(rows))
    print(f"bench: the figures are in {folder}/bench.json and {folder}/bench.svg", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
