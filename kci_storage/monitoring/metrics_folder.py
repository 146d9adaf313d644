# SPDX-License-Identifier: LGPL-2.1-or-later
"""The folder in which the workers' counters are kept (:mod:`kci_storage.monitoring.multiprocess`)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from kci_storage.config.settings import ConfigError
from kci_storage.errors import StorageError
from kci_storage.files import durable

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's; the operator may set it, this server never does
PREFIX = "kci-storage-metrics"
SHARED_MEMORY = Path("/dev/shm")


class MetricsFolder(NamedTuple):
    """A folder for the counters of one master's workers."""

    path: Path
    is_own: bool  # this master made it, rather than the operator

    def remove(self) -> None:
        """Remove the folder when the master ends. An operator's folder is kept as it is."""
        if self.is_own:
            shutil.rmtree(self.path, ignore_errors=True)


def choose() -> MetricsFolder:
    """The operator's folder if the environment names one, else a new one for this master.

    :raises ConfigError: the folder cannot be made.
    """
    named = os.environ.get(VARIABLE, "")
    try:
        if named:
            path = Path(named).absolute()
            durable.make_directory(path)
            return MetricsFolder(path, is_own=False)
        return MetricsFolder(_make(), is_own=True)
    except (OSError, StorageError) as exc:
        raise ConfigError(f"{VARIABLE}: expected a folder that can be made: {exc}") from exc


def shared_memory() -> Path | None:
    """A folder in memory; None: there is none, or it is not writable."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None


def _make() -> Path:
    """Make a folder in memory, named after the master, and remove the folders of masters that no longer run."""
    parent = shared_memory() or Path(tempfile.gettempdir())
    for old in parent.glob(f"{PREFIX}-{os.getuid()}-*"):
        if is_abandoned(old):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getuid()}-{os.getpid()}-", dir=parent))


def is_abandoned(path: Path) -> bool:
    """Whether a path is the folder of a master that no longer runs.

    Other programs' files with a similar name are left alone.
    """
    match = re.fullmatch(rf"{PREFIX}-{os.getuid()}-([0-9]{{1,10}})-\w+", path.name)
    if match is None:
        return False
    with contextlib.suppress(OSError):
        return path.is_dir() and not path.is_symlink() and not Path(f"/proc/{match[1]}").exists()
    return False
