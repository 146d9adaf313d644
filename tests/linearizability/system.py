# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is tested: one server or several, each with a cache of its own, over Azurite behind a proxy, or over files."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob import ContainerClient

from tests.linearizability.contents import number_of
from tests.support.azurite import Azurite
from tests.support.disks import small_disk
from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.harness import START_SECONDS, STOP_SECONDS, Server, wait_until

WORKERS = 2
READ_TIMEOUT = 1.5  # seconds; faults that last longer make an outcome unknown
CONNECT_TIMEOUT = 1.5  # seconds
RETRY_TIMEOUT = 1  # seconds; soon enough for many operations in a short history
LOCK_TIMEOUT = 4  # seconds
REVALIDATE_AFTER = 1.0  # seconds; with several machines
DISK_SIZE = 40 * 1024**2  # bytes; of a disk that is to be filled up
_BECOME_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mode:
    """A kind of history."""

    name: str
    driver: str = "azure"
    machines: int = 1
    cache: dict[str, Any] = field(default_factory=dict)  # settings
    has_small_disk: bool = False  # below the cache, or the local driver's objects
    large_share: float = 0.03  # of contents above Azure's limit for one request

    @property
    def revalidate_after(self) -> float:
        """Seconds for which a machine may not notice what another one has done."""
        return REVALIDATE_AFTER if self.machines > 1 else 0.0


TINY = {"max_files": 2, "interval": 0.3}
MODES = {
    mode.name: mode
    for mode in (
        Mode("azure"),
        Mode("local", driver="local"),
        Mode("azure-two", machines=2),
        Mode("azure-tiny", cache=TINY),
        Mode("azure-disk", has_small_disk=True),
        Mode("local-disk", driver="local", has_small_disk=True),
        Mode("azure-two-tiny", machines=2, cache=TINY),
    )
}


@dataclass
class System:
    """The servers and what is behind them.

    :param proxy: between the servers and Azurite; None: the driver is the local one.
    :param container: straight to Azurite, past the proxy.
    :param disk: the folder of the disk that may be filled up.
    """

    mode: Mode
    servers: list[Server]
    proxy: FaultProxy | None = None
    container: ContainerClient | None = None
    disk: Path | None = None

    def stored(self, key: str) -> tuple[int, str] | None:
        """What the backend has, asked without the servers: a content's number, and its ETag; None: nothing.

        Of the local driver's files, the ETag is not known.
        """
        if self.container is None:
            return self._stored_locally(key)
        with contextlib.suppress(ResourceNotFoundError):
            properties = self.container.get_blob_client(key).get_blob_properties()
            return number_of(properties.size), properties.etag.strip('"')
        return None

    def _stored_locally(self, key: str) -> tuple[int, str] | None:
        with contextlib.suppress(FileNotFoundError):
            return number_of((self.servers[0].storage_path / key).stat().st_size), ""
        return None

    def is_busy(self) -> bool:
        """Whether a request to the backend or a writer is still under way."""
        busy = self.proxy is not None and self.proxy.running > 0
        return busy or any(server.is_writing() for server in self.servers)


@contextlib.contextmanager
def running_system(mode: Mode, folder: Path, azurite: Azurite | None) -> Iterator[System]:
    """Servers during the block. They are not stopped at its end if they run well: :func:`.ending.end` does that."""
    with ExitStack() as stack:
        document: dict[str, Any] = {"driver": mode.driver, "jwt_secret": secrets.token_hex(32)}
        document["server"] = {"workers": WORKERS, "lock_timeout": LOCK_TIMEOUT}
        document["cache"] = {"revalidate_after": mode.revalidate_after, **mode.cache}
        proxy = container = None
        if mode.driver == "azure":
            assert azurite is not None
            proxy = stack.enter_context(fault_proxy(azurite))
            name = azurite.new_container()
            container = stack.enter_context(azurite.client(name))
            document["azure"] = {"account": azurite.account, "key": azurite.key, "endpoint": proxy.endpoint}
            document["azure"] |= {"read_timeout": READ_TIMEOUT, "connect_timeout": CONNECT_TIMEOUT, "container": name}
            document["azure"] |= {"retry_timeout": RETRY_TIMEOUT}
        servers = [_server(folder / f"machine{number}", document) for number in range(mode.machines)]
        disk = stack.enter_context(_disk(mode, servers[0])) if mode.has_small_disk else None
        for server in servers:
            stack.callback(_kill, server)
            server.start()
            server.wait_until_swept()
        yield System(mode, servers, proxy, container, disk)


def _server(folder: Path, document: dict[str, Any]) -> Server:
    folder.mkdir(parents=True)
    return Server(folder, document)


def _disk(mode: Mode, server: Server) -> contextlib.AbstractContextManager[Path]:
    return small_disk(server.cache_directory if mode.driver == "azure" else server.storage_path, DISK_SIZE)


def _kill(server: Server) -> None:
    """End a server that a failed history has left running, and give its port back."""
    if server._process is not None:
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGCONT)
        server.kill()
    server._reserved.close()


# The next master (SIGUSR2)


class Adopted:
    """A master that another master has started, in the shape of :class:`subprocess.Popen`."""

    def __init__(self, pid: int):
        self.pid = pid
        self._process = psutil.Process(pid)
        self.send_signal = self._process.send_signal
        self.terminate = self._process.terminate

    def wait(self, seconds: float | None = None) -> None:
        """Wait for its end."""
        try:
            self._process.wait(seconds)
        except psutil.TimeoutExpired as exc:
            raise subprocess.TimeoutExpired("the next master", exc.seconds) from None

    def poll(self) -> int | None:
        """None: it runs."""
        return None if self._process.is_running() else 0


def upgrade(server: Server, last_signal: signal.Signals) -> None:
    """Have a new master take the old one's place, as an operator does who has installed a new version."""
    old = server.process
    old.send_signal(signal.SIGUSR2)
    new = wait_until(lambda: _next_master(old.pid), START_SECONDS, "the next master")
    wait_until(lambda: len(_children(new)) >= WORKERS, START_SECONDS, "its workers")
    _libc.prctl(_BECOME_SUBREAPER, 1)  # so that the new master's end will be seen here
    try:
        old.send_signal(last_signal)
        old.wait(STOP_SECONDS)
        server._process = Adopted(new)  # type: ignore[assignment]
    finally:
        _libc.prctl(_BECOME_SUBREAPER, 0)


def _next_master(old: int) -> int | None:
    for child in _children(old):
        with contextlib.suppress(psutil.Error):
            if child.environ().get("GUNICORN_PID") == str(old):
                return child.pid
    return None


def _children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children()
    return []
