# SPDX-License-Identifier: LGPL-2.1-or-later
"""The result of ``pip install .``."""

from __future__ import annotations

import configparser
import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kci_storage

ROOT = Path(kci_storage.__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that pip builds from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy = ["setup.cfg", "setup.py", "README.md", "COPYING", "MANIFEST.in"]
    source.mkdir()
    shutil.copytree(ROOT / "kci_storage", source / "kci_storage", ignore=shutil.ignore_patterns("__pycache__"))
    for name in copy:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_every_module_and_the_type_marker_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    written = {str(path.relative_to(ROOT)) for path in (ROOT / "kci_storage").rglob("*") if path.is_file()}
    assert held == {name for name in written if "__pycache__" not in name}


def test_the_wheel_holds_the_licence(wheel):
    licence = next(name for name in wheel.namelist() if name.endswith("COPYING"))
    assert wheel.read(licence) == (ROOT / "COPYING").read_bytes()


def test_the_wheel_names_the_command_and_the_drivers(wheel):
    points = configparser.ConfigParser()
    points.read_string(wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode())
    assert dict(points["console_scripts"]) == {"kci-storage": "kci_storage.cli.main:main"}
    assert set(points["kci_storage.drivers"]) == {"azure", "local"}


def test_the_wheel_has_the_packages_version(wheel):
    assert f"-{kci_storage.__version__}-" in Path(wheel.filename).name


def test_the_wheel_says_where_the_project_lives(wheel):
    metadata = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))))
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    home = "https://github.com/kernelci/kci-storage"
    assert urls["Homepage"] == urls["Source"] == home
    assert {name: url.removeprefix(home) for name, url in urls.items() if name in ("Changes", "Documentation")} == {
        "Changes": "/blob/main/CHANGES.md",
        "Documentation": "/tree/main/docs",
    }
    assert urls["Issues"] == f"{home}/issues"


SOURCES = ("*.py", "*.sh", ".ci/run")
SPDX = "# SPDX-License-Identifier: LGPL-2.1-or-later"
FETCHED = {".venv", ".tools", "build", "node_modules"}


def sources() -> list[Path]:
    """The project's Python and shell files."""
    found = (path.relative_to(ROOT) for pattern in SOURCES for path in ROOT.rglob(pattern))
    return sorted(path for path in found if not FETCHED & set(path.parts))


@pytest.mark.parametrize("path", sources(), ids=str)
def test_every_source_file_says_its_licence_first(path):
    lines = (ROOT / path).read_text().splitlines()
    assert next((line for line in lines if not line.startswith("#!")), None) == SPDX
