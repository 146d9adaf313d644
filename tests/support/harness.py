# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real server for tests: gunicorn with several workers, with its own folder and port."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jwt
import psutil
import requests

from kci_storage.cache.directory import Cache
from kci_storage.files import durable
from tests.support.peers import holders

START_SECONDS = 120  # a loaded machine starts two Python workers in well under this
STOP_SECONDS = 60  # less than graceful_timeout, so that a request that hangs is noticed
_TROUBLE = re.compile(
    r"Traceback \(most recent call last\)|\[(?:ERROR|CRITICAL)\]|\blevel=(?:error|critical)\b", re.IGNORECASE
)
_ENVIRONMENT = ("KCI_STORAGE_", "STORAGE_DEBUG", "STORAGE_VERBOSE", "PROMETHEUS_", "GUNICORN_")


T = TypeVar("T")


def toml(document: Mapping[str, Any], section: str = "") -> str:
    """The text of a configuration file, or of one section.

    :param section: the section's name, with a dot at the end; empty: the whole file.

    >>> print(toml({"driver": "local", "server": {"threads": 4}, "users": [{"name": "a", "prefixes": ["b"]}]}))
    driver = "local"
    [server]
    threads = 4
    [[users]]
    name = "a"
    prefixes = ["b"]
    """
    lines = [f"{key} = {_value(value)}" for key, value in document.items() if not _is_table(value)]
    for key, value in document.items():
        if isinstance(value, Mapping):
            lines += [f"[{section}{key}]", toml(value, f"{section}{key}.")]
        elif _is_table(value):
            lines += [line for table in value for line in (f"[[{section}{key}]]", toml(table))]
    return "\n".join(line for line in lines if line)


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _value(value: object) -> str:
    """A value in JSON, which is TOML too for texts, numbers, booleans and lists."""
    return json.dumps(str(value) if isinstance(value, Path) else value)


def unexpected(log: str, expected: Iterable[str] = ()) -> list[str]:
    r"""The lines of a log that report an error, except for those that match an expected pattern.

    >>> unexpected("[INFO] fine\n[ERROR] broken\nlevel=error event=x", ["event=x"])
    ['[ERROR] broken']
    """
    lines = [line for line in log.splitlines() if _TROUBLE.search(line)]
    return [line for line in lines if not any(re.search(pattern, line) for pattern in expected)]


def wait_until(condition: Callable[[], T | None], seconds: float, what: str) -> T:
    """Call ``condition()`` until it is true, and return its value.

    :param what: what the test waits for; for the message.
    :raises AssertionError: it is not true after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"still waiting after {seconds} s: {what}")


class Server:
    """A kci-storage server, started with a configuration file, as by an operator.

    :param folder: empty; for the configuration, the log, the cache and the local driver's objects.
    :param document: the configuration, except for the address, the secret and the folders.
    :param environ: additional variables of the environment.
    :param arguments: gunicorn's.
    :param wrapper: a command that runs the server, such as prlimit(1).
    """

    def __init__(
        self,
        folder: Path,
        document: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
        arguments: Iterable[str] = (),
        wrapper: Iterable[str] = (),
    ):
        self.folder = folder
        self.config_path = folder / "config.toml"
        self.cache_directory = folder / "cache"
        self.storage_path = folder / "storage"
        self.log_path = folder / "server.log"
        self.expected_errors: list[str] = []
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.document = self._complete(document)
        if self.document["server"].get("certfile"):
            self.url = f"https://127.0.0.1:{self.port}"
        self.secret: str = self.document["jwt_secret"]
        self._environ = environ or {}
        self._arguments = list(arguments)
        self._wrapper = list(wrapper)
        self._process: subprocess.Popen[bytes] | None = None

    def _complete(self, document: Mapping[str, Any]) -> dict[str, Any]:
        complete = {"driver": "local", "jwt_secret": secrets.token_hex(32), **document}
        complete["server"] = {"bind": f"127.0.0.1:{self.port}", "workers": 2, **complete.get("server", {})}
        # The tests can run on a machine whose disk is nearly full: nothing is evicted for that reason.
        any_disk = {"low_disk_percent": 0, "recover_disk_percent": 0}
        complete["cache"] = {"directory": self.cache_directory, **any_disk, **complete.get("cache", {})}
        complete["local"] = {"storage_path": self.storage_path, **complete.get("local", {})}
        return complete

    # Life

    def start(self) -> None:
        """Write the configuration, start, and wait until every worker runs and one has answered."""
        self.config_path.write_text(toml(self.document))
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self._is_up, START_SECONDS, "the server's start")
        except AssertionError as exc:
            exc.add_note(self.log())
            self.kill()
            raise

    def try_to_start(self) -> subprocess.CompletedProcess[str]:
        """Write the configuration, and start a server that is expected to refuse it; returns its exit and output."""
        self.config_path.write_text(toml(self.document))
        self._reserved.close()
        return subprocess.run(
            self._command(),
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )

    def _command(self) -> list[str]:
        command = [*self._wrapper, sys.executable, "-m", "kci_storage.cli", "serve"]
        return [*command, "--", *self._arguments] if self._arguments else command

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_ENVIRONMENT)}
        return {**inherited, "KCI_STORAGE_CONFIG": str(self.config_path), **self._environ}

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode} at its start")
        if len(self.worker_pids()) < self.document["server"]["workers"]:
            return False
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/v1/health", timeout=5).status_code == 200
        return False

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the server as systemd does, by SIGTERM.

        :raises AssertionError: it still runs after ``seconds``, and has been killed.
        """
        if self._process is None:
            return
        family = [self._process.pid, *self.worker_pids()]
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"SIGTERM did not end the server in {seconds} s\n{self.log()}") from None
        finally:
            _kill(family)
            self._process.wait()
            self._process = None

    def reload(self) -> None:
        """Write :attr:`document` as it is now, and have the server read it (SIGHUP). Does not wait for that."""
        self.config_path.write_text(toml(self.document))
        self.process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """Send SIGKILL to the master and its workers: like a loss of power, except that the page cache survives."""
        self.process.send_signal(signal.SIGSTOP)  # it must not start a worker that would be missed here
        wait_until(lambda: not _runs(self.process.pid), STOP_SECONDS, "the master to stop")
        _kill([self.process.pid, *self.worker_pids()])
        self.process.wait()
        self._process = None

    def restart(self) -> None:
        """Stop, and start again on the same port and folders, with :attr:`document` as it is now."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop, free the port, and check that the server is clean (:meth:`assert_clean`)."""
        try:
            self.stop()
        finally:
            self._reserved.close()
        self.assert_clean()

    # State

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """gunicorn's master."""
        assert self._process is not None, "the server is not running"
        return self._process

    def is_writing(self, key: str | None = None) -> bool:
        """Whether a writer holds the lock of this key; None: of any key.

        The lock's file alone does not tell, since it is created before the lock is taken. A fill holds a lock too,
        while it is published, so a test that waits for an upload must name its key.
        """
        locks = self.cache_directory / "locks"
        names = locks.iterdir() if key is None else [locks / hashlib.sha512(key.encode()).hexdigest()]
        return any(durable.is_locked(path) for path in names)

    def wait_until_swept(self) -> None:
        """Wait until the server has looked, since its latest start, for files that dead processes left behind."""
        wait_until(lambda: "event=swept" in self.log().rpartition("Starting gunicorn")[2], START_SECONDS, "the sweep")

    def worker_pids(self) -> list[int]:
        """The process IDs of the living workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(self.process.pid).children() if _lives(child.pid)]
        return []

    def holders(self, path: Path) -> list[int]:
        """The workers that hold the lock of a file, without children that have inherited it."""
        workers = self.worker_pids()
        return [pid for pid in holders(path) if pid in workers]

    def token(self, email: str = "user@example.com", **claims: Any) -> str:
        """A token signed with this server's secret."""
        return jwt.encode({"email": email, **claims}, self.secret, algorithm="HS256")

    def headers(self, email: str = "user@example.com") -> dict[str, str]:
        """The headers of a request with a valid token."""
        return {"Authorization": f"Bearer {self.token(email)}"}

    def log(self) -> str:
        """The server's standard output and standard error so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # Checks

    def assert_no_trouble(self, since: int = 0) -> None:
        """Fail on an unexpected error in the log.

        :param since: how many characters at the log's beginning to ignore.
        """
        log = self.log()[since:]
        assert not unexpected(log, self.expected_errors), log

    def assert_clean(self) -> None:
        """Fail on an unexpected error, a broken cache directory, or a temporary file. The server must be stopped."""
        self.assert_no_trouble()
        if self.cache_directory.exists():
            assert Cache(self.cache_directory).check() == []
        temporary = self.storage_path / ".kci" / "tmp"
        assert not temporary.exists() or not list(temporary.iterdir())


def reserve_port() -> socket.socket:
    """A bound socket that does not listen: it keeps the port for one server.

    No other program is given this port, but another socket with SO_REUSEADDR may bind it, and gunicorn's has that. So
    the port stays the server's between its stop and its next start.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _kill(pids: Iterable[int]) -> None:
    """Send SIGKILL to the processes that still live, and wait for their end."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(_lives(pid) for pid in pids), STOP_SECONDS, "the end of killed processes")


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return False


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server, started; closed at the end of the block."""
    try:
        server.start()
        yield server
    finally:
        server.close()
