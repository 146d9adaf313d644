# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make run``: an empty folder becomes a server, and the printed lines work. The README has the same lines."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

import kci_storage
from kci_storage.config.reading import load
from tests.support.harness import STOP_SECONDS, reserve_port, toml, wait_until

ROOT = Path(kci_storage.__file__).parent.parent
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def port() -> Iterator[int]:
    """A free port, reserved for this test."""
    with reserve_port() as reserved:
        yield reserved.getsockname()[1]


@pytest.fixture
def start(tmp_path: Path, port: int) -> Iterator[Start]:
    """Starts the program of ``make run`` in an empty folder."""
    started: list[subprocess.Popen[str]] = []

    def run(**environ: str) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KCI_STORAGE_")}
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, ROOT / "tools" / "run.py"],
                cwd=tmp_path,
                env={**inherited, "KCI_STORAGE_PORT": str(port), **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        process.terminate()
        assert process.wait(STOP_SECONDS) in (0, os.EX_CONFIG)


def output_of(folder: Path) -> str:
    return (folder / "output").read_text()


def lines_to_paste(folder: Path) -> list[str]:
    wait_until(lambda: "Ctrl-C ends the server." in output_of(folder), 60, "the lines to paste")
    return [line.strip() for line in output_of(folder).splitlines() if line.startswith("  ")]


def paste(line: str, folder: Path) -> str:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, timeout=60, check=True).stdout


def test_an_empty_folder_becomes_a_server_whose_lines_work(start, tmp_path):
    process = start()
    lines = lines_to_paste(tmp_path)
    answers = [paste(line, tmp_path / "/") for line in lines]
    assert answers[2:] == ["Hello, form\n", "Hello, curl\n"]

    path = tmp_path / "config.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    config = load(path, {})
    assert config.driver == "local" and len(config.jwt_secret) == 64
    assert config.jwt_secret not in output_of(tmp_path)

    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_SECONDS) == 0


README_BLOCK = re.search(
    r"^```sh\n(TOKEN=.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL
)[1]


def test_the_readmes_lines_work_and_do_not_touch_the_readers_files(start, tmp_path, port):
    """They are pasted into one shell, in a checkout's folder that has files of the same names."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/kci-storage").symlink_to(Path(sys.executable).parent / "kci-storage")
    for name in ("form.txt", "put.txt", "demo"):
        (tmp_path / name).write_text("mine")
    start()
    printed = lines_to_paste(tmp_path)
    output = paste(README_BLOCK.replace(":3000", f":{port}"), tmp_path)
    assert output.endswith("Hello, form\nHello, curl\n")
    assert {(tmp_path / name).read_text() for name in ("form.txt", "put.txt", "demo")} == {"mine"}
    assert _without_token(printed, port) == _without_token(README_BLOCK.splitlines()[1:], 3000)


def _without_token(lines: list[str], port: int) -> list[list[str]]:
    """The words of each line, without the token and the port."""
    plain = (re.sub(r"Bearer [^'\"]+", "Bearer", line).replace(f":{port}", "") for line in lines)
    return [shlex.split(line) for line in plain]


def test_every_new_configuration_has_another_secret(start, tmp_path):
    secrets = set()
    for name in ("first", "second"):
        start(KCI_STORAGE_CONFIG=f"{name}.toml", KCI_STORAGE_PORT="0").wait(60)
        secrets.add(load(tmp_path / f"{name}.toml", {}).jwt_secret)
    assert len(secrets) == 2


def test_an_existing_configuration_is_used_as_it_is(start, tmp_path, port):
    users = [{"name": "nobody"}, {"name": "builder@example.com", "prefixes": ["/builds/v6*"]}]
    text = toml({"driver": "local", "jwt_secret": "s" * 32, "server": {"bind": "0.0.0.0:1"}, "users": users})
    (tmp_path / "config.toml").write_text(text)
    start()
    lines = lines_to_paste(tmp_path)
    assert [paste(line, tmp_path) for line in lines][2:] == ["Hello, form\n", "Hello, curl\n"]
    assert lines[-1].endswith("/builds/v6/put.txt")
    assert (tmp_path / "config.toml").read_text() == text
    assert requests.get(f"http://127.0.0.1:{port}/v1/list", timeout=60).text.split() == [
        "builds/v6/form.txt",
        "builds/v6/put.txt",
    ]


def test_a_unix_socket_can_be_used_too(start, tmp_path):
    (tmp_path / "config.toml").write_text(
        toml({"driver": "local", "jwt_secret": "s" * 32, "server": {"bind": "unix:kci.sock"}})
    )
    start(KCI_STORAGE_PORT="")
    assert [paste(line, tmp_path) for line in lines_to_paste(tmp_path)][2:] == ["Hello, form\n", "Hello, curl\n"]


def test_a_port_in_use_is_one_line(start, tmp_path):
    with reserve_port() as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert start(KCI_STORAGE_PORT=str(port)).wait(60) == os.EX_CONFIG
    assert output_of(tmp_path).splitlines()[1:] == [
        (
            f"run: cannot listen on 127.0.0.1:{port}: Address already in use; "
            f"choose another port: make run KCI_STORAGE_PORT={port + 1}"
        )
    ]


@pytest.mark.parametrize(
    ("bind", "problem"),
    [
        ("192.0.2.1:80", "run: cannot listen on 192.0.2.1:80: Cannot assign requested address; choose another port"),
        ("nowhere.invalid:80", "run: cannot listen on nowhere.invalid:80: "),
    ],
)
def test_an_address_that_is_not_ours_is_one_line(start, tmp_path, bind, problem):
    (tmp_path / "config.toml").write_text(toml({"driver": "local", "jwt_secret": "s" * 32, "server": {"bind": bind}}))
    assert start(KCI_STORAGE_PORT="").wait(60) == os.EX_CONFIG
    (line,) = output_of(tmp_path).splitlines()
    assert line.startswith(problem)


def test_a_broken_configuration_is_one_line(start, tmp_path):
    (tmp_path / "config.toml").write_text("x = 1")
    assert start().wait(60) == os.EX_CONFIG
    (line,) = output_of(tmp_path).splitlines()
    assert line.startswith("run: config.toml: x: unknown key; ")
