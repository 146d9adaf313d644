# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs: generators that run in a process of their own, at low priority, so that they do not delay requests.

A thread that works through many files delays the requests of its process: a request that returns from a system call
may wait for the interpreter lock for the 5 ms of the switch interval, several times for a single hit. Pauses between
two pieces of work help only if they are longer than the work. See docs/decisions/housekeeping-processes.md.

A process is started for a job, and ends with it. It also ends when its parent dies, in whatever way: its standard
input is a pipe from the parent, which is only written to at the beginning.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import IO, Any, BinaryIO, Self

NICENESS = 10  # about a tenth of a busy processor; with less, a job would hold its locks for longer
GRACE = 2  # seconds that a job that is told to stop has for its present step
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)  # sent to the group; the parent stops jobs
REPORT, DONE, FAILED = "report", "done", "failed"


class JobFailed(Exception):
    """A job has ended early: its generator raised, or its process died."""


class JobStopped(Exception):
    """A job was told to stop, by :meth:`Job.stop`."""


class Job:
    """A running job. Iterating over it yields what the generator yields, except None.

    :param work: a module's generator function. A job can be stopped between two of its steps, so it should yield
        often: None when there is nothing to report.
    :param arguments: its arguments; they are pickled, as are the reports.
    :param inherited: descriptors that the process keeps open, so that locks on them are held until it has ended.
    :raises OSError: no process can be started.
    """

    def __init__(self, work: Callable[..., Iterable[Any]], *arguments: Any, inherited: Iterable[int] = ()):
        self._stopped = False
        command = [sys.executable, "-m", __name__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=tuple(inherited))
        with contextlib.suppress(BrokenPipeError):  # the process has died already; its exit status says so
            pickle.dump((sys.path, pickle.dumps((work, arguments))), self._input)
            self._input.flush()

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def __iter__(self) -> Iterator[Any]:
        """The job's reports, as they arrive.

        :raises JobFailed: the job has ended early.
        :raises JobStopped: the job was told to stop.
        """
        kind, value = self._next()
        while kind == REPORT:
            yield value
            kind, value = self._next()
        if self._stopped:
            raise JobStopped
        if kind == FAILED:
            raise JobFailed(value)

    def _next(self) -> tuple[str, Any]:
        assert self._process.stdout is not None
        try:
            answer: tuple[str, Any] = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):  # nothing, or half a report
            return FAILED, f"the process ended with {self._process.wait()}"
        return answer

    def stop(self) -> None:
        """Stop the job after its present step, and wait for its end: :data:`GRACE` seconds at most."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._input.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        assert self._process.stdout is not None
        self._process.stdout.close()


# In the job's process


def main() -> None:
    """Run the job that the parent sends."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb") as reports:
        os.dup2(2, 1)  # what the work prints must not mix with the reports
        _send(reports, _outcome(reports))


def _outcome(reports: BinaryIO) -> tuple[str, Any]:
    try:
        path, order = pickle.load(sys.stdin.buffer)
        parent = _Parent()
        os.nice(NICENESS)
        sys.path[:] = path
        work, arguments = pickle.loads(order)  # which imports what the work needs
        _work(work(*arguments), reports, parent)
    except BrokenPipeError:  # the parent is gone
        raise
    except Exception:  # noqa: BLE001  (the parent raises it)
        return FAILED, traceback.format_exc()
    return DONE, None


class _Parent:
    """Watches the parent process: when it closes the pipe or dies, this process ends, after its present step."""

    def __init__(self) -> None:
        self.is_gone = threading.Event()
        self._begun = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        os.read(0, 1)  # returns when the parent closes its end, or is dead
        self.is_gone.set()
        if self._begun.is_set():
            time.sleep(GRACE)
        os._exit(0)

    def begin(self) -> None:
        """The job's steps begin: from now on, the end has to wait for the present one."""
        self._begun.set()


def _work(steps: Generator[Any], reports: BinaryIO, parent: _Parent) -> None:
    parent.begin()
    with contextlib.closing(steps):
        if parent.is_gone.is_set():
            return
        for report in steps:
            if report is not None:
                _send(reports, (REPORT, report))
            if parent.is_gone.is_set():
                return


def _send(reports: BinaryIO, message: tuple[str, Any]) -> None:
    pickle.dump(message, reports)
    reports.flush()


if __name__ == "__main__":
    main()
