# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where counters live: in files of each worker, which any worker reads.

They are files as prometheus_client's multiprocess mode has them, but this process decides where, and when: until
:func:`begin` it counts in memory. So neither the order of imports nor an inherited ``PROMETHEUS_MULTIPROC_DIR``
matters, and files that have vanished are made again with what was counted (:func:`look`).

A worker goes on with the files, and so with the counts, of the dead one whose number it has: no count is lost or
moved, and there are never more files than for as many workers as there were at a time.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, values
from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from kci_storage import logfmt
from kci_storage.errors import InsufficientStorage
from kci_storage.files import durable

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # between a worker's looks whether its files are there
SETTLE_SECONDS = 3 * LOOK_SECONDS  # after files were made again, in which the other workers notice it too
FIRST_SIZE = 64 * 1024  # bytes of a new file, all of them written: no room is an error now, and no SIGBUS later
MADE_AGAIN = "made-again"  # a file whose age says when a worker's files were made again
_OURS = re.compile(r"[a-z_]+_[0-9]+-[0-9]+\.db")  # the kind of metric, and the worker's name

Unwritable = (OSError, InsufficientStorage)


class Number:
    """One number of a metric, as prometheus_client wants it; see ``prometheus_client.values``."""

    _multiprocess = True

    def __init__(
        self,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: Sequence[str],
        labelvalues: Sequence[str],
        help_text: str,
        multiprocess_mode: str = "",
        **_: Any,
    ):
        self.kind = f"{typ}_{multiprocess_mode}" if typ == "gauge" else typ
        self.file: MmapedDict | None = None
        self._key = mmap_key(metric_name, name, list(labelnames), list(labelvalues), help_text)
        self._number = self._moment = 0.0
        _files.add(self)

    def inc(self, amount: float) -> None:
        """Add to it."""
        with _lock:
            self._number += amount
            self._write()

    def set(self, value: float, timestamp: float | None = None) -> None:
        """Have it be another."""
        with _lock:
            self._number, self._moment = value, timestamp or 0.0
            self._write()

    def get(self) -> float:
        """What it is."""
        return self._number

    def set_exemplar(self, exemplar: object) -> None:
        """Nothing: files have no exemplars."""

    def get_exemplar(self) -> None:
        """None: files have no exemplars."""

    def keep_in(self, file: MmapedDict) -> None:
        """Count in a file from now on, on top of what it says. The caller holds the lock."""
        self.file = file
        self._number += file.read_value(self._key)[0]
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            self.file.write_value(self._key, self._number, self._moment)


class Files:
    """This process's files, one for each kind of metric. Whoever calls a method without underscore holds no lock."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # None: it counts in memory
        self._name = ""
        self._numbers: list[Number] = []
        self._in_memory: list[Number] = []  # those of them that are in no file
        self._open: dict[str, tuple[MmapedDict, int]] = {}  # by kind; with the inode
        self._has_failed = False

    def add(self, number: Number) -> None:
        """A metric has one more number."""
        with _lock:
            self._numbers.append(number)
            self._in_memory.append(number)
            self._store()

    def begin(self, folder: Path, name: str) -> None:
        """Count in files from now on."""
        with _lock:
            self.folder, self._name = folder, name
            self._store()

    def look(self) -> None:
        """Make again what has vanished."""
        with _lock:
            vanished = [kind for kind, (_, inode) in self._open.items() if not self._is_there(kind, inode)]
            for kind in vanished:
                self._close(kind)
            if self._in_memory:
                self._store(again=bool(vanished))

    def _is_there(self, kind: str, inode: int) -> bool:
        try:
            return self._path(kind).stat().st_ino == inode
        except OSError:
            return False

    def _path(self, kind: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{kind}_{self._name}.db"

    def _close(self, kind: str) -> None:
        file, _ = self._open.pop(kind)
        orphans = [number for number in self._numbers if number.file is file]
        for number in orphans:
            number.file = None
        self._in_memory += orphans
        file.close()

    def _store(self, again: bool = False) -> None:
        """Put into files what is in memory alone; it stays there when that cannot be."""
        if self.folder is None:
            return
        try:
            durable.make_directory(self.folder)
            while self._in_memory:
                self._in_memory[-1].keep_in(self._file(self._in_memory[-1].kind))
                self._in_memory.pop()
            if again:
                durable.write_file(self.folder / MADE_AGAIN, b"")
                log.warning(logfmt.line(event="metrics_made_again", folder=self.folder))
            self._has_failed = False
        except Unwritable as exc:
            if not self._has_failed:
                self._has_failed = True
                log.error(logfmt.line(event="metrics_unwritable", folder=self.folder, reason=exc))

    def _file(self, kind: str) -> MmapedDict:
        if kind not in self._open:
            path = self._path(kind)
            if not path.exists():
                durable.write_file(path, bytes(FIRST_SIZE))
            self._open[kind] = MmapedDict(str(path)), path.stat().st_ino
        return self._open[kind][0]


_lock = threading.Lock()  # of all numbers; held for no longer than it takes to add
_files = Files()
values.ValueClass = Number


def begin(folder: Path, name: str) -> None:
    """In a worker that was forked: count in files of this folder, under this name (:func:`.numbering.name`)."""
    _files.begin(folder, name)


def keep() -> None:
    """In a worker: have a thread make files again that have vanished."""
    threading.Thread(target=_keep, name="metrics", daemon=True).start()


def _keep() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            _files.look()
        except Exception:
            log.exception("event=metrics_failed")


def settle() -> None:
    """Wait, where files have vanished, until all workers have made theirs again."""
    _files.look()
    if _files.folder is None:
        return
    with contextlib.suppress(OSError):  # nothing has vanished
        age = time.time() - (_files.folder / MADE_AGAIN).stat().st_mtime
        if 0 <= age < SETTLE_SECONDS:
            time.sleep(SETTLE_SECONDS - age)


class Counted:
    """What was counted: by all workers, or, if this process is none, by this process."""

    def collect(self) -> Iterable[Metric]:
        """The metrics; prometheus_client calls it.

        :raises FileNotFoundError: a file has vanished meanwhile.
        """
        if _files.folder is None:
            return REGISTRY.collect()
        merged: Iterable[Metric] = MultiProcessCollector.merge([str(path) for path in _counted(_files.folder)])
        return merged


def _counted(folder: Path) -> Iterator[Path]:
    """The workers' files; an operator's folder may hold those of others."""
    return (path for path in folder.iterdir() if _OURS.fullmatch(path.name))


def forget_worker(folder: Path, name: str) -> None:
    """The worker of that name is gone: what it was doing, it does no more. Its counts stay."""
    with contextlib.suppress(OSError):  # the folder, or the file, has vanished
        mark_process_dead(name, str(folder))
