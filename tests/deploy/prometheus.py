# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real Prometheus with the rules in ``deploy/prometheus``, and the dashboard in ``deploy/grafana``."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import kci_storage
from tests.support.harness import START_SECONDS, STOP_SECONDS, reserve_port, wait_until
from tests.support.wire import SECONDS

ROOT = Path(kci_storage.__file__).parent.parent
PROMETHEUS = ROOT / "deploy/prometheus"
RULE_FILES = ("kci-storage.recording.yml", "kci-storage.alerts.yml")
DASHBOARD = json.loads((ROOT / "deploy/grafana/kci-storage.json").read_text())

INTERVAL = "2s"  # between two scrapes; on a loaded machine some fail
ANSWERED_SECONDS = 90  # within which every query must have given a series


def panels() -> list[dict[str, Any]]:
    """All panels with content."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def substituted(query: str, rate_interval: str = "5m") -> str:
    """A query with the dashboard's variables replaced as for all servers.

    >>> substituted('rate(a{job="$job",instance=~"$instance"}[$__rate_interval])')
    'rate(a{job="kci-storage",instance=~".*"}[5m])'
    """
    for name, value in (("$job", "kci-storage"), ("$instance", ".*"), ("$__rate_interval", rate_interval)):
        query = query.replace(name, value)
    return query


def program(name: str) -> str:
    """The path of a program of Prometheus; the test is skipped where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: prometheus)")
    return found


class Scraper:
    """A running Prometheus."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the API; a query that Prometheus cannot parse raises."""
        response = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=SECONDS)
        answer = response.json()
        assert answer["status"] == "success", f"{parameters}: {answer['error']}"
        return answer["data"]

    def labels(self, query: str) -> list[dict[str, str]]:
        """The labels of each series in a query's current result."""
        return [series["metric"] for series in self.ask("query", query=query)["result"]]

    def wait_for_scrapes(self, count: int) -> None:
        """Wait until this many more have succeeded."""
        before = self._scrapes()
        wait_until(lambda: self._scrapes() >= before + count, START_SECONDS, "scrapes")

    def _scrapes(self) -> int:
        counts = self.ask("query", query="sum_over_time(up[1h])")["result"]
        return int(counts[0]["value"][1]) if counts else 0

    def without_answer(self, asked: set[str]) -> set[str]:
        """The queries that give no series within :data:`ANSWERED_SECONDS`.

        After a scrape that came too late, on a loaded machine, all of them give none for a moment.
        """
        left = set(asked)

        def all_answered() -> bool:
            left.difference_update([query for query in left if self.labels(query)])
            return not left

        with contextlib.suppress(AssertionError):
            wait_until(all_answered, ANSWERED_SECONDS, "series")
        return left


@contextlib.contextmanager
def running_prometheus(folder: Path, port: int, interval: str = INTERVAL) -> Iterator[Scraper]:
    """Prometheus as deployed, except for the server's address and the intervals."""
    for name in RULE_FILES:
        shutil.copy(PROMETHEUS / name, folder)
    (folder / "prometheus.yml").write_text(configuration(port, interval))
    with contextlib.closing(reserve_port()) as reserved:
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        command = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--web.listen-address={address}"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, f"--storage.tsdb.path={folder}/data"], stdout=log, stderr=log)
        try:
            wait_until(lambda: _is_ready(process, folder, address), START_SECONDS, "Prometheus' start")
            yield Scraper(f"http://{address}")
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def configuration(port: int, interval: str) -> str:
    """The deployed configuration, with the server's address and the intervals of the test."""
    text = (PROMETHEUS / "prometheus.yml").read_text()
    for old, new in (
        ("scrape_interval: 15s", f"scrape_interval: {interval}"),
        ("evaluation_interval: 15s", f"evaluation_interval: {interval}"),
        ("scrape_timeout: 10s", f"scrape_timeout: {interval}"),
        ('targets: ["127.0.0.1:3000"]', f'targets: ["127.0.0.1:{port}"]'),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def _is_ready(process: subprocess.Popen[bytes], folder: Path, address: str) -> bool:
    assert process.poll() is None, (folder / "log").read_text()
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"http://{address}/-/ready", timeout=5).ok
    return False
