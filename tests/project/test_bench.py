# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make bench``: a run with tiny files, the comparison of the figures, and that errors are not measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree as ET

import psutil
import pytest

import benchmarks
from benchmarks import __main__ as main
from benchmarks import chart, load, measuring, report, yardsticks
from benchmarks import stage as stages
from benchmarks.measuring import OURS, BenchError, Measure, Row, Sample, Workload
from benchmarks.scale import SCALES
from tests.support.azurite import Azurite
from tests.support.harness import Server, wait_until

ROOT = Path(benchmarks.__file__).parent.parent
TINY = SCALES["tiny"]
SECONDS = 600
SYSTEMS = {  # in addition to ours
    "hits": {"gunicorn", "our worker", "nginx"},
    "uploads": {"gunicorn", "gunicorn, fsync", "nginx"},
    "archives": {"Azure SDK"},
    "cold": {"nginx", "nginx, tuned", "Varnish"},
    "slow": {"nginx"},
}
WORKLOADS = {
    ("hits", "4 KiB"): {"measures": ["", "p99"]},
    ("hits", "4 KiB, local driver"): {"measures": ["", "p99"]},
    ("hits", "4 KiB, every rule on"): {"measures": ["", "p99"], "others": {"default rules"}},
    ("hits", "304 Not Modified"): {"measures": ["", "p99"]},
    ("hits", "1 MiB"): {"measures": ["", "p99"]},
    ("hits", "ranges of 1 MiB of 4 MiB"): {"measures": ["", "p99"]},
    ("hits", "one download of 4 MiB"): {},
    ("uploads", "form of 4 MiB"): {},
    ("uploads", "PUT of 4 MiB"): {},
    ("uploads", "forms of 16 KiB"): {},
    ("uploads", "PUTs of 16 KiB"): {},
    ("uploads", "form of 2 MiB to Azurite"): {"others": {"Azure SDK"}},
    ("archives", "8 made-up device trees to Azurite"): {},
    ("cold", "2 MiB, one client"): {"measures": ["total", "first byte"], "more": {"Azurite"}},
    ("cold", "2 MiB, 16 clients"): {"measures": ["total", "first byte"]},
    ("cold", "1 MiB, 50 clients"): {"measures": ["total", "first byte"]},
    ("cold", "16 files of 16 KiB"): {"more": {"Azurite"}},
    ("cold", "2 MiB, 64 clients"): {"measures": ["a worker's memory grows by"], "others": set()},
    ("slow", "20 readers of 64 KiB/s"): {"measures": ["a hit's median", "a hit's p99", "taken"]},
}


@pytest.fixture(scope="module")
def programs() -> None:
    """Skips a test if the bench's programs are not installed."""
    for program, package in (("curl", "curl"), ("nginx", "nginx"), ("varnishd", "varnish"), ("wrk", "wrk")):
        try:
            yardsticks.find(program, package)
        except BenchError as exc:
            pytest.skip(str(exc))


# A run


@dataclasses.dataclass
class Run:
    """The output of a run."""

    result: subprocess.CompletedProcess[str]
    scratch: Path
    out: Path

    @property
    def rows(self) -> list[dict]:
        """The rows of bench.json."""
        return json.loads((self.out / "bench.json").read_text())["rows"]


def environment(scratch: Path, out: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BENCH_")}
    ours = {"BENCH_SCALE": "tiny", "BENCH_DIR": str(scratch), "BENCH_OUT": str(out), "BENCH_TREES": str(out)}
    return {**inherited, **ours, **more}


def bench(scratch: Path, out: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environ = environment(scratch, out, **more)
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def run(programs: None, azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of all groups, for all tests. The bench finds Azurite where the tests do."""
    scratch, out = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("out")
    return Run(bench(scratch, out), scratch, out)


@pytest.mark.timeout(SECONDS)
def test_every_workload_has_figures_of_every_system(run):
    assert run.result.returncode == 0, run.result.stderr
    found: dict[tuple[str, str], list[dict]] = {}
    for row in run.rows:
        found.setdefault((row["group"], row["workload"]), []).append(row)
    assert found.keys() == WORKLOADS.keys()
    for (group, workload), expected in WORKLOADS.items():
        systems = {OURS} | expected.get("others", SYSTEMS[group]) | expected.get("more", set())
        rows = found[group, workload]
        assert [row["name"] for row in rows] == expected.get("measures", [""]), workload
        for row in rows:
            assert set(row["medians"]) == systems, workload
            minimum = 0 if "memory" in row["name"] else 1e-9  # a worker's memory may not grow at all
            assert all(value >= minimum for values in row["runs"].values() for value in values), row
            assert all(len(values) == TINY.rounds for values in row["runs"].values())
            assert set(row["ratios"]) == systems - {OURS}
        assert rows[0]["cpu_ms_per_operation"].keys() == systems - {"Azurite"}


def test_the_table_shows_each_row_and_each_system(run):
    titles = [f"{row['workload']}: {row['name']}" if row["name"] else row["workload"] for row in run.rows]
    lines = run.result.stdout.splitlines()
    for title in titles:
        assert any(line.startswith(f"{title}  ") for line in lines), title
    for group, systems in SYSTEMS.items():
        (head,) = [line for line in lines if line.startswith(f"{group} ")]
        assert all(system in head for system in systems)
    assert "left out" not in run.result.stdout


def test_the_progress_is_on_standard_error(run):
    told = [line for line in run.result.stderr.splitlines() if re.match(r"bench: \w+: .+, 1 of 1: ", line)]
    turns = {(row["group"], row["workload"]): len(row["medians"]) for row in run.rows}
    assert len(told) == sum(turns.values())


def test_the_drawing_has_a_mark_for_each_ratio(run):
    root = ET.fromstring((run.out / "bench.svg").read_text())
    marks = [element for element in root.iter() if element.tag.endswith("title")]
    assert len(marks) == sum(len(row["ratios"]) for row in run.rows)


def test_a_run_leaves_nothing(run):
    assert list(run.scratch.iterdir()) == []
    assert processes_in(run.scratch) == []


def test_rules_are_compared_turn_by_turn(programs, tmp_path):
    command = [sys.executable, "-m", "benchmarks.rules", "--turns", "2", "--seconds", "1"]
    environ = environment(tmp_path, tmp_path)
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^  .+ / default: \d\.\d{3} ± \d\.\d{3}$", result.stdout, flags=re.MULTILINE)) == 4
    assert list(tmp_path.iterdir()) == []


def processes_in(folder: Path) -> list[str]:
    """The command lines of the processes that use a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = " ".join(process.cmdline())
            if str(folder) in command or process.cwd().startswith(str(folder)):
                found.append(command)
    return found


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, "hits"), (signal.SIGTERM, "uploads")])
def test_an_interrupted_run_leaves_nothing(number, group, tmp_path, programs, azurite):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "benchmarks", group]
    environ = environment(scratch, tmp_path / "out")
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "ours" not in (line := process.stderr.readline()):  # all servers run, and one is under load
        assert line, "the bench has ended"
    process.send_signal(number)
    _, rest = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "bench: interrupted"
    assert list(scratch.iterdir()) == []
    wait_until(lambda: processes_in(scratch) == [], SECONDS, "the end of its processes")


# Missing programs and room


def test_a_missing_load_generator_is_one_line(tmp_path):
    result = bench(tmp_path, tmp_path, PATH=str(tmp_path))  # /usr/sbin is searched as well, but wrk is never there
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "bench: wrk is missing; on Debian: apt-get install wrk\n"


def test_an_unknown_group_is_one_line(tmp_path):
    result = bench(tmp_path, tmp_path, "hits", BENCH_ONLY="cold,warm")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "bench: there is no group warm, only hits, uploads, archives, cold, slow\n"


def test_too_little_room_is_an_error_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_DIR", str(tmp_path))
    with (
        pytest.raises(BenchError, match=rf"{tmp_path} has no \d+ MiB to spare"),
        stages.stage(dataclasses.replace(TINY, large=1 << 60)),
    ):
        pytest.fail("the bench has begun")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_yardstick_is_left_out_and_reported_once(tmp_path, monkeypatch):
    def none(program: str, package: str) -> str:
        raise yardsticks.MissingProgram(program, package)

    monkeypatch.setattr(yardsticks, "find", none)
    with ExitStack() as stack:
        stage = stages.Stage(TINY, tmp_path, stack)
        assert stage.nginx is None and stage._optional(lambda: yardsticks.nginx_files(tmp_path, tmp_path)) is None
    assert stage.left_out == ["nginx is missing; on Debian: apt-get install nginx"]
    printed = report.table([ROW], TINY, stage.left_out)
    assert "left out: nginx is missing; on Debian: apt-get install nginx" in printed.splitlines()


# Errors are not measured


class Peculiar(BaseHTTPRequestHandler):
    """A server that sends 100 bytes, or what a path asks for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client has closed the connection
            self.wfile.write(bytes(50 if self.path == "/cut" else 100))
        self.close_connection = self.path == "/cut"

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def port(programs: None) -> Iterator[int]:
    """The port of such a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Peculiar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_crowd_gets_each_path_once(port):
    downloads, seconds = load.crowd(port, ["/a", "/b", "/c"], 2, 100)
    assert [(download.status, download.received) for download in downloads] == [(200, 100)] * 3
    assert all(0 < download.first_byte <= download.seconds <= seconds for download in downloads)


@pytest.mark.parametrize(("path", "size"), [("/a", 99), ("/a", 101), ("/missing", 100), ("/cut", 100), ("/cut", 50)])
def test_a_crowd_that_gets_another_response_is_no_measurement(port, path, size):
    with pytest.raises(BenchError):
        load.crowd(port, ["/a", path], 1, size)


@pytest.mark.parametrize(("status", "size"), [(201, 100), (200, 99)])
def test_a_curl_that_gets_another_response_is_no_measurement(port, status, size):
    url = f"http://127.0.0.1:{port}/a"
    assert load.curl(url, downloaded=100) > 0
    with pytest.raises(BenchError):
        load.curl(url, status=status, downloaded=size)


@pytest.mark.parametrize(("path", "size"), [("/a", 100), ("/a", 10_000), ("/missing", 100), ("/cut", 100)])
def test_wrk_detects_errors_and_short_bodies(port, path, size, tmp_path):
    requests = tmp_path / "requests"
    requests.write_text(f"{path}\n")
    if (path, size) == ("/a", 100):
        assert load.wrk(port, 2, 1, tmp_path, "get.lua", requests, body=size).requests > 0
        return
    with pytest.raises(BenchError):
        load.wrk(port, 2, 1, tmp_path, "get.lua", requests, body=size)


def test_unexpected_bodies_are_noticed():
    summary = {"requests": 10, "seconds": 1.0, "bytes": 10 * 4200.0, "p99": 0.002}
    summary |= dict.fromkeys(("connect", "read", "write", "status", "timeout"), 0)
    assert load._checked_rate(summary, 1, 4096).per_second == 10
    with pytest.raises(BenchError):
        load._checked_rate(summary, 1, 0)


def test_a_server_that_logged_an_error_is_no_measurement(tmp_path):
    with (
        pytest.raises(BenchError, match=r"not clean at its end: 1 times \['\[ERROR\] made up'\]"),
        stages._running(Server(tmp_path, {})) as server,
        server.log_path.open("a") as log,
    ):
        log.write("[ERROR] made up\n")


def test_figures_from_before_a_failure_are_printed(tmp_path, monkeypatch, capsys):
    def workloads(stage: stages.Stage) -> Iterator[Workload]:
        yield Workload("hits", "4 KiB", (Measure("s"),), {OURS: lambda: Sample((1.5,))})
        raise BenchError("no more")

    monkeypatch.setitem(main.GROUPS, "hits", workloads)
    with ExitStack() as stack, pytest.raises(BenchError, match="no more"):
        main.run(["hits"], stages.Stage(TINY, tmp_path, stack))
    assert re.search(r"^4 KiB +s +1\.50$", capsys.readouterr().out, flags=re.MULTILINE)


# Comparing the figures


ROW = Row("hits", "4 KiB", Measure("requests/s", more_is_better=True), {OURS: [300.0]})


@pytest.mark.parametrize(
    ("ours", "other", "more_is_better", "expected"),
    [(75, 100, True, 0.75), (100, 75, True, 4 / 3), (2, 1, False, 0.5), (0.5, 1, False, 2), (3, 3, True, 1)],
)
def test_a_ratio_above_one_means_that_we_are_better(ours, other, more_is_better, expected):
    assert measuring.ratio(ours, other, more_is_better) == pytest.approx(expected)


def test_ratios_are_those_of_the_medians():
    row = Row(
        "hits",
        "4 KiB",
        Measure("requests/s", more_is_better=True),
        {OURS: [300, 100, 200], "nginx": [1, 400, 1000], "Varnish": [100, 100, 100]},
        {OURS: [2, 4, 3], "nginx": [0, 9, 1], "Varnish": [0, 0, 0]},
    )
    assert row.medians == {OURS: 200, "nginx": 400, "Varnish": 100}
    assert row.ratios == {"nginx": 0.5, "Varnish": 2}
    assert row.cpu_ratios == {"nginx": pytest.approx(1 / 3)}  # Varnish used less than a tick


def test_less_is_better_where_seconds_are_counted():
    row = Row("cold", "1 MiB", Measure("s", "first byte"), {OURS: [0.5, 0.1, 0.2], "nginx": [0.1, 0.4, 0.4]})
    assert row.ratios == {"nginx": 2}
    assert row.title == "1 MiB: first byte"


def test_systems_take_turns():
    order: list[str] = []

    def turn(name: str, cpu_seconds: float | None) -> Sample:
        order.append(name)
        return Sample((len(order), 10.0 * len(order)), 4, cpu_seconds)

    measures = (Measure("s", "total"), Measure("s", "first byte"))
    turns = {OURS: lambda: turn("A", 2.0), "nginx": lambda: turn("B", None)}
    told: list[str] = []
    total, first = measuring.run(Workload("cold", "1 MiB", measures, turns), 3, told.append)
    assert order == ["A", "B", "B", "A", "A", "B"]
    assert total.values == {OURS: [1, 4, 5], "nginx": [2, 3, 6]}
    assert first.values == {OURS: [10, 40, 50], "nginx": [20, 30, 60]}
    assert (total.cpu_ms, first.cpu_ms) == ({OURS: [500.0] * 3}, {})
    assert told[0] == "cold: 1 MiB, 1 of 3: ours total 1.00 s, first byte 10.0 s"


def test_cpu_time_includes_child_processes():
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {work!r}])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        used = measuring.cpu_seconds(process.pid)
        process.stdin.write(b"\n")
    assert used >= 0.25


def test_the_peak_of_private_memory_is_kept_after_it_is_freed():
    with measuring.PrivateMemory([os.getpid()]) as memory:
        block = bytearray(os.urandom(1 << 20) * 64)
        used = psutil.Process().memory_full_info().uss
        while max(memory._peaks) < used - (1 << 20):
            threading.Event().wait(0.01)
        del block
    assert memory.growth > 50 << 20


def test_marks_beyond_the_scale_are_drawn_at_its_ends():
    ratios = {"nginx": [1e9], "gunicorn": [1e-9]}
    drawing = chart.svg([dataclasses.replace(ROW, values={OURS: [1.0], **ratios})])
    root = ET.fromstring(drawing)
    width = float(root.attrib["width"])
    marks = [e for e in root.iter() if e.tag.endswith("circle") and len(e)]
    assert len(marks) == 2 and all(chart.LABELS <= float(mark.attrib["cx"]) <= width for mark in marks)


def test_every_variable_of_the_bench_is_documented():
    document = (ROOT / "docs" / "performance.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    of_the_bare_function = {"BENCH_FILES", "BENCH_FSYNC"}
    assert set(re.findall(r"BENCH_[A-Z]+", code)) - of_the_bare_function == set(re.findall(r"BENCH_[A-Z]+", document))
