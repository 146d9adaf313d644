# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make demo`` with a small folder, and that it notices differences."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.support.azurite import Azurite
from tools import demo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like real ones: subfolders, an empty file, odd names, a link, a file of several MiB."""
    folder = tmp_path / "input"
    (folder / "lib/modules/6.1.0+x").mkdir(parents=True)
    (folder / "empty").touch()
    (folder / "lib/modules/6.1.0+x/a b%20c.ko").write_bytes(b"\0" * 100)
    (folder / "lib/naïve.dtb").write_bytes(bytes(range(256)))
    (folder / "Image").write_bytes(b"0123456789abcdef" * 200_000)
    (folder / "link").symlink_to("Image")
    (folder / "dangling").symlink_to("nowhere")
    return folder


@pytest.fixture(autouse=True)
def in_reach(azurite: Azurite) -> None:
    """Skips the tests without Azurite."""


def test_every_file_goes_both_ways(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py", str(folder)])
    assert demo.main() == 0
    printed = capsys.readouterr().out
    assert "demo: 4 files of " in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(("upload", "cold", "warm"))]
    assert [(row[0], row[-2:]) for row in rows[1:]] == [("cold", ["4", "miss"]), ("warm", ["4", "hit"])]
    assert "every file came back as it went" in printed


def test_a_file_that_comes_back_changed_is_noticed(folder, tmp_path, capsys):
    files = demo.regular_files(folder)
    (tmp_path / "work").mkdir()
    files[0] = dataclasses.replace(files[0], sha256="0" * 64)
    passes = demo.run(files, tmp_path / "work")
    assert demo.report(passes) == 1
    printed = capsys.readouterr().out
    assert "\n3 problems:\n" in printed
    assert all(f"{item.name}: {files[0].key}: expected " in printed for item in passes)


def test_a_refused_file_is_noticed(folder, tmp_path):
    (folder / "back\\slash").touch()
    (tmp_path / "work").mkdir()
    passes = demo.run(demo.regular_files(folder), tmp_path / "work")
    assert [len(item.problems) for item in passes] == [1, 1, 1]
    assert "400" in passes[0].problems[0] and "404" in passes[1].problems[0]


def test_an_empty_folder_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo.py", str(tmp_path)])
    assert demo.main() == 1
