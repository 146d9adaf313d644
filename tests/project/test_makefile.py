# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make`` alone, and its targets in the README."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

import kci_storage

ROOT = Path(kci_storage.__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.MULTILINE))


def test_make_alone_prints_every_target_with_its_help():
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines() if line.startswith("make ")]
    assert {name for _, name, _ in lines} == TARGETS


def test_every_phony_target_has_help():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert set(phony.split()) == TARGETS


def test_the_readme_names_every_target_and_no_other():
    assert set(re.findall(r"`make ([a-z-]+)[` ]", (ROOT / "README.md").read_text())) == TARGETS


def test_commits_are_checked_as_in_ci_without_downloads():
    """The hooks are this project's own and run make's commands; hooks of others would be cloned from elsewhere."""
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    (hook,) = repositories[0]["hooks"]
    assert (hook["entry"], hook["language"]) == ("make check", "system")
