# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell scripts behind make: their messages when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import kci_storage

TOOLS = Path(kci_storage.__file__).parent.parent / "tools"


def run(*command: object, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environ}
    return subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=60, cwd="/"
    )


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with only the most common commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "dirname", "mkdir", "rm", "id"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return str(folder)


def test_a_missing_python_is_one_line(tmp_path):
    result = run(TOOLS / "environment.sh", tmp_path / "venv", PYTHON="python-of-tomorrow")
    assert result.returncode != 0
    assert result.stderr == "environment: python-of-tomorrow is missing; on Debian: apt-get install python3\n"


def test_an_old_python_is_one_line(tmp_path):
    old = script(tmp_path / "old", '[ "$1" = --version ] && echo Python 3.9.2 || exit 1')
    result = run(TOOLS / "environment.sh", tmp_path / "venv", PYTHON=str(old))
    assert result.returncode != 0
    assert result.stderr == (
        "environment: Python 3.11 or newer is needed, but this is Python 3.9.2; name another one with PYTHON=\n"
    )


def test_a_python_without_pip_where_there_is_no_apt_names_the_package(tmp_path, bare_path):
    bare = script(tmp_path / "bare", 'case "$2" in *ensurepip*) exit 1;; esac')
    result = run(TOOLS / "environment.sh", tmp_path / "venv", PYTHON=str(bare), PATH=bare_path)
    assert result.returncode != 0
    assert result.stderr == (
        "apt-download: apt-get is missing: this is no Debian system\n"
        "environment: pip is missing, and could not be fetched; on Debian: apt-get install python3-venv\n"
    )


def test_a_package_that_does_not_exist_adds_one_line(tmp_path):
    if not shutil.which("apt-get"):
        pytest.skip("apt-get is not installed")
    result = run(TOOLS / "apt-download.sh", tmp_path, "native", "no-such-package-at-all")
    assert result.returncode != 0
    assert "apt-download: cannot download no-such-package-at-all for " in result.stderr


def test_without_node_and_pip_the_message_says_what_to_install(tmp_path, bare_path):
    (tmp_path / "venv/bin").mkdir(parents=True)
    script(tmp_path / "venv/bin/python", "exit 0")
    result = run(TOOLS / "azurite.sh", tmp_path / "tools", tmp_path / "venv", PATH=bare_path)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == (
        "azurite: node 18 or newer is needed; on Debian: apt-get install nodejs npm"
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files on which the environment depends, with an environment that is newer."""
    for name in ("Makefile", "setup.cfg", "setup.py", "tools"):
        source = TOOLS.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    for stamp in ("run.stamp", "test.stamp"):
        (tmp_path / ".venv" / stamp).touch()
    return tmp_path


@pytest.mark.parametrize("target", ["run", "test", "check", "demo", "bench"])
def test_the_environment_is_renewed_when_the_dependencies_change(project, target):
    command = ["make", "--directory", project, "--dry-run", target]
    assert "environment.sh" not in run(*command).stdout
    later = (project / ".venv/run.stamp").stat().st_mtime + 10
    os.utime(project / "setup.cfg", (later, later))
    assert "tools/environment.sh .venv" in run(*command).stdout
