# SPDX-License-Identifier: LGPL-2.1-or-later
"""``workers = 0``: how many cores the server may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kci_storage.config import cores
from kci_storage.config.cores import quotas

CODE = "from kci_storage.config.settings import ServerConfig; print(ServerConfig().worker_count)"


def test_an_affinity_to_one_core_makes_one_worker() -> None:
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}}); {CODE}"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout == "1\n"


VERSION_2 = "0::/machine.slice/kci storage.service\n"
VERSION_1 = "12:cpuset:/\n4:cpu,cpuacct:/docker/4711\n1:name=systemd:/docker/4711\n0::/system.slice\n"


@pytest.mark.parametrize(
    ("groups", "files", "granted"),
    [
        (VERSION_2, {"machine.slice/kci storage.service/cpu.max": "150000 100000\n"}, [1.5]),
        (VERSION_2, {"machine.slice/cpu.max": "50000 100000", "cpu.max": "max 100000"}, [0.5]),  # of one above it
        (VERSION_2, {"machine.slice/kci storage.service/cpu.max": "max 100000\n"}, []),
        ("0::/\n", {"cpu.max": "300000 100000"}, [3.0]),  # a container sees its own group as the uppermost
        ("0::/../../other\n", {"cpu.max": "400000 100000"}, [4.0]),  # nor does it see where it was moved to
        (VERSION_2, {"cpu.max": "nonsense"}, []),
        (VERSION_2, {"cpu.max": "1 0"}, []),
        (VERSION_2, {}, []),
        (
            VERSION_1,
            {
                "cpu,cpuacct/docker/4711/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/docker/4711/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            [2.5],
        ),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, [1.0]),
        ("nonsense\n", {}, None),
        ("", {}, []),
    ],
)
def test_the_quotas_of_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], granted: list[float] | None
) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    own = tmp_path / "own"
    own.write_text(groups)
    assert list(quotas(tmp_path / "cgroup", own)) == (granted or [])


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert list(quotas(tmp_path / "none", tmp_path / "nothing")) == []


@pytest.mark.parametrize(
    ("allowed", "granted", "expected"), [(8, [], 8), (8, [0.2], 1), (8, [6.0, 1.5], 2), (2, [16.0], 2)]
)
def test_the_least_of_all_limits_counts(
    monkeypatch: pytest.MonkeyPatch, allowed: int, granted: list[float], expected: int
) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: allowed)
    monkeypatch.setattr(cores, "quotas", lambda *_: granted)
    assert cores.usable_cores.__wrapped__() == expected
