"""Where counters live: files of each worker, which any worker reads.

Imported before any counter is made, and after ``PROMETHEUS_MULTIPROC_DIR`` was set. A worker goes on with the files,
and so with the counts, of the dead one whose number it has: no count is lost or moved, and there are never more files
than for as many workers as there were at a time.
"""

from __future__ import annotations

import os

from prometheus_client import values
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.values import MultiProcessValue

from kci_storage.monitoring import numbering

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def _process() -> int | str:
    """Whose files are written; the library asks at each count, since a process may have been forked meanwhile."""
    return numbering.own or os.getpid()


if DIRECTORY_VARIABLE in os.environ:
    values.ValueClass = MultiProcessValue(_process)  # as the library's page on its multiprocess mode says


def forget_worker(name: str) -> None:
    """The worker of that name is gone: what it was doing, it does no more. Its counts stay."""
    mark_process_dead(name)
