# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGUSR2: a new master beside the old one, with which it shares the socket, the cache and the store.

Either of the two may end, in whatever way, and the other one goes on: its workers are replaced, its configuration is
reloaded, its figures are its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

from kci_storage.cache.housekeeping import LEADER_LOCK
from kci_storage.monitoring import metrics_folder
from tests.monitoring.test_metrics import scrape, value
from tests.server.load import Load, slow_download
from tests.support.cold import frozen
from tests.support.harness import START_SECONDS, STOP_SECONDS, Server, running, toml, wait_until
from tests.support.peers import holders
from tests.support.wire import SECONDS, Wire, get, new_folder, put, request

ROOT = Path(__file__).parents[2]
WORKERS = 2
ALL = "kci_storage_http_requests_total"
KILLED = pytest.mark.expected_errors("was sent SIGKILL")


class Plain(Server):
    """A server that is started as ``gunicorn wsgi:app`` in a checkout."""

    def _command(self) -> list[str]:
        for name in ("gunicorn.conf.py", "wsgi.py"):
            if not (self.folder / name).exists():
                (self.folder / name).symlink_to(ROOT / name)
        return [str(Path(sys.executable).with_name("gunicorn")), "wsgi:app"]


class Master:
    """A master, which may be a child of this process or not."""

    def __init__(self, pid: int):
        self.pid = pid
        self._process = psutil.Process(pid)

    def workers(self) -> list[int]:
        """The process ids of its workers."""
        return [child.pid for child in self._children() if _successor_of(child) != self.pid]

    def successor(self) -> Master | None:
        """The master that was started by SIGUSR2 to this one."""
        return next((Master(child.pid) for child in self._children() if _successor_of(child) == self.pid), None)

    def _children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child for child in self._process.children() if _lives(child)]
        return []

    def folder(self) -> Path | None:
        """The folder of its workers' counters."""
        found = metrics_folder.SHARED_MEMORY.glob(f"{metrics_folder.PREFIX}-{os.getuid()}-{self.pid}-*")
        return next(found, None)

    def send(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def is_running(self) -> bool:
        """Whether it lives."""
        return _lives(self._process)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal that ends it, and wait for its end."""
        self.send(number)
        wait_until(lambda: not self.is_running(), STOP_SECONDS, "a master's end")


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _successor_of(process: psutil.Process) -> int:
    """The master by which a process was started anew; 0: it is a fork, or has ended."""
    with contextlib.suppress(psutil.Error):
        return int(process.environ().get("GUNICORN_PID", 0))
    return 0


@contextlib.contextmanager
def upgraded(server: Server, old: Master | None = None) -> Iterator[Master]:
    """The next master, with workers that serve; ended at the end of the block."""
    old = old or Master(server.process.pid)
    old.send(signal.SIGUSR2)
    new = wait_until(old.successor, START_SECONDS, "the next master")
    try:
        wait_until(lambda: len(new.workers()) == WORKERS, START_SECONDS, "its workers")
        with frozen(*old.workers()):
            wait_until(lambda: answers(server), START_SECONDS, "an answer of theirs")
        yield new
    finally:
        if new.is_running():
            new.end()


def answers(server: Server) -> bool:
    """Whether a worker that is not frozen answers."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{server.url}/v1/health", timeout=SECONDS).status_code == 200
    return False


def kill_a_worker(master: Master) -> None:
    """Kill one of a master's workers, and wait for the next one."""
    before = master.workers()
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: len(set(master.workers()) - {before[0]}) == len(before), START_SECONDS, "the next worker")


def replace_workers(server: Server, master: Master) -> None:
    """Change what only new workers get to know, and reload (SIGHUP)."""
    old = set(master.workers())
    server.document["server"]["cache_control"] = f"public, max-age={len(server.log())}"
    server.config_path.write_text(toml(server.document))
    master.send(signal.SIGHUP)
    wait_until(lambda: not old & set(master.workers()) and len(master.workers()) == WORKERS, SECONDS, "new workers")


def ask(server: Server, times: int, other: Master | None = None) -> float:
    """Have requests answered, and wait until they are counted; how many are.

    :param other: the master whose workers are not to answer.
    """
    with frozen(*(other.workers() if other else ())):
        before = value(scrape(server), ALL, route="download")
        for _ in range(times):
            assert get(server, "none").status_code == 404
        wait_until(lambda: value(scrape(server), ALL, route="download") == before + times, SECONDS, "the counts")
        return before + times


# One after the other


@pytest.mark.parametrize("kind", [Server, Plain], ids=["serve", "gunicorn wsgi:app"])
def test_masters_one_after_the_other(kind: type[Server], tmp_path_factory: pytest.TempPathFactory) -> None:
    """After a reload with new workers, too: from that gunicorn takes the environment for the next master."""
    server = kind(tmp_path_factory.mktemp("server"), {"server": {"workers": WORKERS}})
    server.expected_errors.append("was sent SIGKILL")
    with running(server), contextlib.ExitStack() as stack:
        key = f"{new_folder()}/small"
        put(server, key, b"content")
        old = Master(server.process.pid)
        for _ in range(2):
            with Load(f"{server.url}/{key}", b"content") as load:
                replace_workers(server, old)
                new = stack.enter_context(upgraded(server, old))
                load.wait_for_more()
                with slow_download(server) as finish:  # of either master's worker
                    old.send(signal.SIGTERM)
                    load.wait_for_more()
                    finish()
                wait_until(lambda master=old: not master.is_running(), STOP_SECONDS, "the old master's end")
                load.wait_for_more()
            assert load.failures == []
            assert (old.folder() is None, new.folder() is None) == (True, False)
            kill_a_worker(new)
            for _ in range(4):
                assert get(server, key).content == b"content"
                scrape(server)
            old = new
    assert old.folder() is None


@KILLED
@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGINT, signal.SIGKILL], ids=["QUIT", "INT", "KILL"])
def test_an_old_master_that_ends_abruptly(start_server: Callable[..., Server], number: int) -> None:
    server = start_server(server={"workers": WORKERS})
    old = Master(server.process.pid)
    with upgraded(server) as new:
        workers = old.workers()
        old.end(number)
        wait_until(lambda: not any(map(psutil.pid_exists, workers)), STOP_SECONDS, "its workers' end")
        kill_a_worker(new)
        replace_workers(server, new)
        assert answers(server)


# Both at once


def test_each_master_has_figures_of_its_own(start_server: Callable[..., Server]) -> None:
    server = start_server(server={"workers": WORKERS})
    old = Master(server.process.pid)
    assert ask(server, 6) == 6
    with upgraded(server) as new:
        assert ask(server, 4, old) == 4
        assert ask(server, 2, new) == 8
        for master in (old, new):
            replace_workers(server, master)
        assert ask(server, 1, old) == 5
        assert ask(server, 1, new) == 9
        folder = old.folder()
        assert folder is not None
        old.end()
        assert not folder.exists()
        assert ask(server, 1) == 6


def test_uploads_of_a_key_exclude_each_other_over_both(start_server: Callable[..., Server]) -> None:
    server = start_server("azure", server={"workers": WORKERS, "lock_timeout": 1})
    old = Master(server.process.pid)
    key, content = f"{new_folder()}/file", os.urandom(1000)
    with upgraded(server) as new, contextlib.ExitStack() as stack:
        with frozen(*new.workers()):
            wire = stack.enter_context(Wire(server))
            wire.send(request("PUT", f"/{key}", server.headers(), content)[:-1])
            wait_until(lambda: server.is_writing(key), SECONDS, "the upload")
        with frozen(*old.workers()):
            assert put(server, key, b"another").status_code == 409
        wire.send(content[-1:])
        assert wire.answer().status == 201
        with frozen(*old.workers()):  # the new master's workers see it at once
            answer = get(server, key)
            assert (answer.content, answer.headers["X-Cache"]) == (content, "hit")


def test_one_worker_of_both_does_the_housekeeping(start_server: Callable[..., Server]) -> None:
    server = start_server(server={"workers": WORKERS})
    old = Master(server.process.pid)
    lock = server.cache_directory / LEADER_LOCK
    with upgraded(server) as new:
        [leader] = {pid for pid in holders(lock) if pid in (*old.workers(), *new.workers())}
        assert leader in old.workers()
        old.end()
        wait_until(lambda: set(holders(lock)) & set(new.workers()), SECONDS, "another leader")


# Back again


@KILLED
def test_going_back(start_server: Callable[..., Server]) -> None:
    server = start_server(server={"workers": WORKERS})
    old, key = Master(server.process.pid), f"{new_folder()}/small"
    put(server, key, b"content")
    workers = old.workers()
    with Load(f"{server.url}/{key}", b"content") as load:
        for _ in range(2):
            with upgraded(server) as new:
                old.send(signal.SIGUSR2)  # there is one already
                load.wait_for_more()
                new.end(signal.SIGTERM)
            assert new.folder() is None
            load.wait_for_more()
    assert load.failures == []
    assert old.workers() == workers
    kill_a_worker(old)
    replace_workers(server, old)
    assert answers(server)


@pytest.mark.expected_errors("kci-storage:", "event=reload_refused")
def test_a_new_master_that_cannot_start_changes_nothing(start_server: Callable[..., Server]) -> None:
    server = start_server(server={"workers": WORKERS})
    old, workers = Master(server.process.pid), server.worker_pids()
    server.config_path.write_text("this is [no TOML")
    old.send(signal.SIGUSR2)
    wait_until(lambda: "kci-storage: " in server.log(), START_SECONDS, "the refusal")
    wait_until(lambda: old.successor() is None, SECONDS, "its end")
    wait_until(lambda: server.worker_pids() == workers, SECONDS, "the children to be the workers alone")
    server.config_path.write_text(toml(server.document))
    with upgraded(server) as new:
        old.end()
        assert new.is_running()


# What stands in the way


@pytest.mark.expected_errors("event=reload_refused")
def test_a_pid_file(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """gunicorn's next master would end at a reload, since the old one has the file."""
    path = tmp_path / "pid"
    server = start_server(server={"workers": WORKERS}, arguments=["--pid", str(path)])
    old = Master(server.process.pid)
    with upgraded(server) as new:
        assert (path.read_text(), Path(f"{path}.2").read_text()) == (f"{old.pid}\n", f"{new.pid}\n")
        new.send(signal.SIGHUP)
        wait_until(lambda: "event=reload_refused" in server.log(), SECONDS, "the refusal")
        assert new.is_running()
        old.end()
        wait_until(
            lambda: path.exists() and path.read_text() == f"{new.pid}\n", SECONDS, "the file to be the new one's"
        )
        assert not Path(f"{path}.2").exists()
        replace_workers(server, new)
    assert not path.exists()


@pytest.mark.expected_errors("event=upgrade_refused")
def test_systemd(start_server: Callable[..., Server]) -> None:
    """It would kill the new master when the old one ends."""
    server = start_server(environ={"NOTIFY_SOCKET": "/nonexistent"})
    server.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "event=upgrade_refused" in server.log(), SECONDS, "the refusal")
    assert Master(server.process.pid).successor() is None
    assert answers(server)


def test_a_daemon_whose_workers_are_sent_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SIGWINCH ends the old master's workers, but not itself; SIGHUP starts them again."""
    server = Server(tmp_path_factory.mktemp("server"), {"server": {"workers": WORKERS}})
    path = server.folder / "pid"
    server.config_path.write_text(toml(server.document))
    command = [sys.executable, "-m", "kci_storage.cli", "serve", "--", "--daemon", "--pid", str(path)]
    environ = {**os.environ, "KCI_STORAGE_CONFIG": str(server.config_path)}
    subprocess.run(command, cwd=server.folder, env=environ, timeout=START_SECONDS, check=True)
    wait_until(path.exists, START_SECONDS, "the daemon")
    old = Master(int(path.read_text()))
    try:
        wait_until(lambda: answers(server), START_SECONDS, "its workers")
        with upgraded(server, old) as new:
            old.send(signal.SIGWINCH)
            wait_until(lambda: not old.workers(), STOP_SECONDS, "its workers' end")
            assert answers(server)
            old.send(signal.SIGHUP)
            wait_until(lambda: len(old.workers()) == WORKERS, START_SECONDS, "its workers")
            new.end()
            assert answers(server)
    finally:
        old.end()
