# SPDX-License-Identifier: LGPL-2.1-or-later
"""The container's files. ``make image-test`` builds the image and runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

import kci_storage
from kci_storage.config.reading import load
from tests.support.azurite import Azurite
from tests.support.harness import Server, toml
from tests.support.wire import SECONDS

FOLDER = Path(kci_storage.__file__).parent.parent / "deploy/container"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def compose() -> Any:
    """The compose file."""
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def instruction(name: str) -> list[str]:
    """The arguments of an instruction of the last stage, lines joined."""
    stage = DOCKERFILE.rpartition("\nFROM ")[2].replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", stage, re.MULTILINE)


def health_check(server: Server) -> int:
    """The exit code of the health check in the environment of this server's container."""
    _, command = instruction("HEALTHCHECK")[0].split("CMD ")
    name, *arguments = json.loads(command)
    assert name == "kci-storage"
    run = [sys.executable, "-m", "kci_storage.cli", *arguments]
    environment = {**os.environ, "KCI_STORAGE_CONFIG": str(server.config_path)}
    return subprocess.run(run, env=environment, stderr=subprocess.DEVNULL, timeout=SECONDS).returncode


def test_the_health_check_tells_whether_the_server_runs(start_server: Callable[..., Server]):
    server = start_server("local", server={"workers": 1})
    assert health_check(server) == 0
    server.stop()
    assert health_check(server) != 0


def test_it_does_not_run_as_root():
    """Its user is a number, since Kubernetes' runAsNonRoot does not look up names."""
    [user] = instruction("USER")
    assert re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", user)


def test_its_user_may_write_to_its_volumes():
    [volumes] = instruction("VOLUME")
    [run] = instruction("RUN")
    assert set(run.split("-o kci-storage -g kci-storage ")[1].split()) == set(json.loads(volumes))


def test_both_stages_use_the_given_base():
    """An environment's Python is a link to that of the base."""
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${BASE}", "${BASE}"]
    assert re.search(r"^ARG BASE=\S+$", DOCKERFILE.partition("\nFROM")[0], re.MULTILINE)


def test_the_configuration_to_try_it_fits_the_containers(compose: Any):
    config = load(FOLDER / "try/config.toml", {})
    services, storage = compose["services"], compose["services"]["storage"]
    mounts = dict(volume.split(":", 1) for volume in storage["volumes"])
    assert mounts == {"./try": "/etc/kci-storage:ro", "cache": str(config.cache.directory)}
    assert config.server.bind == "0.0.0.0:3000" and storage["ports"] == ["127.0.0.1:3000:3000"]
    assert urlsplit(config.azure.endpoint).hostname in services


def test_the_container_is_made_before_the_server_starts(compose: Any, tmp_path: Path, azurite: Azurite):
    """The script runs twice against a real Azurite; the second time the container exists already."""
    script, _, server = compose["services"]["storage"]["command"].partition(" && exec ")
    assert (script, server) == ('sh -c "python /etc/kci-storage/make_container.py', 'kci-storage serve"')
    settings = {"account": azurite.account, "key": azurite.key, "endpoint": azurite.endpoint}
    document = {"jwt_secret": "s" * 32, "azure": {**settings, "container": "artifacts"}}
    (tmp_path / "config.toml").write_text(toml(document))
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, FOLDER / "try/make_container.py"],
            env={**os.environ, "KCI_STORAGE_CONFIG": str(tmp_path / "config.toml")},
            capture_output=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
    with azurite.client("artifacts") as container:
        assert container.exists()
