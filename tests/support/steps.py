# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interrupting a process between any two of its changes to the disk.

The calls of ``os`` that change files are counted, and at one of them the process dies, or the disk is full. Repeating
a scenario with each number in turn interrupts it everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHANGING = (
    "open", "write", "pwrite", "ftruncate", "fsync", "fdatasync",
    "rename", "link", "mkdir", "utime", "setxattr", "unlink", "rmdir",
)  # fmt: skip
# Those that may need room on the disk.
GROWING = ("open", "write", "pwrite", "fsync", "fdatasync", "rename", "link", "mkdir")


class Steps:
    """Counts the changes below a folder.

    :param folder: changes below it are counted.
    :param functions: the names of the functions of ``os`` that are counted.
    :param interrupt: called before each change, with its number, from 1.
    """

    def __init__(self, folder: Path, functions: tuple[str, ...], interrupt: Callable[[int], None]):
        self._folder = str(folder)
        self._interrupt = interrupt
        self._functions = functions
        self.count = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[Steps]:
        """Count during the block."""
        originals = {name: getattr(os, name) for name in self._functions}
        for name, function in originals.items():
            setattr(os, name, self._wrapped(name, function))
        try:
            yield self
        finally:
            for name, function in originals.items():
                setattr(os, name, function)

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_change(name, args):
                self.count += 1
                self._interrupt(self.count)
            return function(*args, **kwargs)

        return call

    def _is_change(self, name: str, args: tuple[Any, ...]) -> bool:
        if name == "open" and (not args[1] & os.O_CREAT or os.path.exists(args[0])):
            return False
        if name == "pwrite" and args[2] + len(args[1]) <= os.fstat(args[0]).st_size:
            return False  # it overwrites, and needs no room
        path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else os.fsdecode(args[0])
        return path.startswith(self._folder) or not path.startswith("/")  # relative: below an open folder


def die_at(number: int) -> Callable[[int], None]:
    """Kill the process at this step."""

    def interrupt(step: int) -> None:
        if step == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return interrupt


def full_at(number: int, for_ever: bool) -> Callable[[int], None]:
    """Have the disk full at this step; with ``for_ever``, also at all later ones."""

    def interrupt(step: int) -> None:
        if step == number or (for_ever and step > number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return interrupt


def spy(monkeypatch: pytest.MonkeyPatch, *functions: str) -> list[tuple[str, str]]:
    """Record the calls of these functions of ``os`` from now on: function and path."""
    calls: list[tuple[str, str]] = []

    def watch(name: str, function: Callable[..., Any]) -> None:
        def call(file: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)))
            return function(file, *args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in functions:
        watch(name, getattr(os, name))
    return calls
