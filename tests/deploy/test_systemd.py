# SPDX-License-Identifier: LGPL-2.1-or-later
"""The units in ``deploy/systemd``, and how systemd runs the server: its socket, its signals, its time-outs."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import kci_storage
from tests.server.load import Load, slow_download
from tests.support.harness import Server, running, wait_until
from tests.support.wire import SECONDS, Wire, new_folder, put, request

UNITS = Path(kci_storage.__file__).parent.parent / "deploy/systemd"
NAMES = ("kci-storage.service", "kci-storage.socket", "kci-storage-expire.service", "kci-storage-expire.timer")
WORST_EXPOSURE = 2.0

# systemd's steps before it starts a service with a socket (sd_listen_fds(3)).
_ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed; on Debian: apt-get install systemd")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SECONDS, check=False)


def test_the_units_are_valid(tmp_path: Path):
    for name in NAMES:
        text = (UNITS / name).read_text()
        assert name != "kci-storage.service" or "ExecStart=/opt/kci-storage/bin/kci-storage serve" in text
        (tmp_path / name).write_text(text.replace("/opt/kci-storage/bin/kci-storage", sys.executable))
    found = systemd_analyze("verify", "--man=no", *sorted(tmp_path.iterdir()))
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@pytest.mark.parametrize("name", ["kci-storage.service", "kci-storage-expire.service"])
def test_a_service_is_isolated_from_the_machine(name: str):
    found = systemd_analyze("security", "--offline=true", "--no-pager", UNITS / name)
    level = re.search(rf"Overall exposure level for {name}: ([0-9.]+)", found.stdout)
    assert level is not None, found.stdout + found.stderr
    assert float(level[1]) <= WORST_EXPOSURE


class Activated(Server):
    """A server that inherits its listening socket, as from systemd."""

    def listen(self) -> None:
        """Listen on the reserved port."""
        self._reserved.listen(2048)

    def start(self) -> None:
        plain = subprocess.Popen

        def activated(command: list[str], **options: object) -> subprocess.Popen[bytes]:
            fd = self._reserved.fileno()
            return plain([sys.executable, "-c", _ACTIVATE, str(fd), *command[1:]], pass_fds=[fd], **options)  # type: ignore[call-overload, no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", activated)
            super().start()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Activated]:
    """A server with an inherited socket."""
    server = Activated(tmp_path_factory.mktemp("activated"), {"server": {"workers": 2, "threads": 8}})
    server.listen()
    with running(server):
        yield server


def test_a_reload_loses_nothing(server: Activated):
    key = f"{new_folder()}/small"
    put(server, key, b"content")
    with slow_download(server) as finish, Load(f"{server.url}/{key}", b"content") as load:
        old = set(server.worker_pids())
        server.document["cache"]["max_files"] = 500_000  # this setting needs new workers
        server.reload()
        wait_until(lambda: len(set(server.worker_pids()) - old) == 2, SECONDS, "new workers")
        load.wait_for_more()
        finish()
        wait_until(lambda: not old & set(server.worker_pids()), SECONDS, "the end of the old workers")
        load.wait_for_more()
    assert load.failures == []


def test_a_restart_refuses_no_client_and_finishes_running_requests(server: Activated):
    key = f"{new_folder()}/small"
    put(server, key, b"content")
    with slow_download(server) as finish:
        server.process.terminate()
        waiting = Wire(server)  # connects while the server ends; the next one answers
        waiting.send(request("GET", f"/{key}"))
        finish()
    with waiting:
        server.restart()
        assert waiting.answer().body == b"content"


def test_sigusr2_is_refused(server: Activated):
    """The next master would end with the first one, and would not find the socket."""
    server.expected_errors.append("event=upgrade_refused")
    server.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "event=upgrade_refused" in server.log(), SECONDS, "the refusal")
    assert requests.get(f"{server.url}/v1/health", timeout=SECONDS).status_code == 200


def test_restarts_under_load(server: Activated):
    """Clients notice nothing, whether or not they keep their connections."""
    key = f"{new_folder()}/small"
    put(server, key, b"content")
    with Load(f"{server.url}/{key}", b"content") as load:
        for _ in range(2):
            server.restart()
            load.wait_for_more()
    assert load.failures == []


def test_without_systemds_socket_new_clients_are_refused_at_once(tmp_path_factory: pytest.TempPathFactory):
    """A new client must not wait for the end of other clients' downloads, only to be cut off then."""
    with running(Server(tmp_path_factory.mktemp("server"), {})) as server, slow_download(server) as finish:
        server.process.terminate()
        wait_until(lambda: is_refused(server), SECONDS, "the port to be closed")
        finish()


def is_refused(server: Server) -> bool:
    """Whether new connections are refused."""
    try:
        Wire(server).close()
    except ConnectionRefusedError:
        return True
    return False


def test_readiness_is_told_to_systemd(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(SECONDS)
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with running(Server(tmp_path_factory.mktemp("server"), {}, environ)):
            assert b"READY=1" in notified.recv(4096)
