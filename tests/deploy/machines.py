# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several servers with one container, as on several machines, behind nginx with the configuration in ``deploy/``."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from azure.storage.blob import ContainerClient

import kci_storage
from kci_storage.cache.directory import Cache
from tests.deploy.nginx import main_configuration, program
from tests.support.azurite import Azurite
from tests.support.cold import Bench
from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.harness import START_SECONDS, STOP_SECONDS, Server, reserve_port, running, wait_until
from tests.support.wire import SECONDS

BALANCER_CONF = Path(kci_storage.__file__).parent.parent / "deploy/nginx/balancer.conf"
MACHINES = 3

_SERVER = re.compile(r"^( +server )[0-9.]+:[0-9]+( .*\n)", re.MULTILINE)
_LOGGED = re.compile(r" to=(?P<to>.*?) upstream_status=.* request_id=(?P<request_id>\S+)$", re.MULTILINE)


def configuration(addresses: Sequence[str], port: int, log: Path, **numbers: int) -> str:
    """The file in ``deploy/`` with other addresses, and nothing else changed.

    :param numbers: further values to change: ``max_conns=2``.
    """
    text = BALANCER_CONF.read_text()
    first, *others = _SERVER.finditer(text)
    assert len(others) == MACHINES - 1
    lines = "".join(f"{first[1]}{address}{first[2]}" for address in addresses)
    text = text[: first.start()] + lines + text[others[-1].end() :]
    for old, new in (("listen 80;", f"listen 127.0.0.1:{port};"), ("/var/log/nginx/kci-storage.log", str(log))):
        assert text.count(old) == 1
        text = text.replace(old, new)
    for name, value in numbers.items():
        text, count = re.subn(rf"\b{name}=[0-9]+", f"{name}={value}", text)
        assert count
    return text


class Balancer:
    """A running nginx; requests can be sent to it as to a server.

    :param folder: for its files.
    :param addresses: of the servers.
    :param servers: those that the test knows, to tell which one has answered.
    :param beside: nginx's configuration to add at the http level.
    """

    def __init__(self, folder: Path, addresses: Sequence[str], servers: Sequence[Server] = (), beside: str = ""):
        folder.mkdir()
        self.folder = folder
        self.log_path = folder / "access.log"
        self.servers = servers
        self.addresses = list(addresses)
        self._beside = beside
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The master's process ID."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, and wait until it answers."""
        (self.folder / "nginx.conf").write_text(main_configuration(self.folder, "balancer.conf", beside=self._beside))
        self._configure()
        errors = self.folder / "error.log"
        command: list[str | Path] = [program(), "-p", self.folder, "-c", self.folder / "nginx.conf", "-e", errors]
        self._process = subprocess.Popen(command, cwd=self.folder, stdin=subprocess.DEVNULL)
        wait_until(self._is_up, START_SECONDS, "nginx's start")

    def _configure(self, down: str | None = None, **numbers: int) -> None:
        text = configuration(self.addresses, self.port, self.log_path, **numbers)
        if down is not None:
            assert text.count(f" {down} ") == 1
            text = text.replace(f" {down} ", f" {down} down ")
        (self.folder / "balancer.conf").write_text(text)

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.errors()
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/metrics", timeout=5).status_code == 404
        return False

    def reload(self, down: str | None = None, **numbers: int) -> None:
        """Change the configuration, and wait until nginx's old workers have ended, and send no more requests.

        :param down: an address to take out of rotation; None: all are in rotation.
        :param numbers: values to change: ``max_conns=2``.
        """
        old = psutil.Process(self.pid).children()
        self._configure(down, **numbers)
        os.kill(self.pid, signal.SIGHUP)
        _, alive = psutil.wait_procs(old, STOP_SECONDS)
        assert not alive, "nginx still has old workers"

    def close(self) -> None:
        """Stop it."""
        if self._process is not None:
            family = [psutil.Process(self.pid), *psutil.Process(self.pid).children()]
            self._process.terminate()
            self._process.wait(STOP_SECONDS)
            psutil.wait_procs(family, STOP_SECONDS)
        self._reserved.close()

    def headers(self) -> dict[str, str]:
        """The headers of a request with a valid token."""
        return self.servers[0].headers()

    def errors(self) -> str:
        """nginx's error log."""
        path = self.folder / "error.log"
        return path.read_text() if path.exists() else ""

    def tried(self, answer: requests.Response) -> list[Server]:
        """The servers that got a request, in order; the last one has answered."""
        wanted = answer.headers["X-Request-ID"]
        return wait_until(lambda: self._tried().get(wanted), SECONDS, "the request in nginx's log")

    def _tried(self) -> dict[str, list[Server]]:
        by_address = {address_of(server): server for server in self.servers}
        lines = _LOGGED.finditer(self.log_path.read_text())
        return {
            line["request_id"]: [by_address[address] for address in line["to"].split(", ") if address in by_address]
            for line in lines
        }


def address_of(server: Server) -> str:
    """The address on which a server listens."""
    return f"127.0.0.1:{server.port}"


@dataclass
class Cluster:
    """Servers, the balancer in front of them, and the backend behind them, through a proxy that counts requests."""

    servers: list[Server]
    balancer: Balancer
    proxy: FaultProxy
    container: ContainerClient
    benches: list[Bench] = field(init=False)

    def __post_init__(self) -> None:
        self.benches = [Bench(server, self.proxy, self.container) for server in self.servers]

    def store(self, content: bytes, key: str | None = None) -> str:
        """Store an object as another program would; returns its key."""
        return self.benches[0].store(content, key)

    def owner(self, key: str) -> Server:
        """The server to which the balancer sends requests for a key while all are up."""
        return self.balancer.tried(requests.head(f"{self.balancer.url}/{key}", timeout=SECONDS))[-1]

    def others(self, server: Server) -> list[Server]:
        """All servers but this one."""
        return [each for each in self.servers if each is not server]

    def holders(self, key: str) -> list[Server]:
        """The servers that have a copy in their cache."""
        return [server for server in self.servers if has_copy(server, key)]


def has_copy(server: Server, key: str) -> bool:
    """Whether a server has a copy in its cache."""
    return Cache(server.cache_directory).location(key).record.exists()


@contextlib.contextmanager
def cluster(azurite: Azurite, folder: Path, options: dict[str, Any] | None = None) -> Iterator[Cluster]:
    """Servers and their balancer, during the block; those that run at its end must be clean.

    :param options: sections of the servers' configuration.
    """
    name = azurite.new_container()
    with ExitStack() as stack:
        proxy = stack.enter_context(fault_proxy(azurite))
        container = stack.enter_context(azurite.client(name))
        azure = {"account": azurite.account, "key": azurite.key, "endpoint": proxy.endpoint, "container": name}
        document = {"driver": "azure", "jwt_secret": secrets.token_hex(32), "azure": azure, **(options or {})}
        document["server"] = {"workers": 2, "trusted_proxies": 1, **document.get("server", {})}
        servers = []
        for number in range(MACHINES):
            place = folder / f"machine{number}"
            place.mkdir()
            servers.append(stack.enter_context(running(Server(place, document))))
            servers[-1].wait_until_swept()
        balancer = Balancer(folder / "nginx", [address_of(server) for server in servers], servers)
        stack.callback(balancer.close)
        balancer.start()
        yield Cluster(servers, balancer, proxy, container)


def seconds_until(condition: Any, what: str, patience: float = 60) -> float:
    """Wait until the condition is true; returns for how many seconds."""
    started = time.monotonic()
    wait_until(condition, patience, what)
    return time.monotonic() - started
