# SPDX-License-Identifier: LGPL-2.1-or-later
"""gunicorn's own settings: each works as gunicorn documents it, or stops the start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gunicorn.config import Config

from kci_storage.server import gunicorn_parts
from kci_storage.server.gunicorn_settings import KEPT, REFUSED, WORKING, refusal
from tests.support.harness import Server, wait_until
from tests.support.wire import SECONDS, get

OWN = {"workers": 2, "threads": 64, "worker_class": "kci_storage.server.worker.Worker"}


def defaults() -> dict[str, Any]:
    return gunicorn_parts.default_settings()


def test_every_setting_is_in_one_table():
    tables = [WORKING, set(KEPT), set(REFUSED)]
    assert set().union(*tables) == set(Config().settings)
    assert sum(map(len, tables)) == len(Config().settings)


@pytest.mark.parametrize("name", [*KEPT, *REFUSED])
def test_a_setting_without_effect_is_refused(name: str):
    values = {**defaults(), **OWN}
    assert refusal(values, defaults(), OWN) is None
    line = refusal({**values, name: object()}, defaults(), OWN)
    assert line is not None and line.startswith(f"gunicorn's setting {name} is not for this server: ")


@pytest.mark.parametrize("name", sorted(KEPT))
def test_gunicorns_own_default_is_refused_where_the_server_has_another(name: str):
    line = refusal({**defaults(), **OWN, name: defaults()[name]}, defaults(), OWN)
    assert line is not None and line.startswith(f"gunicorn's setting {name} ")


@pytest.mark.parametrize("name", sorted(WORKING))
def test_a_supported_setting_is_accepted(name: str):
    assert refusal({**defaults(), **OWN, name: object()}, defaults(), OWN) is None


def test_a_setting_of_a_later_gunicorn_must_have_its_default():
    assert refusal({"new": 1}, {"new": 1}, {}) is None
    assert (
        refusal({"new": 2}, {"new": 1}, {}) == "gunicorn's setting new is not for this server: it is not known here"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-requests", "100"], "max_requests is not for this server: a worker that ends"),
        (["--access-logfile", "-"], "accesslog is not for this server: each request is logged"),
        (
            ["--statsd-host", "127.0.0.1:8125"],
            "statsd_host is not for this server: the server's figures are at /metrics",
        ),
        (["--preload"], "preload_app is not for this server: connections to the backend"),
        (["--reuse-port"], "reuse_port is not for this server"),
        (["--worker-class", "gthread"], "worker_class is not for this server: the server needs its own"),
        (["--threads", "1"], "threads is not for this server: set it in the configuration's [server]"),
        (["--certfile", "cert.pem"], "certfile is not for this server: for TLS, set certfile"),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else None,
)
def test_the_refusal_of_a_start_is_one_line(tmp_path: Path, arguments: list[str], says: str):
    (tmp_path / "cert.pem").touch()
    done = Server(tmp_path, {}, arguments=arguments).try_to_start()
    assert done.returncode == os.EX_CONFIG
    [line] = [line for line in done.stderr.splitlines() if line.startswith("kci-storage: ")]
    assert says in line
    assert "Traceback" not in done.stderr and "Booting worker" not in done.stderr


def test_a_hook_that_is_not_called_is_refused(tmp_path: Path):
    settings = tmp_path / "settings.py"
    settings.write_text("from kci_storage.server.hooks import *\ndef pre_request(worker, req): ...\n")
    done = Server(tmp_path, {}, arguments=["--config", str(settings)]).try_to_start()
    assert done.returncode == os.EX_CONFIG and "pre_request is not for this server" in done.stderr


def test_supported_settings_have_their_effect(start_server: Callable[..., Server], tmp_path: Path):
    """A working folder, and a file for gunicorn's messages."""
    (tmp_path / "folder").mkdir()
    arguments = ["--chdir", str(tmp_path / "folder"), "--error-logfile", "messages.log", "--log-level", "debug"]
    server = start_server(server={"workers": 1}, arguments=arguments)
    assert get(server, "v1/ready").text == "ok"
    messages = tmp_path / "folder" / "messages.log"
    wait_until(lambda: "Booting worker" in messages.read_text(), SECONDS, "gunicorn's messages")
    assert "Booting worker" not in server.log() and "event=access" in server.log()
    assert os.readlink(f"/proc/{server.worker_pids()[0]}/cwd") == str(tmp_path / "folder")
