# SPDX-License-Identifier: LGPL-2.1-or-later
"""deploy/prometheus, deploy/grafana and docs/monitoring.md.

A real Prometheus with the deployed configuration scrapes a real server, which shows whether rules and panels ask for
series that exist.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kci_storage.errors import TABLE
from tests.deploy.prometheus import (
    DASHBOARD,
    PROMETHEUS,
    ROOT,
    RULE_FILES,
    Scraper,
    panels,
    program,
    running_prometheus,
    substituted,
)
from tests.support.azurite import Azurite
from tests.support.cold import Bench, cold_bench
from tests.support.faultproxy import CONTENT, Say
from tests.support.harness import START_SECONDS, wait_until
from tests.support.wire import SECONDS, Wire, get, new_folder, put, request

TEST_FILES = sorted(path.name for path in PROMETHEUS.glob("*.test.yml"))
DOCUMENT = (ROOT / "docs/monitoring.md").read_text()

RESULTS = {row.label for row in TABLE.values()} | {"ok", "hit", "miss", "stale"}

_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_SELECTOR = re.compile(r"(?<![\w:$])[a-zA-Z_:][\w:]*(?:\{[^}]*\})?(?![\w:({]|\s*\()")
_OPERATORS = {"and", "or", "unless", "offset", "bool", "ignoring", "group_left", "group_right"}


def rules() -> list[dict[str, Any]]:
    """Every deployed rule."""
    documents = [yaml.safe_load((PROMETHEUS / name).read_text()) for name in RULE_FILES]
    return [rule for document in documents for group in document["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in rules() if "record" in rule}


def queries() -> list[tuple[str, str]]:
    """Every query of the dashboard as Grafana sends it, and the legend of its series."""
    targets = [target for panel in panels() for target in panel["targets"]]
    return [(substituted(target["expr"]), target["legendFormat"]) for target in targets]


def selectors(expression: str) -> set[str]:
    """The vector selectors in an expression, without their ranges and offsets.

    >>> sorted(selectors('sum by (job, le) (rate(a_total{b=~"x|y"}[10m])) > 0.5 and c:d:e offset 1d or vector(0)'))
    ['a_total{b=~"x|y"}', 'c:d:e']
    """
    return set(_SELECTOR.findall(_GROUPING.sub("", expression))) - _OPERATORS


def promtool(*arguments: str) -> None:
    """Run promtool in the folder of the rules; fails with its output."""
    run = subprocess.run(
        [program("promtool"), *arguments], cwd=PROMETHEUS, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert run.returncode == 0, run.stdout


# The rules


def test_promtool_accepts_the_configuration_and_the_rules():
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", *RULE_FILES)


@pytest.mark.parametrize("name", TEST_FILES)
def test_alerts_fire_when_they_should_and_only_then(name: str):
    promtool("test", "rules", name)


def test_every_alert_is_seen_to_fire_and_not_to_fire():
    documents = [yaml.safe_load((PROMETHEUS / name).read_text()) for name in TEST_FILES]
    cases = [case for document in documents for case in document["tests"]]
    looks = [look for case in cases for look in case.get("alert_rule_test", [])]
    assert {look["alertname"] for look in looks if look.get("exp_alerts")} == set(ALERTS)
    assert {look["alertname"] for look in looks if not look.get("exp_alerts")} == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_severity_a_summary_and_a_runbook(name: str):
    alert = ALERTS[name]
    assert alert["for"]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert alert["annotations"]["runbook"] == f"docs/monitoring.md#{name.lower()}"
    [section] = re.findall(rf"^### {name}\n\n(.*?)(?=^###? |\Z)", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    assert section.startswith(f"*{alert['labels']['severity'].capitalize()}.* ")


def test_every_documented_alert_exists():
    assert set(re.findall(r"\bKciStorage\w+", DOCUMENT)) == set(ALERTS)
    assert set(re.findall(r"\]\(#([a-z]+)\)", DOCUMENT)) <= {name.lower() for name in ALERTS}


def test_queried_results_exist():
    """In an alternative of several labels, a misspelt one would go unnoticed."""
    text = "\n".join([*(rule["expr"] for rule in rules()), *(query for query, _ in queries())])
    matchers = set(re.findall(r'result(?:=|!=|=~|!~)"([^"]+)"', text))
    assert len(matchers) >= 5
    for pattern in (alternative for matcher in matchers for alternative in matcher.split("|")):
        assert any(re.fullmatch(pattern, label) for label in RESULTS), pattern


# The dashboard


def test_the_dashboard_fits_any_installation():
    assert (DASHBOARD["uid"], DASHBOARD["id"]) == ("kci-storage", None)
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(source == chosen for source in _values(DASHBOARD, "datasource"))
    assert "__inputs" not in DASHBOARD
    for query in (target["expr"] for panel in panels() for target in panel["targets"]):
        assert all('{job="$job",instance=~"$instance"' in selector for selector in selectors(query)), query


def _values(document: Any, name: str) -> Iterator[Any]:
    """All values with this name in a document, at any depth."""
    if isinstance(document, dict):
        yield from (document[key] for key in document if key == name)
        document = list(document.values())
    if isinstance(document, list):
        for item in document:
            yield from _values(item, name)


def test_panels_can_be_told_apart_and_understood():
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in panels():
        assert panel["title"] and panel["description"].endswith("."), panel["id"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        marks = [target["refId"] for target in panel["targets"]]
        assert marks and len(set(marks)) == len(marks), panel["title"]


def test_panels_do_not_overlap():
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for cell in ((place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])):
            assert cell not in taken, f"{panel['title']} overlaps {taken[cell]}"
            taken[cell] = panel["title"]
    assert {row["title"] for row in DASHBOARD["panels"] if row["type"] == "row"} == {
        "Traffic", "Latency", "Cache", "Backend", "Uploads", "Disk", "Machine"
    }  # fmt: skip


def test_the_dashboards_pictures_show_its_layout():
    """The test cannot take them again: that needs half an hour and Grafana's components."""
    for document, name in ((ROOT / "README.md", "dashboard"), (ROOT / "docs/monitoring.md", "dashboard-whole")):
        assert f"pictures/{name}.png)" in document.read_text()
    lowest = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in DASHBOARD["panels"])
    assert _size("dashboard-whole") == (1600, 38 * lowest - 8 + 2 * 16)  # cells, gaps, margins
    assert _size("dashboard")[0] == 1600


def _size(name: str) -> tuple[int, int]:
    """The width and height of a picture, in pixels, from its IHDR (PNG, section 11.2.1)."""
    content = (ROOT / f"docs/pictures/{name}.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 400 * 1024
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_the_tool_for_the_pictures_draws_every_kind_of_panel():
    page = (ROOT / "tools/dashboard_picture/page.jsx").read_text()
    [kinds] = re.findall(r"const KINDS = \{ (.*) \};", page)
    assert set(re.findall(r"(\w+):", kinds)) == {panel["type"] for panel in panels()}


# A real Prometheus over a real server


@pytest.fixture(scope="module")
def bench(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server on which all kinds of events have happened."""
    options = {"server": {"workers": 2, "lock_timeout": 3}}
    with cold_bench(azurite, tmp_path_factory.mktemp("server"), options) as bench:
        cause_everything(bench)
        yield bench


@pytest.fixture(scope="module")
def prometheus(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraper]:
    """The deployed Prometheus, which has scraped the server before and after these events."""
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), bench.server.port) as scraper:
        for _ in range(2):
            scraper.wait_for_scrapes(2)
            cause_everything(bench)
        yield scraper


def cause_everything(bench: Bench) -> None:
    """Uploads, hits, misses, a missing file, a failing backend, a lock that another upload holds."""
    server, folder = bench.server, new_folder()
    put(server, f"{folder}/file", b"content")
    requests.head(f"{server.url}/{folder}/file", timeout=SECONDS)
    assert get(server, f"{folder}/file").headers["X-Cache"] == "hit"
    assert get(server, bench.store(b"content")).headers["X-Cache"] == "miss"
    assert get(server, f"{folder}/none").status_code == 404
    assert get(server, f"{folder}/").status_code == 200
    broken = bench.store(b"content")
    bench.proxy.inject(Say(500, "InternalError"), CONTENT, broken)
    assert get(server, broken).status_code >= 500  # 502, or 503 if the server gives up sooner
    with Wire(server) as first:
        first.send(request("PUT", f"/{folder}/contested", {**server.headers(), "Content-Length": 10}), b"first")
        wait_until(lambda: server.is_writing(f"{folder}/contested"), SECONDS, "the upload's lock")
        assert put(server, f"{folder}/contested", b"second").status_code == 409
        first.send(b"-done")
        first.answer()


def test_every_rule_is_evaluated_without_an_error(prometheus: Scraper):
    def evaluated() -> list[dict[str, Any]]:
        found = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    found = wait_until(evaluated, START_SECONDS, "the rules' first evaluation")
    assert {rule["name"]: rule["health"] for rule in found} == dict.fromkeys([*ALERTS, *RECORDED], "ok")


def test_every_recording_rule_records_something(prometheus: Scraper):
    assert prometheus.without_answer({rule["expr"] for rule in RECORDED.values()}) == set()
    assert prometheus.without_answer(set(RECORDED)) == set()


WITHOUT_SERIES = {"kci_storage_credential_end_timestamp_seconds"}  # with an account's key, which does not end


def test_every_alert_reads_series_that_exist(prometheus: Scraper):
    for rule in ALERTS.values():
        prometheus.labels(rule["expr"])
    watched = {selector for rule in rules() for selector in selectors(rule["expr"])}
    assert len(watched) > 30
    assert prometheus.without_answer(watched) == WITHOUT_SERIES


def test_a_few_failures_raise_no_alarm(prometheus: Scraper):
    """All failures are too rare, and end too soon."""
    alerts = prometheus.ask("alerts")["alerts"]
    assert [alert for alert in alerts if alert["state"] == "firing"] == []


def test_no_panel_is_empty(prometheus: Scraper):
    asked = {query for query, _ in queries()}
    assert len(asked) > 30
    assert prometheus.without_answer(asked) == set()
    assert prometheus.without_answer({selector for query in asked for selector in selectors(query)}) == set()


def test_every_legend_names_labels_that_its_series_have(prometheus: Scraper):
    for query, legend in queries():
        wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
        series = wait_until(lambda query=query: prometheus.labels(query), SECONDS, f"series of {query}")
        assert all(set(labels) == wanted or wanted == set() for labels in series if "__name__" not in labels), query
        assert len(series) == 1 or wanted, query


def test_the_choices_of_the_dashboard(prometheus: Scraper, bench: Bench):
    found = {}
    for variable in DASHBOARD["templating"]["list"][1:]:
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert variable["query"]["query"] == variable["definition"]
        found[variable["name"]] = prometheus.ask(f"label/{label}/values", **{"match[]": substituted(selector)})
    assert found == {"job": ["kci-storage"], "instance": [f"127.0.0.1:{bench.server.port}"]}


# The documentation

Metrics = dict[str, tuple[str, frozenset[str]]]  # by name: the type, and the labels


def shown_metrics(page: str) -> Metrics:
    """The metrics on a page."""
    found: Metrics = {}
    for family in text_string_to_metric_families(page):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = family.type, frozenset(labels)
    return found


def documented_metrics() -> Metrics:
    """The metrics in the documentation's table."""
    rows = re.findall(
        r"^\| `(\w+)` \| (counter|gauge|histogram|summary) \| (.*?) ?\| .+ \|$", DOCUMENT, flags=re.MULTILINE
    )
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_every_metric_is_documented_and_no_other(bench: Bench):
    page = requests.get(f"{bench.server.url}/metrics", timeout=SECONDS).text
    documented = documented_metrics()
    unseen = documented.pop("flask_http_request_exceptions_total")  # there has been none
    assert unseen == ("counter", {"method", "status"})
    unseen = documented.pop("kci_storage_credential_end_timestamp_seconds")  # a key does not end
    assert unseen == ("gauge", frozenset())
    assert documented == shown_metrics(page)


def test_metrics_in_the_text_exist():
    documented = set(documented_metrics())
    named = set(re.findall(r"`((?:kci_storage|flask|storage)_[a-z_]+)`", DOCUMENT)) - {"storage_path"}
    assert sorted(named - documented) == []
    for end in re.findall(r"`…([a-z_]+)", DOCUMENT):
        assert any(name == f"kci_storage_{end}" for name in documented), end


def test_links_events_and_queries_in_the_text_exist():
    for path in re.findall(r"\]\(([\w./-]+)[)#]", DOCUMENT):
        assert (ROOT / "docs" / path).exists(), path
    source = "".join(path.read_text() for path in (ROOT / "kci_storage").rglob("*.py"))
    for event in set(re.findall(r"event=([a-z_]+)", DOCUMENT)):
        assert re.search(rf'event="?{event}\b', source), event
    asked = {selector for query in re.findall(r"`(sum by .+?)`", DOCUMENT) for selector in selectors(query)}
    assert {selector.partition("{")[0] for selector in asked} < set(documented_metrics())
    assert "](docs/monitoring.md)" in (ROOT / "README.md").read_text()
