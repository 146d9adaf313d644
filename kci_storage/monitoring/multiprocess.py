# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counters of several processes: each worker keeps its own in files, which any worker can read.

The files have the format of prometheus_client's multiprocess mode, but this module decides where and when they are
made: until :func:`begin`, a process counts in memory. So neither the order of imports nor an inherited
``PROMETHEUS_MULTIPROC_DIR`` matters, and files that have vanished are made again with their counts
(:meth:`Files.restore`).

A new worker takes over the number of a dead one and continues its files. So no count is lost, and there are never
more files than there were workers at a time.
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

LOOK_SECONDS = 0.5  # between a worker's checks that its files exist
SETTLE_SECONDS = 3 * LOOK_SECONDS  # after files were made again: by then, the other workers have made theirs, too
FIRST_SIZE = 64 * 1024  # bytes of a new file, all written: so a full disk is an error now rather than SIGBUS later
MADE_AGAIN = "made-again"  # a file whose time is when a worker last made its files again
_OURS = re.compile(r"[a-z_]+_[0-9]+-[0-9]+\.db")  # the kind of metric, and the worker's name

Unwritable = (OSError, InsufficientStorage)


class Number:
    """One number of a metric, with the interface of ``prometheus_client.values``."""

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
        """Add an amount."""
        with _lock:
            self._number += amount
            self._write()

    def set(self, value: float, timestamp: float | None = None) -> None:
        """Replace the number."""
        with _lock:
            self._number, self._moment = value, timestamp or 0.0
            self._write()

    def get(self) -> float:
        """The number."""
        return self._number

    def set_exemplar(self, exemplar: object) -> None:
        """Do nothing: the files hold no exemplars."""

    def get_exemplar(self) -> None:
        """None: the files hold no exemplars."""

    def keep_in(self, file: MmapedDict) -> None:
        """Count in a file from now on, starting from the number in it. The caller holds the lock."""
        self.file = file
        self._number += file.read_value(self._key)[0]
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            self.file.write_value(self._key, self._number, self._moment)


class Files:
    """This process's files, one for each kind of metric. Callers of public methods must not hold the lock."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # None: this process counts in memory
        self._name = ""
        self._numbers: list[Number] = []
        self._in_memory: list[Number] = []  # the numbers that are in no file
        self._open: dict[str, tuple[MmapedDict, int]] = {}  # file and inode, by kind
        self._has_failed = False

    def add(self, number: Number) -> None:
        """Add a number of a metric."""
        with _lock:
            self._numbers.append(number)
            self._in_memory.append(number)
            self._store()

    def begin(self, folder: Path, name: str) -> None:
        """Count in files from now on."""
        with _lock:
            self.folder, self._name = folder, name
            self._store()

    def restore(self) -> None:
        """Make files again that have vanished."""
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
        """Move the numbers that are in memory into files; they stay in memory if that fails."""
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


_lock = threading.Lock()  # of all numbers; held only for an addition
_files = Files()
values.ValueClass = Number


def begin(folder: Path, name: str) -> None:
    """Called in a new worker: count in files of this folder, under this name (:func:`.numbering.name`)."""
    _files.begin(folder, name)


def start_restoring() -> None:
    """Called in a new worker: start a thread that makes files again that have vanished."""
    threading.Thread(target=_restore_forever, name="metrics", daemon=True).start()


def _restore_forever() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            _files.restore()
        except Exception:
            log.exception("event=metrics_failed")


def settle() -> None:
    """If files have vanished, wait until all workers have made theirs again."""
    _files.restore()
    if _files.folder is None:
        return
    with contextlib.suppress(OSError):  # no file has vanished yet
        age = time.time() - (_files.folder / MADE_AGAIN).stat().st_mtime
        if 0 <= age < SETTLE_SECONDS:
            time.sleep(SETTLE_SECONDS - age)


class Counted:
    """Collects the counters of all workers, or, in a process that is no worker, its own."""

    def collect(self) -> Iterable[Metric]:
        """The metrics; prometheus_client calls it.

        :raises FileNotFoundError: a file has vanished meanwhile.
        """
        if _files.folder is None:
            return REGISTRY.collect()
        merged: Iterable[Metric] = MultiProcessCollector.merge([str(path) for path in _counted(_files.folder)])
        return merged


def _counted(folder: Path) -> Iterator[Path]:
    """The workers' files. An operator's folder may hold other files, too."""
    return (path for path in folder.iterdir() if _OURS.fullmatch(path.name))


def forget_worker(folder: Path, name: str) -> None:
    """Remove the gauges of a worker that is gone; its counters are kept."""
    with contextlib.suppress(OSError):  # the folder or the file has vanished
        mark_process_dead(name, str(folder))
