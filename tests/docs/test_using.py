# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/using.md, followed word by word: each of its shell blocks runs, against a server, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import kci_storage
from tests.drivers.contract import content_of
from tests.support.harness import Server

DOCUMENT = (Path(kci_storage.__file__).parent.parent / "docs/using.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
EXAMPLE = "https://storage.example.com"
UPLOADING = next(number for number, block in enumerate(BLOCKS) if "export TOKEN" in block)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what the page uploads."""
    (tmp_path / "Image").write_bytes(content_of(100_000))
    (tmp_path / "build.log").write_text("built\n")
    (tmp_path / "rootfs.tar.xz").write_bytes(content_of(50_000, seed=1))
    return tmp_path


def run(script: str, server: Server, folder: Path) -> str:
    """The output of a shell block, in which the server and the token are this test's."""
    script = script.replace(EXAMPLE, server.url).replace("export TOKEN=…\n", "")
    environ = {**os.environ, "TOKEN": server.token()}
    command = ["bash", "-eu", "-o", "pipefail", "-c", script]
    result = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, (script, result.stderr)
    return result.stdout


def test_the_page_can_be_followed(server: Server, folder: Path) -> None:
    upload = f'curl -sf -T %s -H "Authorization: Bearer $TOKEN" {EXAMPLE}/mainline/v6.12/arm64/%s\n'
    run("".join(upload % (name, name) for name in ("Image", "rootfs.tar.xz")), server, folder)
    os.truncate(folder / "rootfs.tar.xz", 20_000)  # a download that broke off
    output = [run(block, server, folder) for block in [*BLOCKS[UPLOADING:-1], *BLOCKS[:UPLOADING], BLOCKS[-1]]]
    text = "".join(output)
    assert "Authorized: user@example.com" in text
    assert "mainline/v6.12/arm64/logs/build.log\n" in text
    digest, computed = re.search(r"(?im)^repr-digest: sha-256=:(.*):\s+^(\S+)$", text).groups()
    assert digest == computed
    assert (folder / "Image").read_bytes() == content_of(100_000)
    assert (folder / "rootfs.tar.xz").read_bytes() == content_of(50_000, seed=1)
