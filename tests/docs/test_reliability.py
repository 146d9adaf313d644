# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/reliability.md names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import requests

import kci_storage
from kci_storage.config.settings import SECTIONS, settings
from kci_storage.errors import TABLE
from tests.support.harness import Server
from tests.support.wire import SECONDS

ROOT = Path(kci_storage.__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text()


def test_its_metrics_are_shown(azure_server: Server) -> None:
    page = requests.get(f"{azure_server.url}/metrics", timeout=SECONDS).text
    shown = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}
    named = {f"kci_storage_{name}" for name in re.findall(r"`…([a-z_]+)", DOCUMENT)}
    named |= set(re.findall(r"`(storage_[a-z_]+)`", DOCUMENT))
    assert len(named) > 8
    assert sorted(named - shown) == []


def test_its_labels_exist() -> None:
    known = {row.label for row in TABLE.values()} | {"stale", "changed", "deleted"}
    results = re.findall(r'result="([a-z_]+)"', DOCUMENT) + re.findall(r'"([a-z]+)"`', DOCUMENT)
    assert len(results) > 5
    assert set(results) <= known


def test_its_events_are_logged() -> None:
    source = "".join(path.read_text() for path in (ROOT / "kci_storage").rglob("*.py"))
    for event in set(re.findall(r"event=([a-z_]+)", DOCUMENT)):
        assert f"event={event} " in source or f'event="{event}"' in source, event


def test_its_settings_exist() -> None:
    known = {name for section in SECTIONS.values() for name in settings(section)}
    for name in ("read_timeout", "connect_timeout", "send_timeout", "lock_timeout", "revalidate_after", "max_fills"):
        assert name in known and f"{name}`" in DOCUMENT


def test_its_command_names_tests_that_exist() -> None:
    files = re.findall(r"tests/[\w/]+\.py", DOCUMENT)
    assert len(files) == 2
    assert all((ROOT / name).is_file() for name in files)
    assert "](docs/reliability.md)" in (ROOT / "README.md").read_text()
