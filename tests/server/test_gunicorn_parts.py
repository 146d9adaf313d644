# SPDX-License-Identifier: LGPL-2.1-or-later
"""A gunicorn with other names stops the start with one line (kci_storage/server/gunicorn_parts.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gunicorn
import pytest

from kci_storage.server.gunicorn_parts import PARTS, Part
from tests.support.harness import Server

COPY = Path(gunicorn.__file__).parent
MAX_PARTS = 33
CALLED = [part for part in PARTS if part.parameters]


@pytest.fixture(scope="module")
def shared_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of gunicorn, which comes before the installed one."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(COPY, folder / "gunicorn", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def packages(shared_copy: Path) -> Iterator[Path]:
    """The copy of gunicorn, which is restored after each test."""
    before = {path: path.read_text() for path in shared_copy.rglob("*.py")}
    yield shared_copy
    for path, text in before.items():
        if path.read_text() != text:
            path.write_text(text)


def name_of(part: Part) -> str:
    return f"{part.module.removeprefix('gunicorn.')}.{part.name}"


def rename(packages: Path, part: Part) -> None:
    """Rename a part in the copy: a class everywhere, an attribute or a method in its module."""
    owner, _, name = part.name.rpartition(".")
    if not owner:
        for path in packages.rglob("*.py"):
            path.write_text(re.sub(rf"\b{name}\b", f"{name}Renamed", path.read_text()))
    elif part.assigned_in:
        edit(packages, part, rf"\bself\.{name}\b", f"self.{name}_renamed")
    else:
        edit_class(packages, part, rf"\bdef {name}\(", f"def {name}_renamed(")


def edit(packages: Path, part: Part, pattern: str, replacement: str) -> None:
    path = module_path(packages, part)
    text, times = re.subn(pattern, replacement, path.read_text())
    assert times
    path.write_text(text)


def edit_class(packages: Path, part: Part, pattern: str, replacement: str) -> None:
    """Rename a part in one class of its module."""
    path, owner = module_path(packages, part), part.name.partition(".")[0]
    text = path.read_text()
    begin = re.search(rf"^class {owner}\b", text, re.MULTILINE).start()  # type: ignore[union-attr]
    end = re.search(r"^(?:class|def) |\Z", text[begin + 1 :], re.MULTILINE).start() + begin + 1  # type: ignore[union-attr]
    block, times = re.subn(pattern, replacement, text[begin:end])
    assert times
    path.write_text(text[:begin] + block + text[end:])


def module_path(packages: Path, part: Part) -> Path:
    return packages / f"{part.module.replace('.', '/')}.py"


def imported(packages: Path) -> subprocess.CompletedProcess[str]:
    """The result of importing gunicorn_parts."""
    command = [sys.executable, "-c", "import kci_storage.server.gunicorn_parts"]
    environ = {**os.environ, "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == os.EX_CONFIG, done.stderr
    assert done.stderr.startswith(f"kci-storage: gunicorn {gunicorn.__version__} cannot be used: "), done.stderr
    assert done.stderr.count("\n") == 1 and says in done.stderr


def test_an_unchanged_copy_is_accepted(packages: Path):
    done = imported(packages)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("part", PARTS, ids=name_of)
def test_a_renamed_part_is_refused(packages: Path, part: Part):
    rename(packages, part)
    assert_refused(imported(packages), part.name.rpartition(".")[2])


@pytest.mark.parametrize("part", CALLED, ids=name_of)
def test_a_renamed_parameter_is_refused(packages: Path, part: Part):
    name = part.name.partition(".")[2] or "__init__"
    edit_class(packages, part, rf"\bdef {name}\(self\b", f"def {name}(self, more")
    assert_refused(imported(packages), f"{part.name} takes")


def test_another_parser_is_refused(packages: Path):
    """This server relies on gunicorn's capital header names."""
    part = next(part for part in PARTS if part.name == "Request.headers")
    edit(packages, part, r"name = name\.upper\(\)", "name = name.title()")
    assert_refused(imported(packages), "parses a request differently")


@pytest.mark.parametrize("name", ["Worker.notify", "Request.body"])
def test_the_server_does_not_start_with_a_renamed_part(tmp_path: Path, packages: Path, name: str):
    rename(packages, next(part for part in PARTS if part.name == name))
    done = Server(tmp_path, {}, {"PYTHONPATH": str(packages)}).try_to_start()
    assert_refused(done, name)


def test_the_parts_are_few():
    assert len(PARTS) <= MAX_PARTS
