"""The folder in which the workers' counters are kept (prometheus_client's multiprocess mode)."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "kci-storage-metrics"
SHARED_MEMORY = Path("/dev/shm")


def shared_memory() -> Path | None:
    """A folder in memory; None: there is none that can be written."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None


def make() -> str:
    """Make a folder in memory, named after the master, and remove those of masters that are no more.

    In memory, since a counter's page that finds no room on a full disk kills the worker (SIGBUS).
    """
    parent = shared_memory() or Path(tempfile.gettempdir())
    for old in parent.glob(f"{PREFIX}-{os.getuid()}-*"):
        pid = int(old.name.rsplit("-", 2)[1])
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getuid()}-{os.getpid()}-", dir=parent)
