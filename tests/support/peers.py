# SPDX-License-Identifier: LGPL-2.1-or-later
"""Other processes for tests: each runs the calls it gets, one after the other, and can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 170  # just below pytest's time-out: the next test would get the answer of one that gave up earlier

_context = multiprocessing.get_context("spawn")  # a fork would inherit locks that other threads hold


class Peer:
    """A process that runs calls. The functions, and functions among their arguments, must be a module's."""

    def __init__(self) -> None:
        self._connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process ID."""
        assert self._process.pid is not None
        return self._process.pid

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function there; returns its result, or raises its exception."""
        self.start(function, *args)
        return self.answer()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call, whose result :meth:`answer` returns later."""
        self._connection.send((function, args))

    def answer(self) -> Any:
        """The result of the call that was started; raises its exception."""
        assert self._connection.poll(ANSWER_SECONDS), "the other process does not answer"
        result, error = self._connection.recv()
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        """Send SIGKILL, and wait for the process's end."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def peers(count: int) -> Iterator[list[Peer]]:
    """Processes, killed at the end of the block."""
    started = [Peer() for _ in range(count)]
    try:
        for peer in started:
            peer.call(os.getpid)  # wait until it runs, so that calls which are started together also run together
        yield started
    finally:
        for peer in started:
            peer.kill()


def _serve(connection: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            function, args = connection.recv()
            answer: tuple[Any, Exception | None]
            try:
                answer = function(*args), None
            except Exception as exc:  # noqa: BLE001  (raised in the calling process)
                answer = None, exc
            connection.send(answer)


def holders(path: Path) -> list[int]:
    """The processes that hold the lock of the file at a path (``proc_pid_fdinfo(5)``).

    They include a child that one of them has just forked, until the child runs another program.
    """
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and _holds(Path("/proc", name), path)]


def _holds(process: Path, path: Path) -> bool:
    """Whether a process holds a file's lock; False if it ends meanwhile, or is another user's."""
    with contextlib.suppress(OSError):
        return any(_is_lock(process, fd, path) for fd in os.listdir(process / "fd"))
    return False


def _is_lock(process: Path, fd: str, path: Path) -> bool:
    with contextlib.suppress(OSError):  # closed meanwhile
        return (process / "fd" / fd).samefile(path) and "FLOCK" in (process / "fdinfo" / fd).read_text()
    return False


def dies(function: Callable[[], object]) -> bool:
    """Call a function in a fork of this process; whether it killed itself. For peers only, which have no threads."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the function raised"
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
