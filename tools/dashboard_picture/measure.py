# SPDX-License-Identifier: LGPL-2.1-or-later
"""The results of the dashboard's queries, from the deployed Prometheus and a server with real traffic."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import traffic  # noqa: E402

from tests.deploy.prometheus import DASHBOARD, Scraper, panels, running_prometheus, substituted  # noqa: E402
from tests.support.azurite import running_azurite  # noqa: E402
from tests.support.cold import cold_bench  # noqa: E402

SCRAPE_SECONDS = 15  # as deployed
STEP_SECONDS = 15  # between two points of a curve; for so short a time, Grafana uses the interval of the scrapes
RATE_INTERVAL = "1m"  # the value of $__rate_interval then: four scrapes


def measured(seconds: float) -> dict[str, Any]:
    """The dashboard, with the results of its queries after this many seconds of traffic."""
    with tempfile.TemporaryDirectory(prefix="kci-storage-dashboard-") as work:
        folder = Path(work)
        for name in ("azurite", "server", "prometheus"):
            (folder / name).mkdir()
        with (
            running_azurite(folder / "azurite") as azurite,
            cold_bench(azurite, folder / "server", traffic.OPTIONS, [".*"]) as bench,
            running_prometheus(folder / "prometheus", bench.server.port, f"{SCRAPE_SECONDS}s") as scraper,
        ):
            traffic.Traffic(bench).run(seconds)
            end = time.time()
            found = results(scraper, end, seconds)
    return {"from": end - seconds, "to": end, "dashboard": DASHBOARD, "results": found}


def results(scraper: Scraper, end: float, seconds: float) -> dict[str, Any]:
    """The series of each panel's queries, by the panel's ID and the query's reference."""
    return {
        panel["id"]: {target["refId"]: curve(scraper, target, end, seconds) for target in panel["targets"]}
        for panel in panels()
    }


def curve(scraper: Scraper, target: dict[str, Any], end: float, seconds: float) -> list[Any]:
    """The series of a query over the last ``seconds`` before ``end``, at the times for which Grafana would ask."""
    end -= end % STEP_SECONDS
    query = substituted(target["expr"], RATE_INTERVAL)
    asked = {"query": query, "start": str(end - seconds), "end": str(end), "step": str(STEP_SECONDS)}
    found: list[Any] = scraper.ask("query_range", **asked)["result"]
    return found
