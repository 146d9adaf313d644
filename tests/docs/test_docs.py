# SPDX-License-Identifier: LGPL-2.1-or-later
"""Docs and code say the same: routes, errors, commands, links. Settings and metrics have tests of their own."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

import kci_storage
from kci_storage.app import create_app
from kci_storage.cli import main as cli
from kci_storage.config.reading import load
from kci_storage.errors import TABLE

ROOT = Path(kci_storage.__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
HTTP = (ROOT / "docs/http.md").read_text()
IMPLIED = {"HEAD", "OPTIONS"}  # which the text tells for all routes


def rows(document: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    part = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", document, flags=re.MULTILINE | re.DOTALL)[1]
    table = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in row] for row in table[2:]]


@pytest.fixture
def routes(tmp_path: Path) -> set[tuple[str, str]]:
    """Route and method of all that the application answers."""
    (tmp_path / "config.toml").write_text(f'driver = "local"\njwt_secret = "{"s" * 32}"\n')
    rules = create_app(load(tmp_path / "config.toml", {})).url_map.iter_rules()
    spelt = ((rule.rule.replace("<path:path>", "<key>"), rule.methods - IMPLIED) for rule in rules)
    return {(route, method) for route, methods in spelt for method in methods}


def test_every_route_is_documented_and_no_other(routes: set[tuple[str, str]]) -> None:
    assert {(row[0], row[1]) for row in rows(HTTP, "Routes")} == routes


def test_every_error_is_documented_with_its_status_and_no_other() -> None:
    documented = {(row[1], row[0]) for row in rows(HTTP, "Errors")}
    assert documented == {(meaning.label, str(meaning.status)) for meaning in TABLE.values()}


def test_the_readme_names_the_routes_too(routes: set[tuple[str, str]]) -> None:
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`(?:GET|POST|PUT|DELETE|HEAD) (/[^`]*)`", readme))
    assert {route for route, _ in routes} - named == {"/"}


def commands() -> set[str]:
    """The commands of ``kci-storage``."""
    (choices,) = (action.choices for action in cli._parser()._actions if isinstance(action.choices, dict))
    return set(choices)


def test_every_command_is_documented_and_no_other() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    named = set(re.findall(r"kci-storage (?:--config \S+ )?([a-z][a-z-]*)", "\n".join(_code(text))))
    assert commands() <= named
    assert named - commands() <= {"kci-storage"}


def _code(text: str) -> list[str]:
    """What is set as code: blocks, and words in the text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)


def anchor(heading: str) -> str:
    """The fragment that leads to a heading.

    >>> anchor("`[server]` and more")
    'server-and-more'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists() and target.is_relative_to(ROOT), link
        if fragment:
            assert fragment in map(anchor, re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)), link


def test_every_document_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        document = todo.pop()
        if document not in seen and document.suffix == ".md":
            seen.add(document)
            links = re.findall(r"\]\(([^)#\s:]+)[^)]*\)", document.read_text())
            todo += [(document.parent / link).resolve() for link in links]
    assert set(DOCUMENTS) - seen == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_project_that_are_named_are_there(document: Path) -> None:
    folders = "kci_storage|tests|deploy|docs|tools|benchmarks"
    named = set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w)(?![\w*])", document.read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_architecture_has_every_folder_and_file_of_the_root_and_no_other() -> None:
    document = (ROOT / "docs/architecture.md").read_text()
    entries = [entry for entry in (ROOT / "kci_storage").iterdir() if not entry.name.startswith(("_", "py."))]
    there = {f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries}
    named = {name for row in rows(document, "The source tree") for name in re.findall(r"[\w.]+/?", row[0])}
    assert named == there


def test_the_architecture_names_modules_that_are_there() -> None:
    """Its tables name them without the package's own folder."""
    named = re.findall(r"`(\w+/\w+\.py)`", (ROOT / "docs/architecture.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not any((ROOT / top / name).exists() for top in ("kci_storage", "."))] == []


def test_the_architecture_has_the_layers_that_are_held() -> None:
    linter = configparser.ConfigParser()
    linter.read(ROOT / ".importlinter")
    held = linter["importlinter:contract:layers"]["layers"].split("\n")[1:]
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs/architecture.md").read_text(), flags=re.MULTILINE)
    named = " ".join(quoted).split(" → ")
    assert [layer.split(", ") for layer in named] == [layer.split(" | ") for layer in held]


def test_the_documents_that_code_refers_to_are_there() -> None:
    folders = ("kci_storage", "tests", "benchmarks", "tools", "deploy")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    text = "".join(path.read_text() for path in files if path.suffix in (".py", ".sh", ".yml", ".conf", ".service"))
    named = set(re.findall(r"\bdocs/[a-z/_-]+\.md\b", text))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
