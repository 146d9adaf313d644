"""The local driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from kci_storage.drivers import local
from kci_storage.drivers.local import LocalDriver
from tests.driver_contract import DriverContract


class TestLocalDriver(DriverContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Path:
        # So deep that the longest keys do not fit into one path of the system.
        return tmp_path / ("storage" * 30)

    @pytest.fixture
    def driver(self, storage, monkeypatch):
        monkeypatch.setattr(local, "PAGE_SIZE", 7)
        monkeypatch.setattr(local, "PIECE_SIZE", 64 * 1024)
        driver = LocalDriver(storage)
        yield driver
        driver.close()

    def leftovers(self, driver):
        root = driver._tree.root
        folders = {root / name for name in (".kci", ".kci/tmp", ".kci/lock", ".kci/meta")}
        for path in root.rglob("*"):
            if path not in folders and path.parent != root / ".kci/meta":
                yield str(path.relative_to(root))
