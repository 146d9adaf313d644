# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks for tests: file systems in memory that are small, or lack extended attributes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kci_storage.errors import InsufficientStorage


@contextlib.contextmanager
def small_disk(folder: Path, size: int, inodes: int = 0) -> Iterator[Path]:
    """A file system of a limited size, mounted on ``folder`` during the block.

    :param size: bytes.
    :param inodes: how many files it can hold; 0: any number.
    """
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs"):
        yield folder


@contextlib.contextmanager
def plain_disk(folder: Path) -> Iterator[Path]:
    """A file system without extended attributes, mounted on ``folder`` during the block."""
    with _mounted(folder, "-t", "ramfs", "ramfs"):
        (folder / "file").touch()
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(folder / "file", "user.test", b"")
        (folder / "file").unlink()
        yield folder


@contextlib.contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    if os.getuid() != 0:
        pytest.skip("only root may mount a disk")
    folder.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no disk can be mounted here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill_up(folder: Path) -> Path:
    """Fill the disk of ``folder``; removing the returned file makes room again."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def use_up_inodes(folder: Path) -> list[Path]:
    """Use up the inodes of the disk of ``folder``, which still has room; returns the files that were made."""
    made: list[Path] = []
    with contextlib.suppress(OSError, InsufficientStorage):
        while True:
            path = folder / f"ballast{len(made)}"
            path.touch()
            made.append(path)
    return made
