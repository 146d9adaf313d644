# SPDX-License-Identifier: LGPL-2.1-or-later
"""A minute of histories with fixed seeds. ``make jepsen`` makes more of them, with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.linearizability.run import run_history
from tests.linearizability.system import MODES
from tests.support.azurite import Azurite

SECONDS = 6  # of each, without its start and its end

pytestmark = pytest.mark.timeout(600)  # what waits has time-outs of its own


@pytest.mark.parametrize(("mode", "seed"), [("azure", 1), ("azure-two", 2), ("azure-tiny", 3), ("azure-disk", 4)])
def test_azure(azurite: Azurite, tmp_path: Path, mode: str, seed: int) -> None:
    report = run_history(MODES[mode], seed, SECONDS, tmp_path, azurite)
    assert report.problems == [], report.text()


@pytest.mark.parametrize(("mode", "seed"), [("local", 5), ("local-disk", 6)])
def test_local(tmp_path: Path, mode: str, seed: int) -> None:
    report = run_history(MODES[mode], seed, SECONDS, tmp_path, None)
    assert report.problems == [], report.text()
