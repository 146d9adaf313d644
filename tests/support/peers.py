# SPDX-License-Identifier: LGPL-2.1-or-later
"""Other processes for tests: each does what it is told, one call after the other, and can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 170  # a test that gives up leaves its answer to the next one: better the time-out of them all

_context = multiprocessing.get_context("spawn")  # a fork would inherit locks, and this process's threads


class Peer:
    """A process. Functions are called there by name, so they are those of a module; so are their arguments."""

    def __init__(self) -> None:
        self._connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process.pid is not None
        return self._process.pid

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns there; what it raises there is raised here."""
        self.start(function, *args)
        return self.answer()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call, whose :meth:`answer` is to be fetched later."""
        self._connection.send((function, args))

    def answer(self) -> Any:
        """What the call that was started returned."""
        assert self._connection.poll(ANSWER_SECONDS), "the other process does not answer"
        result, error = self._connection.recv()
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        """SIGKILL; back when it is dead."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def peers(count: int) -> Iterator[list[Peer]]:
    """So many processes, killed at the end of the block."""
    started = [Peer() for _ in range(count)]
    try:
        for peer in started:
            peer.call(os.getpid)  # it is up: calls that are started one after the other run at the same time
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
            except Exception as exc:  # noqa: BLE001  (raised where the call was made)
                answer = None, exc
            connection.send(answer)


def holders(path: Path) -> list[int]:
    """The processes that hold the lock of the file at a path (``proc_pid_fdinfo(5)``).

    Among them is a child that one of them is just forking, until it runs a program of its own.
    """
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and _holds(Path("/proc", name), path)]


def _holds(process: Path, path: Path) -> bool:
    """Whether a process holds a file's lock; False when it ends meanwhile, or is another user's."""
    with contextlib.suppress(OSError):
        return any(_is_lock(process, fd, path) for fd in os.listdir(process / "fd"))
    return False


def _is_lock(process: Path, fd: str, path: Path) -> bool:
    with contextlib.suppress(OSError):  # it is closed by now
        return (process / "fd" / fd).samefile(path) and "FLOCK" in (process / "fdinfo" / fd).read_text()
    return False


def dies(function: Callable[[], object]) -> bool:
    """Call a function in a fork of this process; whether it killed itself there. For a peer, which has no threads."""
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
