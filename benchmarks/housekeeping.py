# SPDX-License-Identifier: LGPL-2.1-or-later
"""Housekeeping of a large cache: its time, its memory, and its effect on hits.

``python -m benchmarks.housekeeping --entries 1000000``

The bench makes a cache of that many entries. They are sparse, and need little more than inodes: two for each entry,
and about 5 KiB of disk. The cache is counted, swept and evicted from, each in a fresh process. Then a server is
started on it with a limit of files that it exceeds. While it sweeps and evicts, a moderate load of hits (wrk) is
measured in short windows; between every two of them, housekeeping is suspended for another window. There is one
worker, so that every hit is answered by the process whose housekeeping runs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import Record
from kci_storage.cache.housekeeping import recover
from kci_storage.cache.limits import Evictor
from kci_storage.cache.names import FOLDERS
from kci_storage.config.settings import CacheConfig
from kci_storage.drivers.base import ObjectInfo
from tests.support.harness import Server

SIZE = 64 * 1024  # bytes of an object; its content is a hole
HOT = 500  # entries that are requested
PROCESSES = os.cpu_count() or 1
MIB = 1024 * 1024
HOUR, MONTH = 3600, 30 * 24 * 3600  # seconds
# No server listens there, since a hit sends no request to the backend.
NO_BACKEND = {"account": "nobody", "key": "bm9uZQ==", "endpoint": "http://127.0.0.1:9/nobody", "container": "none"}

LOAD = """
local paths = {}
for path in io.lines(os.getenv("PATHS")) do paths[#paths + 1] = path end
function delay() return math.random(5, 15) end
function request() return wrk.format("GET", paths[math.random(#paths)]) end
function done(summary, latency, requests)
  io.stderr:write(string.format('{"requests": %d, "errors": %d, "p50": %.3f, "p99": %.3f, "max": %.3f}',
    summary.requests, summary.errors.status + summary.errors.read + summary.errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency.max / 1000))
end
"""

# A cache of any size


def key_of(number: int) -> str:
    """The key of an entry."""
    return f"scale/{number % 1000:03d}/file-{number:07d}.bin"


def make_cache(directory: Path, entries: int) -> Cache:
    """Make the missing entries, in several processes; returns the cache."""
    cache = Cache(directory)
    for folder in FOLDERS:
        (directory / folder).mkdir(exist_ok=True)
    bounds = [entries * number // PROCESSES for number in range(PROCESSES + 1)]
    with ProcessPoolExecutor(PROCESSES) as pool:
        made = sum(pool.map(make_entries, *zip(*((directory, *pair) for pair in pairwise(bounds)), strict=True)))
    cache.usage.add(made, made * SIZE, 0)
    return cache


def make_entries(directory: Path, first: int, stop: int) -> int:
    """Make the entries with these numbers, unless they exist; returns how many were made.

    They are written directly into the cache's folder, since a cache that is filled by uploads syncs each file.
    """
    now, sha256 = time.time(), hashlib.sha256(bytes(SIZE)).hexdigest()
    info = ObjectInfo("KEY", SIZE, "0x8DD0123456789AB", int(now) - MONTH, "text/plain", sha256, bytes(16))
    template = Record(info, "GENERATION", now).to_json().decode()
    return sum(make_entry(directory, number, template, now) for number in range(first, stop))


def make_entry(directory: Path, number: int, template: str, now: float) -> bool:
    """Make an entry unless it exists; returns whether it was made.

    It was last used an hour to a month ago; a hot one, two minutes ago.
    """
    key, generation = key_of(number), f"{number:016x}"
    digest = hashlib.sha512(key.encode()).hexdigest()
    stem = f"{directory}/{digest[:2]}/{digest}"
    used = now - 120 if number < HOT else now - HOUR - int(digest[:8], 16) % (MONTH - HOUR)
    try:
        fd = os.open(f"{stem}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    os.write(fd, template.replace("KEY", key).replace("GENERATION", generation).encode())
    os.close(fd)
    fd = os.open(f"{stem}.{generation}.data", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.ftruncate(fd, SIZE)
    os.utime(fd, (used, used))
    os.close(fd)
    return True


# The cost of each task, in a process of its own


@dataclass(frozen=True)
class Cost:
    """The cost of a task."""

    task: str
    seconds: float
    processor: float  # seconds, of both user and system time
    memory: float  # MiB that the process has grown by


def measure_task(task: str, directory: Path, entries: int, files: int) -> None:
    """In a fresh process: do a task, and print its cost as JSON."""
    cache = Cache(directory)
    work: Callable[[], object] = {
        "look at the limits": evictor(cache, entries + 1).over,
        "count": lambda: sum(1 for _ in cache.contents()),
        "sweep": cache.sweep,
        "evict": lambda: sum(freed.files for freed in recover(limits_of(cache, entries - files))),
    }[task]
    before, begun, worked = peak_memory(), time.monotonic(), time.process_time()
    work()
    cost = [time.monotonic() - begun, time.process_time() - worked, (peak_memory() - before) / MIB]
    print(json.dumps(cost))


def evictor(cache: Cache, max_files: int) -> Evictor:
    """An evictor with a limit of files alone."""
    return Evictor(cache, limits_of(cache, max_files))


def limits_of(cache: Cache, max_files: int) -> CacheConfig:
    """The configuration with a limit of files alone."""
    return CacheConfig(cache.directory, max_files=max_files, low_disk_percent=0, recover_disk_percent=0)


def peak_memory() -> int:
    """The peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cost_of(task: str, directory: Path, entries: int, files: int) -> Cost:
    """Do a task in a fresh process; returns its cost."""
    command = [sys.executable, "-m", "benchmarks.housekeeping", "--task", task, "--directory", str(directory)]
    command += ["--entries", str(entries), "--evict", str(files)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cost = Cost(task, *json.loads(output))
    print(cost, file=sys.stderr, flush=True)
    return cost


# The effect on hits


@dataclass(frozen=True)
class Window:
    """A few seconds of hits; latencies in milliseconds."""

    requests: int
    errors: int
    p50: float
    p99: float
    max: float


@contextlib.contextmanager
def serving(folder: Path, cache: Cache, max_files: int, workers: int) -> Iterator[tuple[Server, float]]:
    """A server with this cache, and the seconds from its start to its first hit."""
    limits = {"max_files": max_files, "low_disk_percent": 0.0, "recover_disk_percent": 0.0, "interval": 1.0}
    cached = {"directory": cache.directory, **limits}
    document = {"driver": "azure", "azure": NO_BACKEND, "cache": cached, "server": {"workers": workers}}
    folder.mkdir(exist_ok=True)
    server = Server(folder, document)
    starting = threading.Thread(target=server.start, daemon=True)
    begun = time.monotonic()
    starting.start()
    try:
        wait_for_hit(server)
        seconds = time.monotonic() - begun
        starting.join()
        yield server, seconds
    finally:
        server.stop()


def wait_for_hit(server: Server) -> None:
    """Wait until the server has answered with a copy."""
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", f"/{key_of(0)}")
            assert connection.getresponse().headers["X-Cache"] == "hit"
            return
        time.sleep(0.01)


def load(server: Server, seconds: int, connections: int) -> Window:
    """Put a load of hits on the server; each connection pauses for 5 to 15 ms after each."""
    script, paths = server.folder / "load.lua", server.folder / "paths"
    script.write_text(LOAD)
    paths.write_text("".join(f"/{key_of(number)}\n" for number in range(HOT)))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), server.url]
    run = subprocess.run(command, env={**os.environ, "PATHS": str(paths)}, capture_output=True, text=True, check=True)
    return Window(**json.loads(run.stderr))


def job_of(server: Server) -> psutil.Process | None:
    """The process that sweeps or evicts now; None: there is none."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "kci_storage.files.jobs" in process.cmdline():
                return process
    return None


def paired_windows(server: Server, arguments: argparse.Namespace) -> Iterator[tuple[str, Window, Window]]:
    """The load of hits while the server sweeps and evicts, and while that is suspended, until it is at its limits.

    The windows alternate, since the machine's other load changes from minute to minute.

    :returns: the task, the hits meanwhile, and the hits while it was suspended.
    """
    load(server, arguments.window, arguments.connections)  # so that each worker has read the records
    while "event=evicted" not in server.log():
        phase = "evict" if "event=swept" in server.log() else "sweep"
        job = job_of(server)
        if job is None:
            time.sleep(0.01)
            continue
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            busy = load(server, arguments.window, arguments.connections)
            job.suspend()
            idle = load(server, arguments.window, arguments.connections)
            job.resume()
            yield phase, busy, idle


def report_hits(arguments: argparse.Namespace, directory: Path, folder: Path) -> dict[str, Any]:
    """Several rounds of a server's start, sweep and eviction."""
    first_hits, logged = [], []
    pairs: dict[str, list[tuple[Window, Window]]] = {"sweep": [], "evict": []}
    for number in range(arguments.rounds):
        cache = make_cache(directory, arguments.entries)
        os.sync()
        max_files = arguments.entries - arguments.evict
        with serving(folder / str(number), cache, max_files, arguments.workers) as (server, seconds):
            first_hits.append(seconds)
            for phase, *pair in paired_windows(server, arguments):
                pairs[phase].append((pair[0], pair[1]))
            logged += re.findall(r"event=(?:swept|evicted)\b.*", server.log())
    rows: dict[str, dict[str, float]] = {}
    for phase, found in pairs.items():
        if found:
            busy, idle = zip(*found, strict=True)
            rows |= {phase: summary(busy), f"{phase}, paused": summary(idle)}
    return {"first_hit_seconds": statistics.median(first_hits), "log": logged, "hits": rows}


def summary(measured: Sequence[Window]) -> dict[str, float]:
    """The medians over the windows."""
    names = ("p50", "p99", "max")
    numbers = {name: statistics.median(getattr(window, name) for window in measured) for name in names}
    requests = sum(window.requests for window in measured)
    errors = sum(window.errors for window in measured)
    return {"windows": len(measured), "requests": requests, "errors": errors, **numbers}


# The command


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.housekeeping", description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000, help="of the cache")
    parser.add_argument("--evict", type=int, default=0, help="how many to evict; 0: a tenth")
    parser.add_argument("--directory", type=Path, help="of the cache, which is kept; by default a temporary one")
    parser.add_argument("--rounds", type=int, default=3, help="of the server's start, sweep and eviction")
    parser.add_argument("--hits-only", action="store_true", help="without the tasks in processes of their own")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--window", type=int, default=1, help="seconds of load that are measured as one")
    parser.add_argument("--json", type=Path, help="a file to write the figures to as well")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.evict = arguments.evict or arguments.entries // 10
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table and JSON."""
    arguments = arguments_of(argv)
    if arguments.task:
        measure_task(arguments.task, arguments.directory, arguments.entries, arguments.evict)
        return
    folder = Path(tempfile.mkdtemp(prefix="kci-storage-housekeeping-"))
    try:
        figures = measure(arguments, arguments.directory or folder / "cache", folder)
    finally:
        shutil.rmtree(folder)
    print_table(figures)
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(f"{text}\n")


def measure(arguments: argparse.Namespace, directory: Path, folder: Path) -> dict[str, Any]:
    """All figures."""
    make_cache(directory, arguments.entries)
    tasks = () if arguments.hits_only else ("look at the limits", "count", "sweep", "evict")
    costs = [cost_of(task, directory, arguments.entries, arguments.evict) for task in tasks]
    hits = report_hits(arguments, directory, folder)
    return {"entries": arguments.entries, "evicted": arguments.evict, "tasks": [vars(cost) for cost in costs], **hits}


def print_table(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    print(f"{figures['entries']:,} entries, {figures['evicted']:,} to evict")
    print(f"{'task':20}{'seconds':>10}{'CPU s':>10}{'MiB':>8}")
    for cost in figures["tasks"]:
        print(f"{cost['task']:20}{cost['seconds']:10.4f}{cost['processor']:10.4f}{cost['memory']:8.1f}")
    print(f"first hit after the server's start: {figures['first_hit_seconds']:.2f} s")
    print(f"{'hits while':16}{'windows':>8}{'requests':>10}{'errors':>8}{'p50 ms':>10}{'p99 ms':>10}{'ratio':>8}")
    for phase, row in figures["hits"].items():
        counts = f"{row['windows']:8}{row['requests']:10}{row['errors']:8}"
        paused = figures["hits"].get(f"{phase}, paused")
        ratio = f"{row['p99'] / paused['p99']:8.2f}" if paused else ""
        print(f"{phase:16}{counts}{row['p50']:10.2f}{row['p99']:10.2f}{ratio}")


if __name__ == "__main__":
    main()
