# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make jepsen``: history after history, in all modes, and the figures of all of them."""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.linearizability.run import Report, run_history
from tests.linearizability.system import MODES
from tests.support.azurite import Azurite, running_azurite
from tests.support.leftovers import VARIABLE, Run, guarded

HISTORY_SECONDS = 15  # of one history, without its start and its end


def main() -> int:
    """Run until the time is over; the exit status: 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="make jepsen")
    parser.add_argument("--minutes", type=float, default=10, help="how long it goes on")
    parser.add_argument("--seed", type=int, help="of the first history; the next ones have the next numbers")
    parser.add_argument("--mode", choices=MODES, action="append", help="only this kind of history, or these")
    parser.add_argument("--seconds", type=float, default=HISTORY_SECONDS, help="of one history")
    parser.add_argument(
        "--fault", action="append", help="only this fault, or these, by the names of Nemesis's methods"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    faulthandler.register(signal.SIGUSR1)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="jepsen-") as folder:
        (Path(folder) / "azurite").mkdir()
        processes = Run(secrets.token_hex(16), Path(folder))
        os.environ[VARIABLE] = processes.name
        with guarded(processes), running_azurite(Path(folder) / "azurite") as azurite:
            reports = run(azurite, Path(folder), seed, options)
    print(figures(reports))
    return 1 if any(report.problems for report in reports) else 0


def run(azurite: Azurite, folder: Path, seed: int, options: argparse.Namespace) -> list[Report]:
    """The histories until the time is over, at least one, each with a line or more of text."""
    end = time.monotonic() + 60 * options.minutes
    reports: list[Report] = []
    for number, mode in zip(itertools.count(), itertools.cycle(options.mode or MODES)):
        if reports and time.monotonic() > end:
            return reports
        begin = time.monotonic()
        place = folder / f"history{number}"
        reports.append(run_history(MODES[mode], seed + number, options.seconds, place, azurite, options.fault))
        report, took = reports[-1], time.monotonic() - begin
        line = f"{mode} seed {report.seed}: {report.operations} operations, {sum(report.faults.values())} faults"
        print(f"{line}, {len(report.problems)} violations, {took:.0f} s", flush=True)
        if report.problems:
            print(report.text(), flush=True)
    raise AssertionError("unreachable")


def figures(reports: list[Report]) -> str:
    """All histories in numbers."""
    results = sum((report.results for report in reports), Counter())
    faults = sum((report.faults for report in reports), Counter())
    wrong = [f"{report.mode} {report.seed}" for report in reports if report.problems]
    seeds = f"{reports[0].seed} to {reports[-1].seed}"
    return "\n".join(
        [
            f"{len(reports)} histories, seeds {seeds}, {sum(report.operations for report in reports)} operations",
            "requests: " + ", ".join(f"{name}: {count}" for name, count in sorted(results.items())),
            "faults: " + ", ".join(f"{name}: {count}" for name, count in sorted(faults.items())),
            f"histories with violations: {len(wrong)}" + (f" ({', '.join(wrong)})" if wrong else ""),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
