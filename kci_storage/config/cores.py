# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many cores this process may use: fewer than the machine has, in a container or under systemd's limits."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


@functools.cache
def usable_cores() -> int:
    """How many cores the process may use, at least 1: by its affinity, and by its control groups' quotas.

    A part of a core counts as one: a quota of 1.5 cores is used up by two processes only.
    """
    return max(1, math.ceil(min([float(_allowed()), *quotas(CONTROL_GROUPS, OWN_GROUPS)])))


def _allowed() -> int:
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1  # also heeds PYTHON_CPU_COUNT
    return len(os.sched_getaffinity(0))


def quotas(control_groups: Path, own_groups: Path) -> Iterator[float]:
    """How many cores' time each control group grants, of those that the process is in and that have a limit.

    :param control_groups: where their file systems are mounted.
    :param own_groups: the process's groups (cgroups(7)): a line for each hierarchy.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in own_groups.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                yield from _found(_quota, control_groups, group)
            elif "cpu" in controllers.split(","):
                yield from _found(_quota_of_old, control_groups / controllers, group)
                yield from _found(_quota_of_old, control_groups / "cpu", group)


def _found(quota: Callable[[Path], float], mount: Path, group: str) -> Iterator[float]:
    """The quotas of a group and of those above it; in a container it may be that only the uppermost is visible."""
    names = [name for name in PurePosixPath(group).parts if name not in ("/", "..")]
    for length in range(len(names) + 1):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (cores := quota(mount.joinpath(*names[:length]))) > 0:
                yield cores


def _quota(folder: Path) -> float:
    """Of a group of version 2.

    :raises ValueError: it has no limit ("max").
    """
    granted, period = (folder / "cpu.max").read_text().split()
    return int(granted) / int(period)


def _quota_of_old(folder: Path) -> float:
    """Of a group of version 1; below zero: it has no limit."""
    granted, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(granted) / int(period)
