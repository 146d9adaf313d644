# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cost of the rules of access control for a hit.

    python -m benchmarks.rules [--turns 15] [--seconds 2]

Three servers take turns: with every rule, without any, and again without. The values of each turn are compared as
pairs, so that the machine's other load affects both alike. The last two servers differ by chance alone, which shows
how reliable a figure is.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence

from benchmarks import hits, measuring
from benchmarks.measuring import OURS, BenchError
from benchmarks.scale import SCALES
from benchmarks.stage import stage

DEFAULT, AGAIN = "default rules", "default rules again"


def main(arguments: Sequence[str]) -> int:
    """Measure, and print the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rules")
    parser.add_argument("--turns", type=int, default=15, help="of each server, two or more")
    parser.add_argument("--seconds", type=int, default=2, help="of each turn")
    options = parser.parse_args(arguments)
    small_files = SCALES["full"].small_files  # all other sizes are those of the tiny scale
    tiny = SCALES["tiny"]
    scale = dataclasses.replace(tiny, rounds=options.turns, seconds=options.seconds, small_files=small_files)
    try:
        with stage(scale) as found:
            rate, _ = measuring.run(hits.rules(found), scale.rounds, found.progress)
    except BenchError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    for title, values in (("requests/s", rate.values), ("CPU time, ms", rate.cpu_ms)):
        medians = ", ".join(f"{name} {measuring.number(statistics.median(found))}" for name, found in values.items())
        print(f"{title}: {medians}")
        print(f"  every rule / default: {compared(values[OURS], values[DEFAULT])}")
        print(f"  default again / default: {compared(values[AGAIN], values[DEFAULT])}")
    return 0


def compared(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean of the ratios of each turn's pair, and its standard error.

    >>> compared([2, 2, 2], [2, 4, 1])
    '1.167 ± 0.441'
    """
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    return f"{statistics.mean(ratios):.3f} ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
