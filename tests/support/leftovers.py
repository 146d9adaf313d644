# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the processes that a run of the tests has left behind.

The first process of a run sets :data:`VARIABLE` in its environment, and all processes that it starts inherit it. At
its end, the run looks for processes that still have it, and reports them as an error. Then a guard, which is this
file run as a program, kills them. It does so too if the run itself was killed.

This is a plugin of pytest, whose hook is :func:`pytest_sessionstart`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

VARIABLE = "KCI_TEST_RUN"
GRACE_SECONDS = 30  # for which a process may outlive the tests, since stopping takes a moment
_KILL_SECONDS = 60
_POLL_SECONDS = 0.1


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before pytest-xdist starts its workers."""
    if not hasattr(session.config, "workerinput"):  # this is no worker
        session.config.pluginmanager.register(LastAct(session.config))


class LastAct:
    """The last act of a run: an error for processes that it has left behind."""

    def __init__(self, config: pytest.Config):
        # A private name, which pytest-xdist uses too: no fixture runs in the process that distributes the tests.
        factory: pytest.TempPathFactory = vars(config)["_tmp_path_factory"]
        self._run = Run(secrets.token_hex(16), factory.getbasetemp())
        self._guard = guarded(self._run)
        self._guard.__enter__()
        os.environ[VARIABLE] = self._run.name

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Look for processes after the fixtures and pytest-xdist's workers have ended, and before the summary."""
        yield
        if left := self._run.left(GRACE_SECONDS):
            session.config.hook.pytest_runtest_logreport(report=_report_of(left))
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self) -> None:
        """Have the guard kill the processes."""
        self._guard.__exit__(None, None, None)


def _report_of(left: list[psutil.Process]) -> pytest.TestReport:
    name = "the tests: processes left behind"
    lines = "\n".join(_describe(process) for process in left)
    return pytest.TestReport(name, (name, None, name), {}, "failed", lines, "teardown")


@dataclass(frozen=True)
class Run:
    """A run of the tests.

    :param name: the value of :data:`VARIABLE`; no other run has it.
    :param folder: the one that has all the run's temporary files.
    """

    name: str
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """Its living processes, without this one, and without those that this user may not see."""
        return [process for process in psutil.process_iter() if self._started(process)]

    def _started(self, process: psutil.Process) -> bool:
        """Whether the run started a process; False if that ends meanwhile."""
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or _ends_by_itself(process):
                return False
            return process.environ().get(VARIABLE) == self.name or self._works_in_folder(process)
        return False

    def _works_in_folder(self, process: psutil.Process) -> bool:
        """Whether a process works in the run's folder: nginx overwrites its environment with its title."""
        folder = process.cwd()
        return bool(folder) and Path(folder).is_relative_to(self.folder)

    def left(self, seconds: float) -> list[psutil.Process]:
        """The processes that still live after ``seconds``; returns at once when there are none."""
        deadline = time.monotonic() + seconds
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return found

    def kill(self) -> None:
        """Send SIGKILL to all of them, and to those that they start meanwhile; returns when none is left."""
        deadline = time.monotonic() + _KILL_SECONDS
        while (found := self.processes()) and time.monotonic() < deadline:
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, _POLL_SECONDS)


def _ends_by_itself(process: psutil.Process) -> bool:
    """Whether it is a helper process of Python's multiprocessing, which ends after the process that started it."""
    return "multiprocessing.resource_tracker" in " ".join(process.cmdline())


def _describe(process: psutil.Process) -> str:
    """One line: process ID, command line, and the test during which it was started, if they are known."""
    line = str(process.pid)
    with contextlib.suppress(psutil.Error):
        line += f" {' '.join(process.cmdline())!r} in {process.cwd()}"
        if test := process.environ().get("PYTEST_CURRENT_TEST"):  # pytest sets it during each test
            line += f", started by {test}"
    return line


@contextmanager
def guarded(run: Run) -> Iterator[None]:
    """Have the run's processes killed at the end of the block, or when this process has ended in any way."""
    command = [sys.executable, "-P", __file__, run.name, str(run.folder)]
    environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
    # In its own session, so that a signal to the run's process group, such as that of Ctrl-C, does not reach it.
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, env=environ, cwd="/", start_new_session=True)
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def main() -> None:
    """Wait until the other end of standard input is closed, at the latest by its process's end; then kill."""
    name, folder = sys.argv[1:]
    sys.stdin.buffer.read()
    Run(name, Path(folder)).kill()


if __name__ == "__main__":
    main()
