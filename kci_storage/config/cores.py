# SPDX-License-Identifier: LGPL-2.1-or-later
"""The number of cores that this process may use, which containers and systemd may limit."""

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

    Rounded up, since it takes two processes to use up a quota of 1.5 cores.
    """
    return max(1, math.ceil(min([float(_allowed()), *quotas(CONTROL_GROUPS, OWN_GROUPS)])))


def _allowed() -> int:
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1  # respects PYTHON_CPU_COUNT, too
    return len(os.sched_getaffinity(0))


def quotas(control_groups: Path, own_groups: Path) -> Iterator[float]:
    """The quotas, in cores, of the control groups that the process is in and that have a limit.

    :param control_groups: the folder below which the cgroup file systems are mounted.
    :param own_groups: the file with the process's groups (cgroups(7)), a line for each hierarchy.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in own_groups.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                yield from _found(_quota, control_groups, group)
            elif "cpu" in controllers.split(","):
                yield from _found(_quota_v1, control_groups / controllers, group)
                yield from _found(_quota_v1, control_groups / "cpu", group)


def _found(quota: Callable[[Path], float], mount: Path, group: str) -> Iterator[float]:
    """The quotas of a group and of its parents; in a container, only the topmost group may be visible."""
    names = [name for name in PurePosixPath(group).parts if name not in ("/", "..")]
    for length in range(len(names) + 1):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (cores := quota(mount.joinpath(*names[:length]))) > 0:
                yield cores


def _quota(folder: Path) -> float:
    """The quota of a cgroup v2, in cores.

    :raises ValueError: it has no limit ("max").
    """
    granted, period = (folder / "cpu.max").read_text().split()
    return int(granted) / int(period)


def _quota_v1(folder: Path) -> float:
    """The quota of a cgroup v1, in cores; below zero: it has no limit."""
    granted, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(granted) / int(period)
