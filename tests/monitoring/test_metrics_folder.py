# SPDX-License-Identifier: LGPL-2.1-or-later
"""The folder of the workers' counters: a new one for each master, which may vanish, or the operator's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from kci_storage.monitoring import metrics_folder, multiprocess
from tests.monitoring.test_metrics import Growth, cumulative, scrape, value
from tests.support.harness import START_SECONDS, STOP_SECONDS, Server, wait_until
from tests.support.wire import SECONDS, access, get

ALL = "kci_storage_http_requests_total"
DEAD = 2**31 - 1  # no process has this id
OURS = f"{metrics_folder.PREFIX}-{os.getuid()}"


def folders(master: int) -> list[Path]:
    """The folders that masters have made."""
    return list(Path(metrics_folder.SHARED_MEMORY).glob(f"{OURS}-{master}-*"))


def ask(server: Server, times: int) -> None:
    """Send requests that are counted by the end of the call."""
    for _ in range(times):
        access(server, get(server, "none"))


# A master's own


def test_it_lives_as_long_as_the_master(start_server: Callable[..., Server]) -> None:
    server = start_server()
    [folder] = folders(server.process.pid)
    ask(server, 1)
    assert list(folder.glob("counter_*.db"))
    server.stop()
    assert not folder.exists()


def test_a_vanished_folder_is_made_again_with_all_counts(start_server: Callable[..., Server]) -> None:
    """The next scrape, from any worker, shows all counts."""
    server = start_server(server={"workers": 3})
    server.expected_errors.append("event=metrics_made_again")
    [folder] = folders(server.process.pid)
    ask(server, 12)
    for _ in range(2):
        before = scrape(server)
        shutil.rmtree(folder)
        after = cumulative(scrape(server))
        assert not {name for name, number in cumulative(before).items() if after.get(name, 0) < number}
        ask(server, 12)
        assert value(scrape(server), ALL, route="download") == value(before, ALL, route="download") + 12
    assert "event=metrics_made_again" in server.log()
    server.stop()
    assert not folder.exists()


def test_a_single_file_that_has_vanished_is_made_again(start_server: Callable[..., Server]) -> None:
    server = start_server()
    [folder] = folders(server.process.pid)
    ask(server, 6)
    grown = Growth(server)
    for file in folder.glob("counter_*.db"):
        file.unlink()
    ask(server, 6)
    assert grown(ALL, route="download") == 6


def test_after_it_vanished_a_worker_that_starts_finds_a_place(start_server: Callable[..., Server]) -> None:
    server = start_server(server={"workers": 1})
    server.expected_errors.append("was sent SIGKILL")
    [folder] = folders(server.process.pid)
    [old] = server.worker_pids()
    shutil.rmtree(folder)
    psutil.Process(old).kill()
    wait_until(lambda: server.worker_pids() not in ([], [old]), SECONDS, "the next worker")
    ask(server, 3)
    assert value(scrape(server), ALL, route="download") >= 3


@pytest.mark.expected_errors("event=metrics_unwritable")
def test_where_there_is_no_place_the_server_goes_on_counting(start_server: Callable[..., Server]) -> None:
    server = start_server(server={"workers": 1})
    [folder] = folders(server.process.pid)
    ask(server, 3)
    shutil.rmtree(folder)
    folder.touch()  # a file, in which nothing can be made
    wait_until(lambda: "event=metrics_unwritable" in server.log(), SECONDS, "the line")
    ask(server, 3)
    folder.unlink()
    wait_until(folder.is_dir, SECONDS, "the folder")
    assert value(scrape(server), ALL, route="download") == 6
    assert server.log().count("event=metrics_unwritable") == 1


# Others' names


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for this test alone, since other servers may start meanwhile."""
    monkeypatch.setattr(metrics_folder, "SHARED_MEMORY", tmp_path)
    return tmp_path


def test_names_of_others_stop_nothing(shared_memory: Path) -> None:
    names = ["-x", "", "-", "-x-y", f"-{10**30}-a", "--1-a", "-\u0663-a"]
    names += [f"-{DEAD}", f"-{DEAD}-a.b", f"-{os.getpid()}-a"]
    folders = [shared_memory / f"{OURS}{name}" for name in names]
    for folder in folders:
        folder.mkdir()
        (folder / "counter_x.db").touch()
    file, link = shared_memory / f"{OURS}-{DEAD}-file", shared_memory / f"{OURS}-{DEAD}-link"
    file.touch()
    link.symlink_to(folders[0])
    chosen = metrics_folder.choose()
    assert chosen.is_own and chosen.path.is_dir()
    assert set(shared_memory.iterdir()) == {*folders, file, link, chosen.path}
    assert all((folder / "counter_x.db").exists() for folder in folders)


def test_what_a_dead_master_has_left_is_removed(shared_memory: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = shared_memory / f"{OURS}-{ended.pid}-a1_b2"
    left.mkdir()
    (left / "counter_1-0.db").touch()
    one, other = metrics_folder.choose(), metrics_folder.choose()
    assert set(shared_memory.iterdir()) == {one.path, other.path}
    one.remove()
    assert set(shared_memory.iterdir()) == {other.path}


# The operator's


def test_the_operators_folder_stays_and_is_the_only_one(start_server: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "operator's" / "metrics"  # made where it is missing
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("the operator's")
    (folder / "counter_4711.db").touch()  # of another program, and not whole
    server = start_server(environ={metrics_folder.VARIABLE: str(folder)})
    ask(server, 4)
    assert value(scrape(server), ALL, route="download") == 4
    assert not folders(server.process.pid)
    server.stop()
    assert (folder / "notes.txt").read_text() == "the operator's"
    assert (folder / "counter_4711.db").exists()
    assert len(list(folder.glob("counter_*-*.db"))) == 2


def test_the_operators_folder_is_made_where_it_is_missing(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    folder = tmp_path / "a" / "b"
    server = start_server(arguments=["--env", f"{metrics_folder.VARIABLE}={folder}"])
    ask(server, 1)
    assert value(scrape(server), ALL, route="download") == 1
    assert not folders(server.process.pid)
    server.stop()
    assert list(folder.iterdir())


# One master after the other


def test_the_next_master_has_another_folder(start_server: Callable[..., Server]) -> None:
    """This holds after a reload too, whose environment gunicorn passes on to the next master (SIGUSR2)."""
    server = start_server()
    old = server.process
    [folder] = folders(old.pid)
    workers = set(server.worker_pids())
    server.document["server"]["cache_control"] = "no-store"
    server.reload()
    wait_until(lambda: not workers & set(server.worker_pids()), SECONDS, "new workers")
    assert folders(old.pid) == [folder]
    workers = set(server.worker_pids())
    old.send_signal(signal.SIGUSR2)
    new = wait_until(lambda: next_master(old.pid), START_SECONDS, "the next master")
    try:
        wait_until(lambda: len(psutil.Process(new).children()) >= 2, START_SECONDS, "its workers")
        [other] = folders(new)
        old.terminate()
        old.wait(STOP_SECONDS)
        assert not folder.exists()
        for _ in range(8):
            assert requests.get(f"{server.url}/none", timeout=SECONDS).status_code == 404
        wait_until(lambda: value(scrape(server), ALL, route="download") >= 8, SECONDS, "the counts")
        assert other.is_dir()
    finally:
        master = psutil.Process(new)
        master.terminate()
        master.wait(STOP_SECONDS)
    assert not other.exists()


def next_master(old: int) -> int | None:
    """The process that a master has started to replace it."""
    known = (int(path.name.split("-")[4]) for path in metrics_folder.SHARED_MEMORY.glob(f"{OURS}-[0-9]*-*"))
    children = {child.pid for child in psutil.Process(old).children()}
    return next((pid for pid in known if pid in children), None)


# The numbers themselves


def test_a_process_counts_in_memory_until_it_is_given_a_folder(tmp_path: Path) -> None:
    files = multiprocess.Files()
    assert files.folder is None
    files.restore()
    assert list(tmp_path.iterdir()) == []
