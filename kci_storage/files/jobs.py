# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs: generators that run in a process of their own, behind everything else, so that requests do not notice them.

A thread that works through many files makes the requests of its process wait: whenever one of them comes back from a
system call, it may wait for the interpreter for the 5 ms of its switch interval, several times for a single hit. No
pause between two pieces of work mends that, but for pauses that are longer than the work. See
docs/decisions/housekeeping-processes.md.

A process is started for a job, and ends with it. It ends as well when its parent does, however that dies: its
standard input is a pipe from there, which nobody writes to after the beginning.
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

NICENESS = 10  # a tenth of a processor when requests take all they can; less would prolong the locks that it takes
GRACE = 2  # seconds that a job has for its present step when it is to stop
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)  # whole groups get them; it heeds its parent
REPORT, DONE, FAILED = "report", "done", "failed"


class JobFailed(Exception):
    """A job ended early, by an error of its own or because its process died."""


class JobStopped(Exception):
    """A job was told to stop."""


class Job:
    """A job that runs. To iterate over it gives what the generator yields, but for each None.

    :param work: a module's generator function. Between two of its steps it can be stopped, so it should yield often:
        None when there is nothing to tell.
    :param arguments: its arguments; like what it yields, they are pickled.
    :param inherited: descriptors that the process keeps open. The locks on them are held until it has ended, too.
    :raises OSError: no process can be started.
    """

    def __init__(self, work: Callable[..., Iterable[Any]], *arguments: Any, inherited: Iterable[int] = ()):
        self._stopped = False
        command = [sys.executable, "-m", __name__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=tuple(inherited))
        with contextlib.suppress(BrokenPipeError):  # it could not even start, as its exit status will say
            pickle.dump((sys.path, pickle.dumps((work, arguments))), self._input)
            self._input.flush()

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self._process.pid

    def __iter__(self) -> Iterator[Any]:
        """What it reports, as it comes.

        :raises JobFailed: it ended early.
        :raises JobStopped: it was told to.
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
        """Have it end, after its present step if there is one; back then, :data:`GRACE` seconds later at most."""
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


# In the process itself


def main() -> None:
    """Do the job that the parent sends."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb") as reports:
        os.dup2(2, 1)  # what a driver prints is no report
        _send(reports, _outcome(reports))


def _outcome(reports: BinaryIO) -> tuple[str, Any]:
    try:
        path, order = pickle.load(sys.stdin.buffer)
        parent = _Parent()
        os.nice(NICENESS)
        sys.path[:] = path
        work, arguments = pickle.loads(order)  # which imports what the work needs
        _work(work(*arguments), reports, parent)
    except BrokenPipeError:  # nobody listens any more
        raise
    except Exception:  # noqa: BLE001  (the parent tells of it)
        return FAILED, traceback.format_exc()
    return DONE, None


class _Parent:
    """Whoever has started this process. When that tells it to stop, or dies, it ends, but in the midst of no step."""

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
        """From now on there are steps."""
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
