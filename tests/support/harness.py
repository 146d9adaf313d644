# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real server for tests: gunicorn with several workers, in a folder and on a port of its own."""

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
STOP_SECONDS = 60  # less than graceful_timeout, which would hide what hangs
_TROUBLE = re.compile(
    r"Traceback \(most recent call last\)|\[(?:ERROR|CRITICAL)\]|\blevel=(?:error|critical)\b", re.IGNORECASE
)
_ENVIRONMENT = ("KCI_STORAGE_", "STORAGE_DEBUG", "STORAGE_VERBOSE", "PROMETHEUS_", "GUNICORN_")


T = TypeVar("T")


def toml(document: Mapping[str, Any], section: str = "") -> str:
    """A configuration file's text.

    :param section: the name of the section that the document is, with a dot; empty: it is all.

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
    """JSON's texts, numbers, booleans and lists are TOML's too."""
    return json.dumps(str(value) if isinstance(value, Path) else value)


def unexpected(log: str, expected: Iterable[str] = ()) -> list[str]:
    r"""The lines of a log that report trouble, but for those that match an expected pattern.

    >>> unexpected("[INFO] fine\n[ERROR] broken\nlevel=error event=x", ["event=x"])
    ['[ERROR] broken']
    """
    lines = [line for line in log.splitlines() if _TROUBLE.search(line)]
    return [line for line in lines if not any(re.search(pattern, line) for pattern in expected)]


def wait_until(condition: Callable[[], T | None], seconds: float, what: str) -> T:
    """Ask ``condition()`` until its answer is true, and give that answer; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"still waiting after {seconds} s: {what}")


class Server:
    """A kci-storage server, started from a configuration file as an operator would.

    :param folder: empty; gets the configuration, the log, the cache and the local driver's objects.
    :param document: what to configure beside the bind, the secret and the folders, as TOML's own structure.
    :param environ: what to add to the environment.
    :param arguments: what to pass on to gunicorn.
    :param wrapper: a command that becomes the server's, such as prlimit(1).
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
        # Whose disk is nearly full runs the tests all the same: nothing is evicted for its sake.
        any_disk = {"low_disk_percent": 0, "recover_disk_percent": 0}
        complete["cache"] = {"directory": self.cache_directory, **any_disk, **complete.get("cache", {})}
        complete["local"] = {"storage_path": self.storage_path, **complete.get("local", {})}
        return complete

    # Life

    def start(self) -> None:
        """Write the configuration and start; back when every worker is there and one has answered."""
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
        """Write the configuration and start a server that is expected to refuse that; what came of it."""
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
        """End the server as systemd does, by SIGTERM; what is still there after ``seconds`` is killed, and fails."""
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
        """Write :attr:`document` as it is now, and have it read (SIGHUP), without waiting for what comes of it."""
        self.config_path.write_text(toml(self.document))
        self.process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """SIGKILL to the master and its workers: a loss of power, but for the page cache."""
        self.process.send_signal(signal.SIGSTOP)  # it is not to make a worker that nobody knows of
        wait_until(lambda: not _runs(self.process.pid), STOP_SECONDS, "the master to stand still")
        _kill([self.process.pid, *self.worker_pids()])
        self.process.wait()
        self._process = None

    def restart(self) -> None:
        """Stop and start again: same configuration (:attr:`document` may have been changed), port and folders."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop, give the port back, and assert that all is clean."""
        try:
            self.stop()
        finally:
            self._reserved.close()
        self.assert_clean()

    # What it is

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """gunicorn's master."""
        assert self._process is not None, "the server is not running"
        return self._process

    def is_writing(self, key: str | None = None) -> bool:
        """Whether somebody holds this key's lock, or any. Its file alone says less: it is there a moment before.

        A fill that is published holds a lock, too: who waits for an upload names its key.
        """
        locks = self.cache_directory / "locks"
        names = locks.iterdir() if key is None else [locks / hashlib.sha512(key.encode()).hexdigest()]
        return any(durable.is_locked(path) for path in names)

    def wait_until_swept(self) -> None:
        """Wait for the end of the walk at its latest start, which finds what the dead have left."""
        wait_until(lambda: "event=swept" in self.log().rpartition("Starting gunicorn")[2], START_SECONDS, "the sweep")

    def worker_pids(self) -> list[int]:
        """The process ids of the workers that live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(self.process.pid).children() if _lives(child.pid)]
        return []

    def holders(self, path: Path) -> list[int]:
        """The workers that hold the lock of a file: without what they are just forking, or have passed it on to."""
        workers = self.worker_pids()
        return [pid for pid in holders(path) if pid in workers]

    def token(self, email: str = "user@example.com", **claims: Any) -> str:
        """A token signed with this server's secret."""
        return jwt.encode({"email": email, **claims}, self.secret, algorithm="HS256")

    def headers(self, email: str = "user@example.com") -> dict[str, str]:
        """The headers of a request that may write."""
        return {"Authorization": f"Bearer {self.token(email)}"}

    def log(self) -> str:
        """All that the server has written to its standard output and error."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # What must hold of it

    def assert_no_trouble(self, since: int = 0) -> None:
        """Fail on an unexpected error in the log.

        :param since: how much of the log to leave out, in characters.
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
    """A bound socket that does not listen: nobody else gets its port, but one more SO_REUSEADDR socket may bind it.

    gunicorn sets SO_REUSEADDR, so the port is the server's, and remains so between its stop and its next start.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _kill(pids: Iterable[int]) -> None:
    """SIGKILL to those that still live, and wait for their end."""
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
