# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/drivers.md: its example is a driver, by the contract's own tests, and works under a server once installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import requests

import kci_storage
from kci_storage.drivers.base import Driver
from tests.drivers.contract import KIB, DriverContract, content_of, put
from tests.support.cold import in_background
from tests.support.harness import Server

ROOT = Path(kci_storage.__file__).parent.parent
EXAMPLE = ROOT / "docs/example_driver"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example's module."""
    spec = importlib.util.spec_from_file_location("kci_storage_sqlite", EXAMPLE / "kci_storage_sqlite.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestSqliteDriver(DriverContract):
    @pytest.fixture
    def driver(self, example, tmp_path, monkeypatch) -> Iterator[Driver]:
        monkeypatch.setattr(example, "PAGE_SIZE", 7)
        monkeypatch.setattr(example, "PIECE_SIZE", 64 * KIB)
        driver = example.SqliteDriver(tmp_path / "objects.sqlite")
        yield driver
        driver.close()

    def test_who_comes_first_waits_for_another_one_who_opens_the_database(self, driver, tmp_path):
        with contextlib.closing(sqlite3.connect(tmp_path / "objects.sqlite", check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            stored = in_background(put, driver, "a", b"content")
            with pytest.raises(TimeoutError):
                stored.result(timeout=0.2)
            other.rollback()
            assert stored.result() == driver.stat("a")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with what pip makes of the example."""
    source, target = tmp_path / "source", tmp_path / "site"
    subprocess.run(["cp", "-r", EXAMPLE, source], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    subprocess.run([*pip, source], check=True)
    return target


def test_a_server_uses_the_example_once_it_is_installed(installed: Path, start_server: Callable[..., Server]) -> None:
    search = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    server = start_server("sqlite", sqlite={"file": "objects.sqlite"}, environ={"PYTHONPATH": search})
    content = content_of(3 * KIB * KIB)
    url = f"{server.url}/builds/v6.12/Image"
    assert requests.put(url, data=content, headers=server.headers(), timeout=60).status_code == 201
    assert requests.get(url, timeout=60).content == content
    ranged = requests.get(url, headers={"Range": "bytes=-5"}, timeout=60)
    assert (ranged.status_code, ranged.content) == (206, content[-5:])
    assert requests.get(f"{server.url}/v1/list", timeout=60).text == "builds/v6.12/Image\n"
    assert requests.delete(url, headers=server.headers(), timeout=60).status_code == 204
    assert requests.get(url, timeout=60).status_code == 404
    assert (server.folder / "objects.sqlite").is_file()


def test_a_server_without_the_examples_setting_does_not_start(installed: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('driver = "sqlite"\njwt_secret = "0123456789abcdef0123456789abcdef"\n')
    code = "from kci_storage.app import create_app; create_app()"
    environ = {**os.environ, "KCI_STORAGE_CONFIG": str(config)}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert "sqlite.file: expected a path" in result.stderr
