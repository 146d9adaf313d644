# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guard of the tests kills processes that outlive them: shown by a run of pytest within a run of pytest."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import kci_storage
from tests.support.harness import wait_until

ROOT = Path(kci_storage.__file__).parent.parent
SECONDS = 120
QUICK = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # only plugins named by -p
FEW = "import tests.support.leftovers\ntests.support.leftovers.GRACE_SECONDS = 1\n"

TESTS = """
import subprocess
import time
from pathlib import Path

def start(folder, **options):
    process = subprocess.Popen(["sleep", "600"], start_new_session=True, **options)
    Path({pids!r}).write_text(str(process.pid))
    return process

def test_ends_it(tmp_path):
    process = start(tmp_path)
    process.kill()
    process.wait()

def test_leaves_it(tmp_path):
    start(tmp_path)

def test_leaves_it_without_environment(tmp_path):
    start(tmp_path, env={{}}, cwd=tmp_path)

def test_is_killed(tmp_path):
    start(tmp_path).wait()
"""


@pytest.fixture
def pid_file(tmp_path: Path) -> Path:
    """The file in which the inner tests note the process that they start; the tests are beside it."""
    path = tmp_path / "pid"
    (tmp_path / "conftest.py").write_text(FEW)
    (tmp_path / "test_inner.py").write_text(TESTS.format(pids=str(path)))
    return path


def command(pid_file: Path, test: str, *arguments: str) -> list[str]:
    inner = f"{pid_file.parent}/test_inner.py::{test}"
    options = ["-p", "tests.support.leftovers", "-p", "no:cacheprovider", f"--rootdir={pid_file.parent}"]
    return [sys.executable, "-m", "pytest", *options, *arguments, inner]


def run(pid_file: Path, test: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(pid_file, test, *arguments), cwd=ROOT, env=QUICK, capture_output=True, text=True, timeout=SECONDS
    )


def lives(pid_file: Path) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(int(pid_file.read_text())).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def killed_at_the_end(pid_file: Path) -> Iterator[None]:
    """If the guard did not work, its test would leave a process behind."""
    yield
    if lives(pid_file):
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


pytestmark = pytest.mark.usefixtures("killed_at_the_end")
ways = pytest.mark.parametrize("arguments", [(), ("-p", "xdist", "-n", "1")], ids=["one process", "workers"])


@ways
@pytest.mark.parametrize("test", ["test_leaves_it", "test_leaves_it_without_environment"])
def test_a_run_that_leaves_a_process_fails_and_names_it(pid_file, test, arguments):
    result = run(pid_file, test, *arguments)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert f"{pid_file.read_text()} 'sleep 600' in " in result.stdout
    assert "1 passed, 1 error" in result.stdout.splitlines()[-1]
    assert not lives(pid_file)


def test_the_test_that_started_the_process_is_named(pid_file):
    assert "started by test_inner.py::test_leaves_it (call)" in run(pid_file, "test_leaves_it").stdout


@ways
def test_a_run_that_leaves_no_process_passes(pid_file, arguments):
    result = run(pid_file, "test_ends_it", *arguments)
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    assert "1 passed" in result.stdout.splitlines()[-1]


@ways
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_nothing(pid_file, number, arguments):
    line = command(pid_file, "test_is_killed", *arguments)
    with subprocess.Popen(line, cwd=ROOT, env=QUICK, stdout=subprocess.DEVNULL) as inner:
        wait_until(lambda: pid_file.exists() and pid_file.read_text(), SECONDS, "the inner test")
        assert lives(pid_file)
        inner.send_signal(number)
    wait_until(lambda: not lives(pid_file), SECONDS, "the end of the run's processes")
