# SPDX-License-Identifier: LGPL-2.1-or-later
"""``GET /metrics`` over HTTP: the names that dashboards use, and values that are right over all workers."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kci_storage.errors import TABLE
from tests.support.harness import Server, running, wait_until
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Wire,
    access,
    exchange,
    form,
    get,
    new_folder,
    part,
    post,
    post_body,
    put,
    request,
)

MIB = 1 << 20

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def page(server: Server, **headers: str) -> requests.Response:
    response = requests.get(f"{server.url}/metrics", headers=headers, timeout=SECONDS)
    assert response.status_code == 200
    return response


def scrape(server: Server) -> Series:
    """Every sample, by its name and labels."""
    families = text_string_to_metric_families(page(server).text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels, whatever their other labels."""
    return sum(
        number for (found, labelled), number in series.items() if found == name and labels.items() <= set(labelled)
    )


class Growth:
    """The growth of metrics since this object was made."""

    def __init__(self, server: Server):
        self._server = server
        self._before = scrape(server)

    def __call__(self, name: str, **labels: str) -> float:
        return value(scrape(self._server), name, **labels) - value(self._before, name, **labels)


@pytest.fixture(scope="module")
def quiet_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the local driver, for this module's requests alone."""
    document = {
        "server": {"max_upload_bytes": MIB, "lock_timeout": 0.2},
        "users": [{"name": "user@example.com", "prefixes": [""]}, {"name": "limited@example.com", "prefixes": ["x"]}],
    }
    with running(Server(tmp_path_factory.mktemp("quiet"), document)) as server:
        yield server


# What is there


EVERYWHERE = {
    "storage_free_space": [{"hostname", "diskname", "mount_point"}],
    "storage_total_space": [{"hostname", "diskname", "mount_point"}],
    "storage_files_cached": [{"hostname"}],
    "kci_storage_cache_bytes": [{"hostname"}],
    "kci_storage_cache_requests_total": [{"result"}],
    "kci_storage_cache_revalidations_total": [{"result"}],
    "kci_storage_fills_total": [{"result"}],
    "kci_storage_fills_in_progress": [set()],
    "kci_storage_evicted_files_total": [set()],
    "kci_storage_evicted_bytes_total": [set()],
    "kci_storage_sent_bytes_total": [set()],
    "kci_storage_received_bytes_total": [set()],
    "kci_storage_http_requests_total": [{"method", "route", "status"}],
    "kci_storage_http_request_duration_seconds_bucket": [{"method", "route", "le"}],
    "kci_storage_uploads_total": [{"result"}],
    "kci_storage_backend_operations_total": [{"operation", "result"}],
    "kci_storage_backend_operation_duration_seconds_bucket": [{"operation", "le"}],
    "kci_storage_lock_wait_seconds_count": [set()],
    "kci_storage_lock_timeouts_total": [set()],
    "kci_storage_machine_cpu_seconds_total": [{"mode"}],
    "kci_storage_machine_memory_total_bytes": [set()],
    "kci_storage_machine_memory_available_bytes": [set()],
    "kci_storage_machine_load": [{"minutes"}],
}


def test_every_metric_exists_before_its_first_event(start_server: Callable[..., Server]):
    """A rate over a counter that appears with its first event misses that event."""
    server = start_server()
    requests_total = "kci_storage_http_requests_total"  # there once a request was counted, such as that of the start
    wait_until(lambda: any(name == requests_total for name, _ in scrape(server)), SECONDS, "a request's count")
    series = scrape(server)
    for name, labels in EVERYWHERE.items():
        found = [{label for label, _ in labelled} for other, labelled in series if other == name]
        assert found and all(names in labels for names in found), name
    for result in ("hit", "miss", "stale"):
        assert ("kci_storage_cache_requests_total", frozenset({("result", result)})) in series
    for label in ("ok", *(row.label for row in TABLE.values())):
        assert ("kci_storage_uploads_total", frozenset({("result", label)})) in series
    for operation in ("stat", "read", "commit", "delete", "list", "probe"):
        labels = frozenset({("operation", operation), ("result", "ok")})
        assert ("kci_storage_backend_operations_total", labels) in series


def test_promtool_has_nothing_to_say(server: Server):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    get(server, f"{new_folder()}/none")
    put(server, f"{new_folder()}/a", b"content")
    post_body(server, b"nonsense")
    check = subprocess.run([promtool, "check", "metrics"], input=page(server).content, capture_output=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, b"", b"")


def test_openmetrics_for_clients_that_prefer_it(server: Server):
    response = page(server, Accept="application/openmetrics-text; version=1.0.0")
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(response.text)}
    assert {"storage_free_space", "kci_storage_uploads"} <= names
    assert page(server).headers["Content-Type"].startswith("text/plain; version=")


NONSENSE = (
    "application/openmetrics-text; version=x",
    "application/openmetrics-text;version=1.x.0",
    "application/openmetrics-text; version=",
    'application/openmetrics-text; version="1.0.0"',
    "application/openmetrics-text; version=0.0.1; version=y",
    f"application/openmetrics-text; version={'9' * 5000}.0.0",
    "application/openmetrics-text; version=\u00b2.0.0",
    "text/plain; version=x; escaping=y",
    "text/plain; version=1.0.0.",
    "; ; version=x, ,;;",
    "\xff\xfe",
    "*/*; version",
    "application/openmetrics-text; version=x, application/openmetrics-text; version=y",
    "",
)


@pytest.mark.parametrize("accept", NONSENSE, ids=lambda accept: repr(accept[:60]))
def test_an_accept_that_makes_no_sense_gets_the_default_format(local_server: Server, accept: str):
    answer = exchange(local_server, request("GET", "/metrics").replace(b"\r\n\r\n", accept_field(accept)))
    assert (answer.status, answer.headers["Content-Type"][:20]) == (200, "text/plain; version=")
    assert list(text_string_to_metric_families(answer.body.decode()))


def accept_field(value: str) -> bytes:
    return b"\r\nAccept: " + value.encode("latin-1") + b"\r\n\r\n"


def test_of_an_accept_that_makes_some_sense_the_rest_counts(local_server: Server):
    accept = "application/openmetrics-text; version=x, application/openmetrics-text; version=1.0.0, text/plain"
    assert page(local_server, Accept=accept).headers["Content-Type"].startswith("application/openmetrics-text")


def test_the_disks(server: Server):
    put(server, f"{new_folder()}/a", b"content")  # the local driver's folder comes with the first one
    series = scrape(server)
    folders = [server.cache_directory]
    if server.document["driver"] == "local":
        folders.append(server.storage_path)
    for folder in folders:
        mount = mount_point(str(folder))
        total = value(series, "storage_total_space", hostname=platform.node(), mount_point=mount)
        free = value(series, "storage_free_space", hostname=platform.node(), mount_point=mount)
        assert total == shutil.disk_usage(folder).total
        assert 0 < free <= total


def mount_point(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def test_the_machine(server: Server):
    series = scrape(server)
    assert value(series, "kci_storage_machine_memory_total_bytes") == psutil.virtual_memory().total
    assert 0 < value(series, "kci_storage_machine_memory_available_bytes") < psutil.virtual_memory().total
    assert value(series, "kci_storage_machine_cpu_seconds_total", mode="user") > 0
    assert value(series, "kci_storage_machine_load", minutes="5") >= 0


# Numbers


def test_requests_are_counted_over_all_workers(quiet_server: Server):
    key = f"{new_folder()}/a"
    put(quiet_server, key, b"content")
    grown = Growth(quiet_server)
    for _ in range(40):  # each on a connection of its own
        get(quiet_server, key)
        get(quiet_server, "none")
    requests.head(f"{quiet_server.url}/{key}", timeout=SECONDS)
    get(quiet_server, key, {"Range": "bytes=0-1"})
    get(quiet_server, key, {"If-None-Match": "*"})
    name, seconds = "kci_storage_http_requests_total", "kci_storage_http_request_duration_seconds_count"
    for method, count in (("GET", 82), ("HEAD", 1)):  # after their ends, by threads that may be slow
        wait_until(lambda: grown(seconds, method=method, route="download") >= count, SECONDS, "the last")  # noqa: B023
    assert grown(name, method="GET", route="download", status="304") == 1
    assert grown(name, method="GET", route="download", status="200") == 40
    assert grown(name, method="GET", route="download", status="404") == 40
    assert grown(name, method="HEAD", route="download", status="200") == 1
    assert grown(name, method="GET", route="download", status="206") == 1
    assert grown(seconds, method="GET", route="download") == 82  # and not more
    assert grown("kci_storage_cache_requests_total", result="hit") == 43


def test_a_worker_that_dies_takes_no_count_along(start_server: Callable[..., Server]):
    server = start_server()
    server.expected_errors.append("was sent SIGKILL")
    grown = Growth(server)
    for _ in range(20):
        access(server, get(server, "none"))
    for pid in server.worker_pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.log().count("Booting worker") == 4, SECONDS, "new workers")
    assert grown("kci_storage_http_requests_total", route="download", status="404") == 20
    assert value(scrape(server), "kci_storage_fills_in_progress") == 0


ROUNDS = 6  # for each of which workers start; the second shows already what adds up


def test_new_workers_continue_the_counts_of_replaced_ones(start_server: Callable[..., Server], tmp_path: Path):
    """No total decreases while workers are replaced under load, and no files of replaced workers remain."""
    server = start_server(environ={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    server.expected_errors.append("was sent SIGKILL")
    stopped = threading.Event()
    with ThreadPoolExecutor(3) as clients:
        try:
            counted = [clients.submit(ask_until, stopped, server) for _ in range(3)]
            totals = cumulative(scrape(server))
            for number in range(ROUNDS):
                replace_workers(server, signal.SIGKILL if number % 2 else signal.SIGTERM)
                before, totals = totals, cumulative(scrape(server))
                assert not {series for series, number in before.items() if totals.get(series, 0) < number}
        finally:
            stopped.set()
    assert all(thread.result() for thread in counted)
    assert value(totals, "kci_storage_http_requests_total", route="download") >= ROUNDS
    processes = {path.name.rpartition("_")[2] for path in tmp_path.iterdir()}
    assert len(processes) <= 3  # two workers and the master


def ask_until(stopped: threading.Event, server: Server) -> int:
    """Send requests until stopped, also while no worker answers; returns the number of responses."""
    answers = 0
    while not stopped.is_set():
        with contextlib.suppress(requests.RequestException):  # the worker was killed
            answers += get(server, "none").status_code == 404
    return answers


def replace_workers(server: Server, number: int) -> None:
    """End all workers by a signal; the master starts others."""
    old = server.worker_pids()
    for pid in old:
        os.kill(pid, number)
    wait_until(lambda: not set(old) & set(server.worker_pids()), SECONDS, "the end of the workers")
    wait_until(lambda: len(server.worker_pids()) == len(old), SECONDS, "new workers")


def cumulative(series: Series) -> Series:
    """The server's metrics that only grow."""
    endings = ("_total", "_count", "_sum", "_bucket")
    return {
        (name, labels): number
        for (name, labels), number in series.items()
        if name.endswith(endings) and not name.startswith("kci_storage_machine")
    }


def test_bytes_are_those_that_went_over_the_wire(quiet_server: Server):
    key, content = f"{new_folder()}/a", os.urandom(700_000)
    grown = Growth(quiet_server)
    access(quiet_server, put(quiet_server, key, content))
    assert grown("kci_storage_received_bytes_total") == 700_000
    body = form(part("path", b"x"), part("file0", content, "b"), part("unknown", bytes(5000)))
    access(quiet_server, post_body(quiet_server, body))
    assert grown("kci_storage_received_bytes_total") == 700_000 + len(body)
    before = grown("kci_storage_sent_bytes_total")
    answers = [
        get(quiet_server, key),
        get(quiet_server, key, {"Range": "bytes=1-100"}),
        get(quiet_server, key, {"Range": "bytes=1-100,300-400"}),
        get(quiet_server, key, {"If-None-Match": "*"}),
        get(quiet_server, "none"),
        page(quiet_server),
    ]
    for answer in answers:
        access(quiet_server, answer)
    sent = sum(len(answer.content) for answer in answers)
    pages = int(requests.head(f"{quiet_server.url}/metrics", timeout=SECONDS).headers["Content-Length"])
    # Pages of metrics, each of about the same size, were sent in between to be told this.
    assert sent + pages // 2 < grown("kci_storage_sent_bytes_total") - before < sent + pages * 2


def test_bytes_of_clients_that_disconnect(quiet_server: Server):
    key, content = f"{new_folder()}/a", bytes(MIB)
    put(quiet_server, key, content)
    grown = Growth(quiet_server)
    with Wire(quiet_server) as wire:
        wire.send(request("PUT", f"/{key}", {**quiet_server.headers(), "Content-Length": MIB}), bytes(400_000))
        wire.end()
        access(quiet_server, wire.answer())
    assert grown("kci_storage_received_bytes_total") == 400_000
    assert grown("kci_storage_uploads_total", result="client_disconnected") == 1
    assert grown("kci_storage_uploads_total", result="ok") == 0


def test_uploads_by_their_result(quiet_server: Server):
    folder = new_folder()
    grown = Growth(quiet_server)
    limited = quiet_server.headers("limited@example.com")
    one = form(part("path", folder.encode()), part("file0", b"1", "a"))
    post(quiet_server, part("path", folder.encode()), *(part(f"file{n}", b"x", f"{n}") for n in range(3)))
    put(quiet_server, f"{folder}/put", b"content")
    put(quiet_server, f"{folder}/put", b"content", If_None_Match="*")
    put(quiet_server, f"{folder}/put", b"content", Content_MD5="AAAAAAAAAAAAAAAAAAAAAA==")
    put(quiet_server, f"{folder}/put/below", b"content")
    put(quiet_server, "v1/a", b"content")
    put(quiet_server, f"{folder}/large", bytes(MIB + 1))
    requests.put(f"{quiet_server.url}/a", b"content", timeout=SECONDS)
    requests.put(f"{quiet_server.url}/a", b"content", headers=limited, timeout=SECONDS)
    requests.post(f"{quiet_server.url}/upload", one, headers={**limited, **FORM_TYPE}, timeout=SECONDS)
    access(quiet_server, post_body(quiet_server, b"nonsense"))
    for result, count in {
        "ok": 4,
        "precondition_failed": 1,
        "digest_mismatch": 1,
        "key_conflict": 1,
        "bad_key": 1,
        "too_large": 1,
        "unauthorized": 1,
        "forbidden": 2,
        "bad_form": 1,
    }.items():
        assert grown("kci_storage_uploads_total", result=result) == count, result


def test_lock_waits_and_their_time_outs(quiet_server: Server):
    grown = Growth(quiet_server)
    with Wire(quiet_server) as first:
        first.send(request("PUT", "/contested", {**quiet_server.headers(), "Content-Length": 10}), b"first")
        wait_until(lambda: quiet_server.is_writing("contested"), SECONDS, "the upload's lock")
        assert put(quiet_server, "contested", b"second").status_code == 409
        response = requests.delete(f"{quiet_server.url}/contested", headers=quiet_server.headers(), timeout=SECONDS)
        assert response.status_code == 409
        first.send(b"-done")
        first.answer()
    assert grown("kci_storage_lock_timeouts_total") == 2
    assert grown("kci_storage_lock_wait_seconds_count") >= 3
    assert grown("kci_storage_lock_wait_seconds_sum") >= 0.4
    assert grown("kci_storage_uploads_total", result="write_conflict") == 1


def test_the_cache_and_the_backend(start_server: Callable[..., Server], azurite: Any):
    server = start_server("azure")
    grown = Growth(server)
    for name in "abc":
        put(server, name, bytes(1000))
    with azurite.client(server.document["azure"]["container"]) as container:
        container.upload_blob("cold", bytes(500))
    assert (grown("storage_files_cached"), grown("kci_storage_cache_bytes")) == (3, 3000)
    assert get(server, "cold").headers["X-Cache"] == "miss"
    wait_until(lambda: grown("storage_files_cached") == 4, SECONDS, "the copy in the cache")
    assert grown("kci_storage_cache_bytes") == 3500
    for _ in range(3):
        assert get(server, "cold").headers["X-Cache"] == "hit"
    get(server, "none")
    requests.delete(f"{server.url}/a", headers=server.headers(), timeout=SECONDS)
    assert (grown("storage_files_cached"), grown("kci_storage_cache_bytes")) == (3, 2500)
    assert grown("kci_storage_cache_requests_total", result="miss") == 1
    assert grown("kci_storage_cache_requests_total", result="hit") == 3
    assert grown("kci_storage_fills_total", result="ok") == 1
    assert value(scrape(server), "kci_storage_fills_in_progress") == 0
    assert grown("kci_storage_backend_operations_total", operation="commit", result="ok") == 3
    assert grown("kci_storage_backend_operations_total", operation="delete", result="ok") == 1
    assert grown("kci_storage_backend_operations_total", operation="read", result="ok") >= 1
    assert grown("kci_storage_backend_operations_total", operation="read", result="not_found") == 1
    assert grown("kci_storage_backend_operation_duration_seconds_count", operation="commit") == 3


# Labels


def test_clients_cannot_make_labels(quiet_server: Server):
    """500 different values of everything that a client chooses create no series."""
    session = requests.Session()

    def ask(number: int, kinds: slice = slice(None)) -> None:
        headers = {
            "User-Agent": f"agent-{number}",
            "X-Request-ID": f"id-{number}",
            "Host": f"host-{number}",
            "Accept": f"type/{number}",
            "Authorization": f"Bearer {quiet_server.token(f'email-{number}@example.com')}",
        }
        for method, path in [
            ("GET", f"secret-key-{number}"),
            (f"METHOD{number}", f"secret-key-{number}"),
            ("GET", f"v1/{number}"),
            ("GET", f"v1/list?prefix=secret-key-{number}"),
            ("PATCH", f"secret-key-{number}"),
            ("PUT", f"secret-key-{number}"),
            ("DELETE", f"secret-key-{number}"),
            ("POST", f"upload?x={number}"),
        ][kinds]:
            session.request(method, f"{quiet_server.url}/{path}", headers=headers, timeout=SECONDS)

    ask(1)
    access(quiet_server, page(quiet_server))  # every kind of request is known by then, a scrape too
    access(quiet_server, get(quiet_server, "none"))
    before = scrape(quiet_server)
    for number in range(100, 600):
        ask(number, slice(number % 8, number % 8 + 2))
    access(quiet_server, get(quiet_server, "none"))
    text, after = page(quiet_server).text, scrape(quiet_server)
    assert not set(after) - set(before)
    for chosen in ("secret-key", "METHOD", "agent-", "email-", "host-5", "id-5"):
        assert chosen not in text
