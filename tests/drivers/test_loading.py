# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding a driver by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kci_storage import drivers
from kci_storage.config.settings import ConfigError
from kci_storage.drivers.azure.driver import AzureDriver
from kci_storage.drivers.local.driver import LocalDriver
from tests.support.harness import toml


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a third party's package that has one driver, with the given source."""

    def install(source: str, value: str = "third_party_driver:Theirs") -> None:
        metadata = tmp_path / "third_party-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[{drivers.GROUP}]\ntheirs = {value}\n")
        (tmp_path / "third_party_driver.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "third_party_driver", raising=False)

    yield install
    sys.modules.pop("third_party_driver", None)


def test_the_own_drivers_are_found_by_their_names():
    assert drivers.load("local") is LocalDriver
    assert drivers.load("azure") is AzureDriver


def test_a_third_partys_driver_is_found_by_its_name(plugin):
    plugin("from kci_storage.drivers.local.driver import LocalDriver\n\nclass Theirs(LocalDriver):\n    pass\n")
    assert drivers.load("theirs").__module__ == "third_party_driver"


@pytest.mark.parametrize("name", ["", "Local", "s3", "local ", "kci_storage.drivers.local.driver:LocalDriver"])
def test_an_unknown_name_is_told_those_there_are(name):
    with pytest.raises(ConfigError, match="azure, local"):
        drivers.load(name)


@pytest.mark.parametrize("source", ["raise RuntimeError('two\\nlines')", "import no_such_module", "x = (", ""])
def test_a_driver_that_cannot_be_imported_is_named(plugin, source):
    plugin(source)
    with pytest.raises(ConfigError, match="theirs") as caught:
        drivers.load("theirs")
    assert str(caught.value).isprintable(), "a message is one line"


@pytest.mark.parametrize("source", ["Theirs = 1", "class Theirs: pass", "def Theirs(): pass"])
def test_what_is_no_driver_is_refused(plugin, source):
    plugin(source)
    with pytest.raises(ConfigError, match="not a Driver"):
        drivers.load("theirs")


def test_a_driver_that_cannot_be_imported_ends_the_server_without_a_traceback(plugin, tmp_path):
    plugin("raise RuntimeError('no library')")
    # Some of the workers fail while the server ends because of the first one.
    server = {"bind": f"unix:{tmp_path}/socket", "workers": 8}
    (tmp_path / "config.toml").write_text(toml({"driver": "theirs", "jwt_secret": "s" * 32, "server": server}))
    command = [sys.executable, "-m", "kci_storage.cli", "serve"]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4, "as gunicorn says that an application cannot be loaded"
    assert "kci-storage: driver: 'theirs' cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr
