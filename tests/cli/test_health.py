# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kci-storage health``: whether the server of a configuration answers, on each kind of address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kci_storage.cli import health
from kci_storage.cli.health import Unhealthy
from kci_storage.config.reading import load
from kci_storage.config.settings import ServerConfig
from tests.net.test_tls import certificate
from tests.support.harness import START_SECONDS, STOP_SECONDS, Server, reserve_port, toml, wait_until


def run(config: Path) -> subprocess.CompletedProcess[str]:
    """Run the command with this configuration."""
    command = [sys.executable, "-m", "kci_storage.cli", "--config", str(config), "health"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KCI_STORAGE_")}
    return subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=60)


def test_a_server_that_lives(local_server: Server):
    done = run(local_server.config_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_no_server_listens(tmp_path: Path):
    with closing(reserve_port()) as reserved:
        bind = f"127.0.0.1:{reserved.getsockname()[1]}"
        (tmp_path / "config.toml").write_text(toml(document(bind)))
        done = run(tmp_path / "config.toml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"kci-storage: {bind} does not answer: [Errno 111] Connection refused\n"


def test_the_address_of_all_is_asked_on_this_machine(local_server: Server):
    health.ask(ServerConfig(bind=f"0.0.0.0:{local_server.port}"))


def test_with_tls(tmp_path: Path, start_server, monkeypatch: pytest.MonkeyPatch):
    """The certificate need not be trusted on this machine, since it names the address for clients."""
    files = certificate(tmp_path, "own")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(files["certfile"]))  # for the wait until the server answers
    server = start_server("local", server={"workers": 1, **files})
    health.ask(load(server.config_path, {}).server)
    with pytest.raises(Unhealthy, match="status 400"):
        health.ask(ServerConfig(bind=server.document["server"]["bind"]))


def test_on_a_unix_socket(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text(toml(document("unix:kci.sock")))
    assert run(path).returncode == 1
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "kci_storage.cli", "--config", str(path), "serve"]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: run(path).returncode == 0, START_SECONDS, "the server's start")
    finally:
        server.terminate()
        server.wait(STOP_SECONDS)


@contextmanager
def other_program(answer: bytes) -> Iterator[ServerConfig]:
    """Another program at the server's address, which sends this and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield ServerConfig(bind=f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "answers with status 503"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answers with status 404"),
        (b"220 mail.example.com ESMTP\r\n", "does not answer: 220 mail.example.com"),
        (b"", "does not answer: Remote end closed connection"),
    ],
    ids=["busy", "another site", "no HTTP", "nothing"],
)
def test_another_answer_is_none(answer: bytes, problem: str):
    with other_program(answer) as server, pytest.raises(Unhealthy, match=problem):
        health.ask(server)


def test_no_answer_is_waited_for_no_longer_than_the_container_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Unhealthy, match="timed out"):
        health.ask(ServerConfig(bind=f"127.0.0.1:{silent.getsockname()[1]}"))


def document(bind: str) -> dict[str, object]:
    """A minimal configuration."""
    return {"driver": "local", "jwt_secret": "s" * 32, "server": {"bind": bind, "workers": 1}}
